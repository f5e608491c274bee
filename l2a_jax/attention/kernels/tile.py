"""What the three kernels share: the keys that a tile of rows may see, loads at the edges, and loops over blocks.

Scores are kept in base 2 (exp2 is one instruction). A row that sees nothing has log-sum-exp `DEAD`, so that its
weights vanish without a mask, in the backward pass too.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2a_jax.attention.kernels.launch import pl, plt
from l2a_jax.attention.kernels.plan import Plan, Spec
from l2a_jax.attention.rows import Rows

LOG2_E = 1.4426950408889634
FLOOR = -1e30  # where a maximum starts: finite, so that hidden scores, -inf, leave no NaN before any visible one
DEAD = 1e30
FAR = 2**30


class Limits(NamedTuple):
    """`Rows` of one tile, with its extremes: every live row sees low_max..high_min, none sees outside
    low_min..high_max but the sinks."""

    low: jax.Array | None
    high: jax.Array
    sink_low: jax.Array | None
    sink_high: jax.Array | None
    low_min: jax.Array
    low_max: jax.Array
    high_min: jax.Array
    high_max: jax.Array


def tile_tokens(spec: Spec, index, batch, start, size: int, count):
    """(tokens, which of them exist) of rows start..start + size - 1 of the working order, of which `count` exist.

    In an order of their own, rows that nobody has are token -1.
    """
    rows = start + jnp.arange(size)
    if index is None:
        return rows, rows < count
    tokens = plt.load(index.at[batch, pl.ds(start, size)], mask=rows < count, other=-1)
    return tokens, tokens >= 0


def row_limits(spec: Spec, limits: Rows | None, batch, tokens, exist) -> Rows:
    """What each row of a tile sees; a row that does not exist has high = -1."""

    def column(ref, other):
        return plt.load(ref.at[batch, _in_range(tokens)], mask=exist, other=other)

    if limits is None:
        low = None if spec.window is None else jnp.maximum(tokens - (spec.window - 1), 0)
        sinks = (jnp.zeros_like(tokens), jnp.minimum(low, spec.sinks)) if spec.sinks else (None, None)
        return Rows(low, tokens, *sinks)
    high = tokens if limits.high is None else column(limits.high, -1)
    low = column(limits.low, 0) if spec.bounded_below else None
    sinks = (column(limits.sink_low, 0), column(limits.sink_high, 0)) if spec.sinks else (None, None)
    return Rows(low, high, *sinks)


def grid(heads: int, tiles: int, batch: int, *, interleave: bool) -> tuple[int, int, int]:
    """One program per head, tile and sequence. `interleave`: the sequences' first tiles, then their second ones, ...

    Programs start in this order. Where tiles differ in their work, sequence after sequence would start long programs
    last, and give one multiprocessor the same place in several sequences; tiles of equal work are better off beside
    their neighbours, with which they share what they load. Full attention's rows measured better so, too.
    """
    return (heads, batch, tiles) if interleave else (heads, tiles, batch)


def program(*, interleave: bool):
    """This program's (head, tile, sequence)."""
    head, *others = (pl.program_id(i) for i in range(3))
    return (head, *(reversed(others) if interleave else others))


def tile_limits(spec: Spec, plan: Plan, batch, tokens, exist, start, size: int) -> Limits:
    """`row_limits` with their extremes."""
    rows = row_limits(spec, plan.limits, batch, tokens, exist)
    zero = jnp.int32(0)
    if spec.explicit or spec.ordered:
        alive = rows.high >= 0
        low_min = zero if rows.low is None else jnp.min(jnp.where(alive, rows.low, FAR))
        low_max = zero if rows.low is None else jnp.max(jnp.where(alive, rows.low, 0))
        return Limits(*rows, low_min, low_max, jnp.min(jnp.where(alive, rows.high, FAR)), jnp.max(rows.high))
    last = start + size - 1
    low_min = low_max = zero
    if spec.window is not None:
        back = spec.window - 1
        low_min, low_max = jnp.maximum(start - back, 0), jnp.maximum(last - back, 0)
    return Limits(*rows, low_min, low_max, start, jnp.minimum(last, spec.length - 1))


