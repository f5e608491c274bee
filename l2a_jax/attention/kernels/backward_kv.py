"""Backward kernel for keys and values: one program per block of keys and key head, over the rows that see it.

The program loops over the query heads of its group, so nothing is repeated in memory and nothing is added up
afterwards. Scores are kept transposed (keys x rows): each product then takes its left factor from registers. Sinks are
not seen here; they have a kernel of their own (`sinks`), because every row of a document sees them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l2a_jax.attention.kernels import split
from l2a_jax.attention.kernels import tile as t
from l2a_jax.attention.kernels.launch import launch, pl, plt
from l2a_jax.attention.kernels.plan import Block, Plan, Spec, row_ranges
from l2a_jax.attention.kernels.tile import Number, NumbersRef
from l2a_jax.attention.reference import Keys

# Up to how many programs, in units of `split.PROGRAMS`, four and then two of them share a block of keys: by the times
# of 76 calls on an H100 (`eval/results/shares.json`). "even": every block has the same work; "long": the same, windows
# of 4,096 keys and more; "uneven": the first keys are seen by most rows; "wide": the same at head width 128.
SHARED = {"even": (1 / 16, 1 / 8), "long": (1 / 2, 1), "uneven": (1 / 8, 1 / 2), "wide": (1 / 8, 1 / 4)}


def parts_of(spec: Spec, block: Block, batch: int) -> int:
    """Programs that share a block of keys: where few blocks would leave a large GPU idle behind the longest."""
    work = "wide" if spec.width > 64 and not _windowed(spec) else "uneven"
    if _windowed(spec) and 2 * spec.window < spec.length:
        work = "long" if spec.window >= 4_096 else "even"
    programs = spec.kv_heads * pl.cdiv(spec.length, block.keys) * batch
    return next((parts for parts, most in zip((4, 2), SHARED[work], strict=True)
                 if programs <= most * split.PROGRAMS), 1)


def _windowed(spec: Spec) -> bool:
    return spec.kind == "all" and spec.window is not None


def backward_kv(
    spec: Spec, block: Block, q: Float[Array, "B R N H"], k: Keys, v: Keys, plan: Plan, lse: Float[Array, "B N R"],
    delta: Float[Array, "B N R"], d_out: Float[Array, "B R N H"], *, parts: int | None = None,
) -> tuple[Keys, Keys]:
    """(dk, dv) without the sinks' share. q, dO, lse and delta are in working order.

    `parts`: programs that share a block of keys, in place of `parts_of`.
    """
    batch = k.shape[0]
    tables = (row_ranges(spec, plan, batch, block.keys), plan.for_rows)
    parts = parts_of(spec, block, batch) if parts is None else parts
    shapes = [jax.ShapeDtypeStruct((parts, *x.shape), jnp.float32 if parts > 1 else x.dtype) for x in (k, v)]
    shares = launch(
        functools.partial(_kernel, spec=spec, block=block, parts=parts),
        "l2a_attention_backward_kv", shapes,
        t.grid(spec.kv_heads, pl.cdiv(spec.length, block.keys) * parts, batch, interleave=not _windowed(spec)),
        warps=block.num_warps, stages=block.num_stages, interpret=spec.interpret,
    )(q, k, v, lse, delta, d_out, tables)
    return tuple(share[0] if parts == 1 else jnp.sum(share, axis=0).astype(x.dtype)
                 for share, x in zip(shares, (k, v), strict=True))


def _kernel(
    q_ref: Float[Any, "B R N H"], k_ref: Float[Any, "B T K H"], v_ref: Float[Any, "B T K H"], lse_ref: NumbersRef,
    delta_ref: NumbersRef, d_out_ref: Float[Any, "B R N H"], tables: tuple, d_k_ref: Float[Any, "parts B T K H"],
    d_v_ref: Float[Any, "parts B T K H"], *, spec: Spec, block: Block, parts: int,
) -> None:
    ranges, plan = tables
    kv_head, program, batch = t.program(interleave=not _windowed(spec))
    block_number, part = jax.lax.div(program, parts), jax.lax.rem(program, parts)
    first = block_number * block.keys
    number = first + jnp.arange(block.keys)
    ragged = spec.length % block.keys != 0
    keys = t.load_tokens(k_ref, batch, first, block.keys, kv_head, spec.length if ragged else None)
    values = t.load_tokens(v_ref, batch, first, block.keys, kv_head, spec.length if ragged else None)
    limit = spec.rows if plan.count is None else plan.count[batch]
    # Rows beyond the end must read as 0, but only a ragged last tile has any.
    may_end = plan.count is not None or spec.rows % block.rows != 0

    def visit(head, row_tile, carry, edge):
        start = row_tile * block.rows
        end = limit if may_end and edge is not False else None
        query = t.load_tokens(q_ref, batch, start, block.rows, head, end)
        d_out = t.load_tokens(d_out_ref, batch, start, block.rows, head, end)
        lse = _load_row(lse_ref, batch, head, start, block.rows, end, t.DEAD)
        delta = _load_row(delta_ref, batch, head, start, block.rows, end, 0.0)

        def visible():
            rows = t.row_limits(spec, plan.limits, batch, *t.tile_tokens(
                spec, plan.index, batch, start, block.rows, limit))
            low = None if rows.low is None else rows.low[None, :]
            return t.see(low, rows.high[None, :], number[:, None])

        d_keys, d_values = carry
        scores = t.hide(t.dot(keys, query, trans_b=True), visible, edge)
        weights = t.weigh(scores, spec, lse[None, :])
        d_values += t.dot(weights.astype(d_out.dtype), d_out)
        d_weights = t.dot(values, d_out, trans_b=True)
        d_scores = weights * (d_weights - delta[None, :])
        d_keys += t.dot(d_scores.astype(query.dtype), query)
        return d_keys, d_values

    zeros = jnp.zeros((block.keys, spec.width), jnp.float32)
    carry = (zeros, zeros)
    for group in range(2 if spec.kind == "mixed" else 1):
        bounds = _tile_bounds(spec, block, ranges, batch, block_number, group)
        carry = _over_heads(spec, kv_head * spec.group_size, bounds, visit, carry, part, parts)
    d_keys, d_values = carry
    for ref, value in ((d_k_ref, d_keys * spec.scale), (d_v_ref, d_values)):
        at = ref.at[part, batch, pl.ds(first, block.keys), kv_head, :]
        plt.store(at, value.astype(ref.dtype), mask=(number < spec.length)[:, None] if ragged else None)


def _over_heads(spec: Spec, first_head: Number, bounds: tuple[Number, ...], visit: Callable, carry: Any, part: Number,
                parts: int) -> Any:
    """Interior tiles of all heads, then the tiles of both edges of all heads: two loops in all, so that the pipeline of
    loads is filled twice and not twice per head. A part takes its share of each loop."""
    begin, full_begin, full_end, end = bounds
    interior = full_end - full_begin

    def skip(i):  # the number of an edge tile, counted without the interior
        return begin + i + jnp.where(begin + i < full_begin, 0, interior)

    for count, tile, edge in ((interior, lambda i: full_begin + i, False), (end - begin - interior, skip, True)):
        # The load pipeline divides before it knows whether there is a first step. A division by zero there is
        # undefined: the compiler then takes it that there is one, and loads from wherever the quotient points.
        tiles = jnp.maximum(count, 1)

        def step(i, carry, tiles=tiles, tile=tile, edge=edge):
            return visit(first_head + jax.lax.div(i, tiles), tile(jax.lax.rem(i, tiles)), carry, edge)

        total = count * spec.group_size
        carry = jax.lax.fori_loop(total * part // parts, total * (part + 1) // parts, step, carry)
    return carry


def _tile_bounds(spec: Spec, block: Block, ranges: Int[Any, "B M C"] | None, batch: Number, block_number: Number,
                 group: int) -> tuple[Number, ...]:
    """Tiles of rows (begin, full_begin, full_end, end) that visit a block of keys; full ones need no mask."""
    if ranges is None:
        first = block_number * block.keys
        last = jnp.minimum(first + block.keys, spec.length) - 1
        window = spec.length if spec.window is None else spec.window
        end_rows, full_end_rows = (jnp.minimum(row + window, spec.length) for row in (last, first))
        rows = (first, last, full_end_rows, end_rows)
    else:
        rows = [ranges[batch, block_number, 4 * group + i] for i in range(4)]
    begin, full_begin, full_end, end = rows
    size = block.rows
    first_tile = begin // size
    last_tile = jnp.maximum((end + size - 1) // size, first_tile)
    full_first = jnp.clip((full_begin + size - 1) // size, first_tile, last_tile)
    return first_tile, full_first, jnp.clip(full_end // size, full_first, last_tile), last_tile


def _load_row(ref: NumbersRef, batch: Number, head: Number, start: Number, size: int, limit: Number | int | None,
              other: float) -> Float[Array, " {size}"]:
    at = ref.at[batch, head, pl.ds(start, size)]
    return plt.load(at) if limit is None else plt.load(at, mask=start + jnp.arange(size) < limit, other=other)
