"""From joined projections to rotated queries and keys and to values, and back, as one Pallas kernel each way.

XLA makes a pass of each part and of the bias's gradient, and the slow one of them fuses a sum over tokens into the
rotation. Here each element is read and written once: `BLOCK` tokens of one head a program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from l2a_jax.attention.kernels.launch import launch, pl, plt
from l2a_jax.attention.kernels.tile import HeadsRef, KeysRef, Number

BLOCK = 64  # tokens of a head

Table = tuple[Float[Array, "B T h"], Float[Array, "B T h"]]
Parts = tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]
Halves = tuple[Float[Array, "tokens h"], Float[Array, "tokens h"]]
JoinedRef = Float[Any, "B T M H"]
TableRef = Float[Any, "B T h"]


def split(
    joined: Float[Array, "B T M H"], bias: Float[Array, "M H"], table: Table, kv_heads: int, *, interpret: bool = False
) -> Parts:
    """(q, k, v) of joined + bias, whose heads lie side by side in this order, M = N + 2K; q and k rotated by `table`,
    cos and sin."""
    batch, length, total, width = joined.shape
    shapes = [jax.ShapeDtypeStruct((batch, length, heads, width), joined.dtype)
              for heads in (total - 2 * kv_heads, kv_heads, kv_heads)]
    return tuple(launch(functools.partial(_split_kernel, length=length), "l2a_split_heads", shapes,
                        (total, pl.cdiv(length, BLOCK), batch), warps=4, interpret=interpret)(joined, bias, *table))


def join(parts: Parts, table: Table, *, interpret: bool = False) -> tuple[Float[Array, "B T M H"], Float[Array, "M H"]]:
    """The transpose of `split`: gradients of its first two arguments, the bias's in float32."""
    batch, length, _, width = parts[0].shape
    total, tiles = sum(part.shape[2] for part in parts), pl.cdiv(length, BLOCK)
    shapes = (jax.ShapeDtypeStruct((batch, length, total, width), parts[0].dtype),
              jax.ShapeDtypeStruct((batch, tiles, total, width), jnp.float32))
    joined, sums = launch(functools.partial(_join_kernel, length=length), "l2a_join_heads", shapes,
                          (total, tiles, batch), warps=4, interpret=interpret)(*parts, *table)
    return joined, jnp.sum(sums, axis=(0, 1))


def _split_kernel(joined: JoinedRef, bias: Float[Any, "M H"], cos: TableRef, sin: TableRef, q: HeadsRef, k: KeysRef,
                  v: KeysRef, *, length: int) -> None:
    head, half = pl.program_id(0), cos.shape[2]
    tokens = _Tokens(length)
    halves = tuple(tokens.load(joined, head, at) + bias[head, at].astype(jnp.float32)[None, :] for at in _halves(half))

    def write(part, number, rotated):
        tokens.store(part, number, tokens.rotate(halves, cos, sin, 1.0) if rotated else halves)

    _for_own_part((q, k, v), head, write)


def _join_kernel(q: HeadsRef, k: KeysRef, v: KeysRef, cos: TableRef, sin: TableRef, joined: JoinedRef,
                 sums: Float[Any, "B C M H"], *, length: int) -> None:
    head, half = pl.program_id(0), cos.shape[2]
    tokens = _Tokens(length)

    def write(part, number, rotated):
        halves = tuple(tokens.load(part, number, at) for at in _halves(half))
        halves = tokens.rotate(halves, cos, sin, -1.0) if rotated else halves  # orthogonal: the transpose turns back
        tokens.store(joined, head, halves)
        for at, value in zip(_halves(half), halves, strict=True):
            sums[tokens.batch, tokens.block, head, at] = jnp.sum(value, axis=0)

    _for_own_part((q, k, v), head, write)


def _for_own_part(parts: tuple[HeadsRef, KeysRef, KeysRef], head: Number, write: Callable[..., None]) -> None:
    """`write(part, its head, rotated)` for the one part of q, k, v that the program's head belongs to."""
    start = 0
    for part, rotated in zip(parts, (True, True, False), strict=True):
        end = start + part.shape[2]
        pl.when((head >= start) & (head < end))(functools.partial(write, part, head - start, rotated))
        start = end


def _halves(half: int) -> tuple[Any, Any]:
    return pl.ds(0, half), pl.ds(half, half)


class _Tokens:
    """The program's tokens: loads as float32 (those beyond the end read as 0) and stores."""

    def __init__(self, length: int):
        self.block, self.batch = pl.program_id(1), pl.program_id(2)
        start = self.block * BLOCK
        self.here = pl.ds(start, BLOCK)
        self.inside = (start + jnp.arange(BLOCK) < length)[:, None]

    def load(self, ref: Float[Any, "B T ..."], *at: Any) -> Float[Array, "tokens h"]:
        return plt.load(ref.at[(self.batch, self.here, *at)], mask=self.inside, other=0.0).astype(jnp.float32)

    def rotate(self, halves: Halves, cos: TableRef, sin: TableRef, sign: float) -> Halves:
        cos, sin = self.load(cos, slice(None)), self.load(sin, slice(None)) * sign
        first, second = halves
        return first * cos - second * sin, second * cos + first * sin

    def store(self, ref: JoinedRef, head: Number, halves: Halves) -> None:
        for at, value in zip(_halves(ref.shape[3] // 2), halves, strict=True):
            plt.store(ref.at[self.batch, self.here, head, at], value.astype(ref.dtype), mask=self.inside)
