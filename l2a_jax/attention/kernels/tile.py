"""What the kernels share: the keys that a tile of rows may see, their weights, and loads at the edges.

Scores are kept in base 2 (exp2 is one instruction). A row that sees nothing has log-sum-exp `DEAD`, so that its
weights vanish without a mask, in the backward pass too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from l2a_jax.attention.kernels.launch import pl, plt
from l2a_jax.attention.kernels.plan import Spec
from l2a_jax.attention.rows import Rows

LOG2_E = 1.4426950408889634
FLOOR = -1e30  # where a maximum starts: finite, so that hidden scores, -inf, leave no NaN before any visible one
DEAD = 1e30
FAR = 2**30

Number = Int[Array, ""]
HeadsRef = Float[Any, "B Q N H"]
KeysRef = Float[Any, "B T K H"]
NumbersRef = Float[Any, "B N R"]  # one for every row of the working order and query head
Tokens = Int[Array, " rows"]
Exist = Bool[Array, " rows"]


def tile_tokens(spec: Spec, index: Int[Any, "B R"] | None, batch: Number, start: Number, size: int, count: Number | int
                ) -> tuple[Tokens, Exist]:
    """(tokens, which of them exist) of rows start..start + size - 1 of the working order, of which `count` exist.

    In an order of their own, rows that nobody has are token -1.
    """
    rows = start + jnp.arange(size)
    if index is None:
        return rows, rows < count
    tokens = plt.load(index.at[batch, pl.ds(start, size)], mask=rows < count, other=-1)
    return tokens, tokens >= 0


def row_limits(spec: Spec, limits: Rows | None, batch: Number, tokens: Tokens, exist: Exist) -> Rows:
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


def program(*, interleave: bool) -> tuple[Number, Number, Number]:
    """This program's (head, tile, sequence)."""
    head, *others = (pl.program_id(i) for i in range(3))
    return (head, *(reversed(others) if interleave else others))


def weigh(scores: Float[Array, "R C"], spec: Spec, shift: Float[Array, "#R #C"]) -> Float[Array, "R C"]:
    """exp2(scores * scale - shift), with the scale in base 2, by one fused multiply-add and one exponential.

    XLA neither fuses the product with the difference nor lets exp2 drop subnormal results, which would take eight
    instructions a score; interpret mode has no rule for assembly. The product is not rounded but `shift` is: sound for
    |scores * scale| up to 2^28, where half a unit in the last place is a factor of 2^16.
    """
    scale = spec.scale * LOG2_E
    if spec.interpret:
        return jnp.exp2(scores * scale - shift)
    factor = struct.pack(">f", scale).hex()
    result, = plt.elementwise_inline_asm(
        f"fma.rn.f32 $0, $1, 0f{factor}, $2; ex2.approx.ftz.f32 $0, $0;", constraints="=f,f,f", pack=1,
        args=(scores, jnp.broadcast_to(-shift, scores.shape)),
        result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, jnp.float32)])
    return result


def hide(scores: Float[Array, "R C"], visible: Callable[[], Bool[Array, "R C"]], edge: bool | Bool[Array, ""]
         ) -> Float[Array, "R C"]:
    """Scores with the invisible ones at -inf, where this is an edge block; an interior block computes no mask."""
    if isinstance(edge, bool):
        return jnp.where(visible(), scores, -jnp.inf) if edge else scores
    return jax.lax.cond(edge, lambda scores: jnp.where(visible(), scores, -jnp.inf), lambda scores: scores, scores)


def see(low: Int[Array, "#R #C"] | None, high: Int[Array, "#R #C"], keys: Int[Array, "#R #C"]) -> Bool[Array, "R C"]:
    """low <= keys <= high; `low` None: no lower bound."""
    return keys <= high if low is None else (low <= keys) & (keys <= high)


def load_tokens(ref: Float[Any, "B T M H"], batch: Number, start: Number, size: int, head: Number,
                limit: Number | int | None = None) -> Float[Array, "{size} H"]:
    """Tokens start..start + size - 1 of ref [B, T, heads, H]; those from `limit` on read as 0."""
    at = ref.at[batch, pl.ds(start, size), head, :]
    if limit is None:
        return plt.load(at)
    return plt.load(at, mask=(start + jnp.arange(size) < limit)[:, None], other=0.0)


def gathered(ref: HeadsRef, batch: Number, tokens: Tokens, head: Number) -> Any:
    """The view ref[batch, tokens, head, :], to be used under a mask of the tokens that exist."""
    shape = (tokens.shape[0], ref.shape[3])
    columns = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return ref.at[batch, jnp.broadcast_to(_in_range(tokens)[:, None], shape), head, columns]


def _in_range(tokens: Tokens) -> Tokens:
    """Token -1 as a number beyond every array: interpret mode drops such a store, but would wrap -1 around. A bit
    operation, because Triton's layout pass (3.6) fails on a select of tokens that feeds another select."""
    return tokens & 0x7FFFFFFF


def dot(a: Float[Array, "_ _"], b: Float[Array, "_ _"], trans_b: bool = False) -> Float[Array, "_ _"]:
    """Matrix product with float32 sums; float32 inputs keep their precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plt.dot(a, b, trans_b=trans_b, precision=precision)
