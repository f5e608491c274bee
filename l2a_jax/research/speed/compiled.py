"""Compile every kernel of the block table for a GPU that is not there, and report what it needs.

Needs the `triton` package (its compiler takes the kernels' Triton IR as JAX emits it) and its `ptxas`. XLA compiles
with its own copy of Triton, whose loops differ (it fuses less, for one), and registers by up to thirty; shared memory
and spills are the point.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from l2a_jax.attention import pallas
from l2a_jax.attention.kernels import blocks
from l2a_jax.research import tables

DEVICES = {"sm_89": "NVIDIA GeForce RTX 4090", "sm_90": "NVIDIA H100"}
_KERNELS = {"l2a_attention_forward": "forward", "l2a_attention_backward_q": "backward_q",
            "l2a_attention_backward_kv": "backward_kv", "l2a_attention_sinks": "sinks"}


def mesh_of(arch: str, **axes: int):
    """A mesh of cards that are not there."""
    card = jax.sharding.AbstractDevice(DEVICES[arch], 1, "gpu")
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes), abstract_device=card,
                                     axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def lower_for_cuda(function, *shapes, arch: str = "sm_90", mesh=None):
    """`function` lowered for CUDA on a machine without it. From jax 0.11 on, Pallas asks which card it is for."""
    mesh = mesh_of(arch, x=1) if mesh is None else mesh
    with jax.sharding.use_abstract_mesh(mesh) if jax.__version_info__ >= (0, 11) else contextlib.nullcontext():
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))


def example(loop: str, width: int, arch: str, dtype=jnp.bfloat16, sinks: int = 4):
    """A function that runs every kernel of a row of the table, and the shapes of its inputs."""
    rows = blocks.table(arch, width, jnp.dtype(dtype).itemsize, loop)
    window = {"window": 512, "long": 2_000, "most": 3_000}.get(loop)

    def run(q, k, v, cotangent, decisions):
        def call(q, k, v):
            if window is not None:
                return pallas.local(q, k, v, window=window, sinks=sinks, table=rows)
            if loop == "mixed":
                return pallas.mixed(q, k, v, decisions, window=512, sinks=sinks, table=rows)
            if loop == "routed":
                return pallas.routed(q, k, v, decisions, table=rows)
            return pallas.full(q, k, v, table=rows)

        out, pull = jax.vjp(call, q, k, v)
        return out, pull(cotangent)

    heads = [jax.ShapeDtypeStruct((1, 4_000, count, width), dtype) for count in (14, 2, 2, 14)]
    return run, (*heads, jax.ShapeDtypeStruct((1, 4_000), jnp.bool_))


def triton_kernels(lowered) -> list[dict]:
    """Name, Triton IR as text, warps and stages of each Pallas kernel in a lowered function."""
    from jax.interpreters import mlir
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    found = []

    def visit(operation):
        if operation.name == "stablehlo.custom_call" and "triton" in str(operation.attributes["call_target_name"]):
            found.append(operation.attributes["mhlo.backend_config"])
        return ir.WalkResult.ADVANCE

    module = lowered.compiler_ir("stablehlo")
    with module.context:
        module.operation.walk(visit)
        configs = [{"name": ir.StringAttr(c["name"]).value, "code": ir.StringAttr(c["ir"]).value_bytes,
                    "num_warps": ir.IntegerAttr(c["num_warps"]).value,
                    "num_stages": ir.IntegerAttr(c["num_stages"]).value} for c in found]
    for config in configs:
        with mlir.make_ir_context() as context:
            dialect.register_dialect(context)
            config["code"] = str(ir.Module.parse(config["code"]))
    return configs


def compile_kernel(kernel: dict, arch: str) -> dict:
    """Registers a thread, bytes of spilled registers, and bytes of shared memory of one kernel."""
    import triton
    from triton._C.libtriton import ir as triton_ir
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    capability = int(arch[3:])
    target = GPUTarget("cuda", capability, 32)
    options = {key: kernel[key] for key in ("num_warps", "num_stages")}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"{kernel['name']}.ttir"
        source.write_text(kernel["code"])
        backend, context = CUDABackend(target), triton_ir.context()
        triton_ir.load_dialects(context)
        backend.load_dialects(context)
        module = triton_ir.parse_mlir_module(str(source), context)
        module.context = context
        source.write_text(str(CUDABackend.make_ttir(module, {}, backend.parse_options(options), capability)))
        compiled = triton.compile(str(source), target=target, options=options)
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        report = subprocess.run(
            [os.fspath(ptxas), "-v", f"-arch={arch}{'a' if capability == 90 else ''}", os.fspath(ptx), "-o",
             os.fspath(ptx.with_suffix(".cubin"))], capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes spill stores", report)
    return {"registers": int(registers[1]), "spilled_bytes": int(spills[1]), "shared_bytes": compiled.metadata.shared}


def report(arch: str, dtype=jnp.bfloat16, sinks: int = 4, loops=blocks.LOOPS) -> list[dict]:
    """What every kernel of an architecture's rows needs, beside our bound and the card's limit."""
    found, itemsize = [], jnp.dtype(dtype).itemsize
    for width, loop in itertools.product((64, 128), loops):
        function, shapes = example(loop, width, arch, dtype, sinks)
        for kernel in triton_kernels(lower_for_cuda(function, *shapes, arch=arch)):
            name = _KERNELS.get(kernel["name"])
            if name is None:
                continue
            block = getattr(blocks.table(arch, width, itemsize, loop), name)
            found.append({"arch": arch, "width": width, "loop": loop, "kernel": name, "block": str(block),
                          **compile_kernel(kernel, arch),
                          "bound": blocks.shared_memory(name, block, width, itemsize, sinks),
                          "limit": blocks.SHARED_MEMORY[arch]})
    return found


def main(out: Path | None) -> None:
    """Print the report for both architectures, and write it to `out`."""
    rows = [row for arch in DEVICES for row in report(arch)]
    for row in rows:
        print(*row.values(), flush=True)
    tables.write(out, "kernels", rows)
