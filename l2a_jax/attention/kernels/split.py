"""Few routed rows, many keys: each tile's keys are shared among several programs, whose results are then joined.

Without this a call with 5 % of 32,768 rows has 13 tiles a head, too few to fill a large GPU, and each walks over all
keys alone (compare Flash-Decoding). How many programs share a tile follows from the number of routed rows, which only
the device knows; the number of places for programs is fixed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from l2a_jax.attention.kernels import tile as t
from l2a_jax.attention.kernels.launch import launch, pl, plt
from l2a_jax.attention.kernels.plan import Block, Plan, Spec
from l2a_jax.attention.kernels.tile import HeadsRef, Number, NumbersRef
from l2a_jax.attention.reference import Heads

PROGRAMS = 1_056  # about eight per multiprocessor of an H100; beyond that many tiles, none is shared
MAX_PARTS = 32
Shares = tuple[Float[Any, "B N places ..."], ...]


def places(spec: Spec, batch: int) -> int:
    """Programs per head and sequence that may share tiles; 0 where tiles are never shared."""
    return max(PROGRAMS // (spec.heads * batch), 1) if spec.kind == "routed" else 0


def part_shapes(spec: Spec, block: Block, batch: int) -> list[jax.ShapeDtypeStruct]:
    """Room for the shares: values [B, N, places * rows, H], and of forward ones the maxima and the sums of weights
    [B, N, places * rows]."""
    shape = (batch, spec.heads, places(spec, batch) * block.rows)
    return [jax.ShapeDtypeStruct((*shape, *width), jnp.float32) for width in ((spec.width,), (), ())]


def assignment(number: Number, count: Number, size: int, room: int
               ) -> tuple[Bool[Array, ""], Number, Number, Number]:
    """(is there work, tile, part, parts) of the program `number` of a head and sequence with `count` rows."""
    tiles = jnp.maximum((count + size - 1) // size, 1)
    parts = jnp.clip(room // tiles, 1, MAX_PARTS)
    # The last rows see the most keys: they start first, so that no long program is left at the end.
    tile = tiles - 1 - jax.lax.rem(number, tiles)
    return (number < tiles * parts) & (count > 0), tile, jax.lax.div(number, tiles), parts


def part_bounds(bounds: tuple[Number, ...], part: Number, parts: Number) -> tuple[Number, ...]:
    """The part's own blocks of keys out of `row_tiles`."""
    begin, end = bounds[0], bounds[3]
    blocks = jnp.maximum(end - begin, 0)
    low, high = begin + blocks * part // parts, begin + blocks * (part + 1) // parts
    return tuple(jnp.clip(bound, low, high) for bound in bounds)


def join(spec: Spec, block: Block, plan: Plan, whole: Heads, lse: Float[Array, "B N R"], shares: Shares
         ) -> tuple[Heads, Float[Array, "B N R"]]:
    """(whole, lse) completed by the tiles that were shared, of `part_shapes`. Shares that are values alone are
    gradients, which add up (and lse stays as it is); else they are weighted sums of values, maxima, and sums of
    weights, both sums relative to the maxima.

    Not outputs and log-sum-exps: of scores near 2^20 a log-sum-exp in float32 tells the weights to 4 % only.
    """
    batch = whole.shape[0]
    room = places(spec, batch)
    return tuple(launch(
        functools.partial(_kernel, spec=spec, block=block, room=room),
        "l2a_attention_join", [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (whole, lse)],
        (spec.heads, max(room // 2, 1), batch), warps=8, interpret=spec.interpret, aliases={0: 0, 1: 1},
    )(whole, lse, shares, plan.index, plan.count))


def _kernel(
    whole_in: HeadsRef, lse_in: NumbersRef, shares: Shares, index: Int[Any, "B R"], counts: Int[Any, " B"],
    whole_ref: HeadsRef, lse_ref: NumbersRef, *, spec: Spec, block: Block, room: int,
) -> None:
    del whole_in, lse_in
    values_ref, *weights = shares
    head, batch = pl.program_id(0), pl.program_id(2)
    count = counts[batch]
    is_work, tile, first, parts = assignment(pl.program_id(1), count, block.rows, room)
    tiles = (count + block.rows - 1) // block.rows
    start = tile * block.rows

    def one(part, carry):
        top, total, out = carry
        place = pl.ds((part * tiles + tiles - 1 - tile) * block.rows, block.rows)
        values = values_ref[batch, head, place, :]
        if not weights:
            return top, total, out + values
        tops_ref, totals_ref = weights
        part_top = tops_ref[batch, head, place]
        new_top = jnp.maximum(top, part_top)
        shrink, weight = jnp.exp2(top - new_top), jnp.exp2(part_top - new_top)
        total = total * shrink + totals_ref[batch, head, place] * weight
        return new_top, total, out * shrink[:, None] + values * weight[:, None]

    @pl.when(is_work & (first == 0) & (parts > 1))
    def _():
        tokens, exist = t.tile_tokens(spec, index, batch, start, block.rows, count)
        zeros = jnp.zeros((block.rows,), jnp.float32)
        carry = (zeros + t.FLOOR, zeros, jnp.zeros((block.rows, spec.width), jnp.float32))
        top, total, out = jax.lax.fori_loop(0, parts, one, carry)
        if weights:
            total = jnp.where(exist, total, 1.0)
            out = out / total[:, None]
            here = pl.ds(start, block.rows)
            inside = start + jnp.arange(block.rows) < spec.rows
            plt.store(lse_ref.at[batch, head, here], jnp.where(exist, top + jnp.log2(total), t.DEAD), mask=inside)
        plt.store(t.gathered(whole_ref, batch, tokens, head), out.astype(whole_ref.dtype), mask=exist[:, None])
