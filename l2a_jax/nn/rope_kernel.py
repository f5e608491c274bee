"""From joined projections to rotated queries and keys and to values, and back, as one Pallas kernel each way.

XLA makes a pass of each part and of the bias's gradient, and the slow one of them fuses a sum over tokens into the
rotation. Here each element is read and written once: `BLOCK` tokens of one head a program.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from l2a_jax.attention.kernels.launch import launch, pl, plt

BLOCK = 64  # tokens of a head

Table = tuple[Float[Array, "B T h"], Float[Array, "B T h"]]
Parts = tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]


def split(
    joined: Float[Array, "B T M H"], bias: Float[Array, "M H"], table: Table, kv_heads: int, *, interpret: bool = False
) -> Parts:
    """(q, k, v) of joined + bias, whose heads lie side by side in this order, M = N + 2K; q and k rotated by `table`,
    cos and sin."""
    batch, length, total, width = joined.shape
    shapes = [jax.ShapeDtypeStruct((batch, length, heads, width), joined.dtype)
              for heads in (total - 2 * kv_heads, kv_heads, kv_heads)]
    return tuple(_call("split", _split_kernel, shapes, joined.shape, (joined, bias, *table), interpret))


def join(parts: Parts, table: Table, *, interpret: bool = False) -> tuple[Float[Array, "B T M H"], Float[Array, "M H"]]:
    """The transpose of `split`: gradients of its first two arguments, the bias's in float32."""
    batch, length, _, width = parts[0].shape
    shape = (batch, length, sum(part.shape[2] for part in parts), width)
    sums = jax.ShapeDtypeStruct((batch, pl.cdiv(length, BLOCK), *shape[2:]), jnp.float32)
    joined, sums = _call("join", _join_kernel, (jax.ShapeDtypeStruct(shape, parts[0].dtype), sums), shape,
                         (*parts, *table), interpret)
    return joined, jnp.sum(sums, axis=(0, 1))


def _call(name, kernel, out_shape, joined_shape, inputs, interpret):
    batch, length, total, _ = joined_shape
    return launch(functools.partial(kernel, length=length), f"l2a_{name}_heads", out_shape,
                  (total, pl.cdiv(length, BLOCK), batch), warps=4, interpret=interpret)(*inputs)


def _split_kernel(joined, bias, cos, sin, q, k, v, *, length):
    head, half = pl.program_id(0), cos.shape[2]
    tokens = _Tokens(length)
    halves = [tokens.load(joined, head, at) + bias[head, at].astype(jnp.float32)[None, :] for at in _halves(half)]

    def write(part, number, rotated):
        tokens.store(part, number, tokens.rotate(halves, cos, sin, 1.0) if rotated else halves)

    _for_own_part((q, k, v), head, write)


def _join_kernel(q, k, v, cos, sin, joined, sums, *, length):
    head, half = pl.program_id(0), cos.shape[2]
    tokens = _Tokens(length)

    def write(part, number, rotated):
        halves = [tokens.load(part, number, at) for at in _halves(half)]
        halves = tokens.rotate(halves, cos, sin, -1.0) if rotated else halves  # orthogonal: the transpose turns back
        tokens.store(joined, head, halves)
        for at, value in zip(_halves(half), halves, strict=True):
            sums[tokens.batch, tokens.block, head, at] = jnp.sum(value, axis=0)

    _for_own_part((q, k, v), head, write)


def _for_own_part(parts, head, write):
    """`write(part, its head, rotated)` for the one part of q, k, v that the program's head belongs to."""
    start = 0
    for part, rotated in zip(parts, (True, True, False), strict=True):
        end = start + part.shape[2]
        pl.when((head >= start) & (head < end))(functools.partial(write, part, head - start, rotated))
        start = end


def _halves(half):
    return pl.ds(0, half), pl.ds(half, half)


class _Tokens:
    """The program's tokens: loads as float32 (those beyond the end read as 0) and stores."""

    def __init__(self, length: int):
        self.block, self.batch = pl.program_id(1), pl.program_id(2)
        start = self.block * BLOCK
        self.here = pl.ds(start, BLOCK)
        self.inside = (start + jnp.arange(BLOCK) < length)[:, None]

    def load(self, ref, *at):
        return plt.load(ref.at[(self.batch, self.here, *at)], mask=self.inside, other=0.0).astype(jnp.float32)

    def rotate(self, halves, cos, sin, sign):
        cos, sin = self.load(cos, slice(None)), self.load(sin, slice(None)) * sign
        first, second = halves
        return first * cos - second * sin, second * cos + first * sin

    def store(self, ref, head, halves):
        for at, value in zip(_halves(ref.shape[3] // 2), halves, strict=True):
            plt.store(ref.at[self.batch, self.here, head, at], value.astype(ref.dtype), mask=self.inside)
