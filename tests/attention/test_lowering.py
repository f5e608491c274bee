"""Every kernel at every block choice is lowered for CUDA: interpret mode accepts what the Triton lowering rejects."""

from __future__ import annotations

import importlib.util
import struct

import jax
import jax.numpy as jnp
import pytest

from l2a_jax.attention import pallas
from l2a_jax.attention.kernels import blocks, tile
from l2a_jax.attention.kernels.backward_kv import parts_of
from l2a_jax.attention.kernels.plan import Block, Spec
from l2a_jax.attention.kernels.sinks import MAX_SINKS
from l2a_jax.research.speed.compiled import example, lower_for_cuda, report, triton_kernels

ROWS = [(arch, width, loop) for arch in blocks.SHARED_MEMORY for width in (64, 128) for loop in blocks.LOOPS]
NARROW = [("sm_90", width, loop) for width in blocks.WIDTHS if width < 64 for loop in blocks.LOOPS]


@pytest.mark.parametrize("arch, width, loop", [*ROWS, *NARROW])
def test_every_row_of_the_table_lowers_and_every_score_goes_through_the_fused_exponent(arch, width, loop):
    function, shapes = example(loop, width, arch)
    kernels = triton_kernels(lower_for_cuda(function, *shapes, arch=arch))  # parsed again, and so verified
    assert len(kernels) == {"routed": 5, "whole": 3}.get(loop, 4)  # a join; no sinks
    assembly = f"fma.rn.f32 $0, $1, 0f{struct.pack('>f', width**-0.5 * tile.LOG2_E).hex()}, $2; ex2.approx.ftz.f32"
    for kernel in kernels:
        lines = [line for line in kernel["code"].splitlines() if "elementwise_inline_asm" in line]
        assert all(assembly in line for line in lines)
        assert bool(lines) == (kernel["name"] != "l2a_attention_join")


@pytest.mark.parametrize("operation", ("full", "local", "routed", "mixed", "both"))
@pytest.mark.parametrize("width, packed, queries", ((16, True, None), (32, True, None), (128, True, None),
                                                    (64, True, 251), (128, False, 251)))
def test_calls_with_tables_lower_at_every_width(operation, width, packed, queries):
    """Groups of 7 heads, a length that is no multiple of anything, several documents, float32; all tokens' queries, or
    some."""
    def shape(heads, rows=1_001):
        return jax.ShapeDtypeStruct((2, rows, heads, width), jnp.float32)

    rows = queries or 1_001
    numbers = [jax.ShapeDtypeStruct((2, size), dtype) for size, dtype in (
        (1_001, jnp.int32), (rows, jnp.bool_), (rows, jnp.int32))]
    options = {"window": 100, "sinks": 4} if operation in ("local", "mixed", "both") else {}

    def run(q, k, v, segment_ids, decisions, places):
        if operation in ("routed", "mixed", "both"):
            options["decisions"] = decisions
        table = blocks.table("sm_90", width, 4, "whole")
        options.update(segment_ids=segment_ids if packed else None, places=places if queries else None, table=table)
        call = lambda *qkv: getattr(pallas, operation)(*qkv, **options)  # noqa: E731
        out, pull = jax.vjp(call, q, k, v)
        return pull(out)

    assert len(triton_kernels(lower_for_cuda(run, shape(14, rows), shape(2), shape(2), *numbers))) >= 3


@pytest.mark.parametrize("arch, width, loop", ROWS)
def test_shared_memory_stays_within_the_card(arch, width, loop):
    for itemsize, limit in ((2, arch), (4, "sm_89")):
        for kernel, block in blocks.table(arch, width, itemsize, loop)._asdict().items():
            need = blocks.shared_memory(kernel, block, width, itemsize, MAX_SINKS)
            assert need <= blocks.SHARED_MEMORY[limit], f"{kernel} {block} needs {need} bytes"


@pytest.mark.parametrize("width, long", [(16, 1_024), (64, 1_024), (128, 2_048)])
def test_calls_take_the_blocks_of_their_kind_of_loop(width, long):
    windows = (long - 1, long, 4_096, 4_097, None)
    loops = [blocks.loop_of(Spec("all", 8_192, 14, 2, width, window)) for window in windows]
    assert loops == ["window", "long", "long", "most", "whole"]
    kinds = [blocks.loop_of(Spec(kind, 8_192, 14, 2, width, 16)) for kind in ("routed", "mixed")]
    assert kinds == ["routed", "mixed"] and set(loops + kinds) == set(blocks.LOOPS)


@pytest.mark.parametrize("kind, batch, length, window, parts", [
    ("all", 1, 2_048, 512, (4, 4)), ("all", 2, 2_048, 512, (2, 2)), ("all", 4, 2_048, 512, (1, 1)),
    ("all", 1, 32_768, 1_024, (1, 1)), ("all", 1, 16_384, 4_096, (4, 4)), ("all", 1, 32_768, 4_096, (2, 2)),
    ("all", 1, 65_536, 4_096, (1, 1)), ("all", 1, 16_384, 8_192, (2, 2)), ("all", 4, 4_096, 2_048, (2, 2)),
    ("all", 1, 4_096, None, (4, 4)), ("routed", 4, 2_048, None, (2, 2)), ("mixed", 1, 8_192, 512, (2, 2)),
    ("all", 8, 2_048, None, (2, 1)), ("routed", 1, 32_768, None, (1, 1)),
])
def test_how_many_programs_share_a_block_of_keys(kind, batch, length, window, parts):
    found = tuple(parts_of(Spec(kind, length, heads, 2, width, window), Block(64, 64, 4, 2), batch)
                  for width, heads in ((64, 14), (128, 12)))
    assert found == parts


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package to compile")
@pytest.mark.parametrize("arch", blocks.SHARED_MEMORY)
def test_the_compiler_needs_no_more_shared_memory_than_we_say_and_spills_nothing_for_ada(arch):
    for row in report(arch):
        assert row["shared_bytes"] <= row["bound"] <= row["limit"], row
        assert row["spilled_bytes"] == 0 or arch == "sm_90", row  # sm_90's tiles were timed, spills and all


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package to compile")
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32), ids=("bfloat16", "float32"))
def test_calls_with_the_most_sinks_fit_an_ada_card(dtype):
    for row in report("sm_89", dtype, MAX_SINKS, ("window", "mixed")):
        assert row["shared_bytes"] <= row["bound"] <= row["limit"], row
