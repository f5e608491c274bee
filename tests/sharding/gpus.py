"""The comparisons of these tests over the GPUs of this machine, whose collectives are NCCL's, in place of devices that
are made up: `python -m tests.sharding.gpus FILE [COUNT]` writes what it found as JSON.

In float32 throughout: products would be rounded to fewer bits. COUNT: so many devices are made up on a CPU after all,
to try this file where there is no GPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests import garbage
from tests.sharding import evaluated, steps, striped


def meshes(count: int) -> tuple[str, ...]:
    """All devices along either axis, and along both where there are enough."""
    both = (f"data={count // 2},context=2",) if count % 2 == 0 and count > 2 else ()
    return (f"data={count}", f"context={count}", *both)


def training(count: int) -> dict[str, Any]:
    """Every case of `steps`, of which several devices run the same kernels as one."""
    cases = {name: case._replace(meshes=meshes(count), length=24) for name, case in steps.CASES.items()}
    return {name: steps.compared(case) for name, case in cases.items()}


def evaluation(count: int) -> dict[str, Any]:
    """What is read and generated, over each mesh."""
    from l2a_jax.sharding import mesh
    from l2a_jax.sharding.axes import parse

    parts = (evaluated.windows, evaluated.requests, evaluated.texts, evaluated.benchmark)
    return {axes: {of.__name__: of(mesh.make(parse(axes))) for of in parts} for axes in meshes(count)}


def main(file: str) -> None:
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    count = len(jax.devices())
    attention = {"operations": {name: striped.operations(packing) for name, packing in striped.PACKINGS.items()},
                 "layers": {name: striped.layers(name) for name in striped.LAYERS}, "prompts": striped.prompts(count)}
    Path(file).write_text(json.dumps({"meshes": meshes(count), "attention": attention, "training": training(count),
                                      "evaluation": evaluation(count)}))


if __name__ == "__main__":
    if sys.argv[2:]:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={int(sys.argv[2])}"
    garbage.seldom()
    main(sys.argv[1])
