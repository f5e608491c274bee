"""How every kernel of ours is launched: the one file that imports Pallas.

The kernels are written for Pallas's Triton lowering. The default lowering differs between versions of JAX, so it is
named at every launch. JAX deprecates it since 0.11 and does not say when it goes: `lost` does, and calls then go to
XLA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import pallas as pl

from l2a_jax import device

try:
    from jax.experimental.pallas import triton as plt
except ImportError:
    plt = None


def launch(
    kernel: Callable, name: str, out_shape: Any, grid: tuple[int, ...], *, warps: int, stages: int = 1,
    interpret: bool = False, aliases: Mapping[int, int] | None = None, **specs: Any,
) -> Callable:
    """A function of arrays (or trees of them) that runs `kernel` once for every place of the grid.

    `warps` of 32 threads run a program, whose loads are pipelined in `stages`. `aliases`: input -> the output that
    begins as it. `interpret`: step by step, on any device.
    """
    return pl.pallas_call(
        kernel, name=name, out_shape=out_shape, grid=grid, input_output_aliases=dict(aliases or {}),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages), interpret=interpret, **specs)


def on_gpu(kernel: Callable, plain: Callable, *inputs: Any) -> Any:
    """`kernel(*inputs)` on NVIDIA GPUs that our kernels can be compiled for, `plain(*inputs)` elsewhere."""
    if device.capability() < 8 or lost():
        return plain(*inputs)
    return jax.lax.platform_dependent(*inputs, cuda=kernel, default=plain)


def lost() -> str | None:
    """Why no kernel can be launched with the installed JAX, or None."""
    if hasattr(plt, "CompilerParams"):
        return None
    return (f"jax {jax.__version__} has lost the Triton lowering of Pallas, which the kernels are written for: install "
            "an older jax, or port attention/kernels to a lowering that it has")
