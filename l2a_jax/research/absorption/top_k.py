"""Which k of T keys: exact masks of the largest scores, ties going to the earlier key.

`by_sort` finds the k-th largest score by sorting. `by_bisection` finds it bit by bit in registers and is what a GPU
runs: one pass over memory, where a sort makes dozens.
k is an array, so that one compiled program serves every k.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from l2a_jax.attention.kernels.launch import launch, pl

ROWS = 4  # of scores in one program: 4 x 512 values are 16 registers a thread
LOWEST = -(2**31)


def by_sort(scores: Float[Array, "*S T"], k: Int[Array, ""] | int) -> Bool[Array, "*S T"]:
    """The mask from a sort along the keys."""
    length = scores.shape[-1]
    index = jnp.clip(length - jnp.asarray(k, jnp.int32), 0, length - 1)
    kth = jax.lax.dynamic_index_in_dim(jnp.sort(scores, axis=-1), index, axis=-1, keepdims=True)
    above, equal = scores > kth, scores == kth
    left = k - jnp.sum(above, axis=-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= left))


def ordered(scores: Float[Array, "*S"]) -> Int[Array, "*S"]:
    """float32 as int32 in the same order: negative numbers have their lower 31 bits turned over; -0 equals 0."""
    scores = scores.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def by_bisection(scores: Float[Array, "*S T"], k: Int[Array, ""] | int, interpret: bool = False
                 ) -> Bool[Array, "*S T"]:
    """The same by a Pallas kernel; T must be a power of two (Triton's blocks are)."""
    length = scores.shape[-1]
    if length & (length - 1):
        raise ValueError(f"the kernel takes a power of two of keys, not {length}")
    rows = ordered(scores).reshape(-1, length)
    padded = jnp.pad(rows, ((0, -rows.shape[0] % ROWS), (0, 0)))
    mask = launch(
        functools.partial(_kernel, length=length), "top_k_mask", jax.ShapeDtypeStruct(padded.shape, jnp.int8),
        (padded.shape[0] // ROWS,), warps=4, interpret=interpret,
        in_specs=[pl.BlockSpec((ROWS, length), lambda i: (i, 0)), pl.BlockSpec((1,), lambda i: (0,))],
        out_specs=pl.BlockSpec((ROWS, length), lambda i: (i, 0)),
    )(padded, jnp.asarray(k, jnp.int32).reshape(1))
    return (mask[: rows.shape[0]] != 0).reshape(scores.shape)


def _kernel(keys_ref, k_ref, mask_ref, *, length):
    keys, k = keys_ref[...], k_ref[0]

    def count(kept):
        return jnp.sum(kept.astype(jnp.int32), axis=1)

    def value_bit(index, threshold):
        # The largest threshold that at least k keys reach, from the sign bit down; int32 wraps as it should.
        candidate = threshold + jnp.left_shift(jnp.int32(1), 31 - index)
        return jnp.where(count(keys >= candidate[:, None]) >= k, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32, value_bit, jnp.full((ROWS,), LOWEST, jnp.int32))
    above, equal = keys > threshold[:, None], keys == threshold[:, None]
    left = k - count(above)
    place = jax.lax.broadcasted_iota(jnp.int32, (ROWS, length), 1)
    bits = length.bit_length()

    def place_bit(index, end):
        # The largest end before which at most `left` of the equal keys lie.
        candidate = end + jnp.left_shift(jnp.int32(1), bits - 1 - index)
        return jnp.where(count(equal & (place < candidate[:, None])) <= left, candidate, end)

    end = jax.lax.fori_loop(0, bits, place_bit, jnp.zeros((ROWS,), jnp.int32))
    mask_ref[...] = (above | (equal & (place < end[:, None]))).astype(jnp.int8)


def top_k_mask(scores: Float[Array, "*S T"], k: Int[Array, ""] | int) -> Bool[Array, "*S T"]:
    """True at the k largest of T scores (float32, finite or -inf), ties to the earlier key; no gradient."""
    scores = jax.lax.stop_gradient(scores)
    length = scores.shape[-1]
    if length & (length - 1):
        return by_sort(scores, k)
    # The choice is made when lowering, for the device that will run it.
    return jax.lax.platform_dependent(scores, jnp.asarray(k, jnp.int32), cuda=by_bisection, default=by_sort)