def key_bounds(limits: Limits, keys: int):
    """Blocks of keys (begin, full_begin, full_end, end) that a tile of rows visits; full ones need no mask."""
    begin, end = limits.low_min // keys, limits.high_max // keys + 1
    full_begin = jnp.clip((limits.low_max + keys - 1) // keys, begin, end)
    full_end = jnp.clip((limits.high_min + 1) // keys, full_begin, end)
    return begin, full_begin, full_end, end


def sweep(bounds, step, carry, *, flat: bool, bounded_below: bool):
    """carry = step(block, carry, edge) for the blocks of `bounds`; `edge` says whether a mask is due.

    Blocks without a mask come first, then both edges in one loop: every loop fills the pipeline of loads anew.
    """
    begin, full_begin, full_end, end = (uniform(bound) for bound in bounds)
    if flat:
        return jax.lax.fori_loop(
            begin, end, lambda i, carry: step(i, carry, (i < full_begin) | (i >= full_end)), carry)
    carry = jax.lax.fori_loop(full_begin, full_end, lambda i, carry: step(i, carry, False), carry)
    if not bounded_below:
        return jax.lax.fori_loop(full_end, end, lambda i, carry: step(i, carry, True), carry)
    return jax.lax.fori_loop(begin, end - (full_end - full_begin), lambda i, carry: step(
        jnp.where(i < full_begin, i, i + (full_end - full_begin)), carry, True), carry)


def uniform(number):
    """`number`, in a form that tells the compiler that all threads agree on it: the maximum over a warp.

    Bounds that come from memory or from a reduction over the tile hide that. The loop then counts in ordinary
    registers, and moves two of them to the matrix unit's before every product (33 moves a step of a routed call).
    """
    return jnp.max(jnp.full((32,), number))


def sink_sweep(spec: Spec, limits: Limits, step, carry):
    """carry = step(first_key, carry) for blocks of `sink_block(spec)` keys that cover every sink of the tile."""
    keys = sink_block(spec)
    if not spec.segmented:
        count = uniform((jnp.max(limits.sink_high) + keys - 1) // keys)
        return jax.lax.fori_loop(0, count, lambda i, carry: step(i * keys, carry), carry)

    def following(key):  # the first sink of any row at or after `key`
        candidate = jnp.maximum(limits.sink_low, key)
        return jnp.min(jnp.where(candidate < limits.sink_high, candidate, FAR))

    def body(state):
        key, carry = state
        return following(key + keys), step(key, carry)

    return jax.lax.while_loop(lambda state: state[0] < FAR, body, (following(0), carry))[1]


def sink_block(spec: Spec) -> int:
    """Sinks visited at a time: a power of two that the matrix unit accepts."""
    return min(64, max(16, pl.next_power_of_2(spec.sinks)))


def weigh(scores, scale: float, shift, interpret: bool):
    """exp2(scores * scale - shift), by one fused multiply-add and one exponential.

    XLA neither fuses the product with the difference nor lets exp2 drop subnormal results, which would take eight
    instructions a score; interpret mode has no rule for assembly. The product is not rounded but `shift` is: sound for
    |scores * scale| up to 2^28, where half a unit in the last place is a factor of 2^16.
    """
    if interpret:
        return jnp.exp2(scores * scale - shift)
    factor = struct.pack(">f", scale).hex()
    result, = plt.elementwise_inline_asm(
        f"fma.rn.f32 $0, $1, 0f{factor}, $2; ex2.approx.ftz.f32 $0, $0;", constraints="=f,f,f", pack=1,
        args=(scores, jnp.broadcast_to(-shift, scores.shape)),
        result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, jnp.float32)])
    return result


def hide(scores, visible, edge):
    """Scores with the invisible ones at -inf, where this is an edge block; an interior block computes no mask."""
    if isinstance(edge, bool):
        return jnp.where(visible(), scores, -jnp.inf) if edge else scores
    return jax.lax.cond(edge, lambda scores: jnp.where(visible(), scores, -jnp.inf), lambda scores: scores, scores)


def see(low, high, keys):
    """low <= keys <= high; `low` None: no lower bound."""
    return keys <= high if low is None else (low <= keys) & (keys <= high)


def load_tokens(ref, batch, start, size, head, limit=None):
    """Tokens start..start + size - 1 of ref [B, T, heads, H]; those from `limit` on read as 0."""
    at = ref.at[batch, pl.ds(start, size), head, :]
    if limit is None:
        return plt.load(at)
    return plt.load(at, mask=(start + jnp.arange(size) < limit)[:, None], other=0.0)


def gathered(ref, batch, tokens, head):
    """The view ref[batch, tokens, head, :] for a vector of token numbers, to be used under a mask of those that exist.
    """
    shape = (tokens.shape[0], ref.shape[3])
    columns = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return ref.at[batch, jnp.broadcast_to(_in_range(tokens)[:, None], shape), head, columns]


def _in_range(tokens):
    """Token -1 as a number beyond every array: interpret mode drops such a store, but would wrap -1 around. A bit
    operation, because Triton's layout pass (3.6) fails on a select of tokens that feeds another select."""
    return tokens & 0x7FFFFFFF


def dot(a, b, trans_a=False, trans_b=False):
    """Matrix product with float32 sums; float32 inputs keep their precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plt.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=precision)
