"""How the tokens of a row are dealt over the axis "context": in stripes, in turn.

Stripe s belongs to shard s modulo the shards. Early tokens see few keys and late ones many, and routed tokens stand
together: stripes spread both.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

LARGEST = 128
"""Tokens of a stripe, at most: the most rows of a block of the kernels. Wider ones would be no quicker, and spread
routed tokens less."""


def stripe(length: int, shards: int) -> int:
    """Tokens of a stripe: the largest power of two up to `LARGEST` that gives every shard as many whole stripes.
    ValueError where the shards do not divide the tokens."""
    if length % shards:
        raise ValueError(f"{length} tokens cannot be dealt over {shards} shards")
    return math.gcd(length // shards, LARGEST)


def places(length: int, shards: int, shard: Any) -> Int[Array, " t"]:
    """The true numbers of the tokens of one shard (a number, or traced), ascending."""
    size = stripe(length, shards)
    first = (jnp.arange(length // shards // size, dtype=jnp.int32) * shards + shard) * size
    return (first[:, None] + jnp.arange(size, dtype=jnp.int32)).reshape(-1)


def dealt(x: Shaped[Array, "B T *rest"], axis_name: str) -> Shaped[Array, "B t *rest"]:
    """The part of a whole array that belongs to this shard of `axis_name`."""
    shards, length = jax.lax.axis_size(axis_name), x.shape[1]
    size = stripe(length, shards)
    striped = x.reshape(x.shape[0], -1, shards, size, *x.shape[2:])
    mine = jax.lax.dynamic_index_in_dim(striped, jax.lax.axis_index(axis_name), axis=2, keepdims=False)
    return mine.reshape(x.shape[0], length // shards, *x.shape[2:])


def joined(x: Shaped[Array, "B t *rest"], axis_name: str) -> Shaped[Array, "B T *rest"]:
    """The parts of all shards of `axis_name` as one array, its tokens in true order. Its transpose sums what each shard
    found for a token, and gives it to the shard whose token that is."""
    shards, length = jax.lax.axis_size(axis_name), x.shape[1] * jax.lax.axis_size(axis_name)
    striped = x.reshape(x.shape[0], -1, stripe(length, shards), *x.shape[2:])
    return jax.lax.all_gather(striped, axis_name, axis=2).reshape(x.shape[0], length, *x.shape[2:])


def held(tokens: Int[Array, "*S"], length: int, axis_name: str) -> tuple[Int[Array, "*S"], Bool[Array, "*S"]]:
    """Of tokens by their true numbers: where each stands among the `length` of its shard, and whether this is it."""
    shards = jax.lax.axis_size(axis_name)
    size = stripe(length * shards, shards)
    number, within = jnp.divmod(tokens, size)
    turn, owner = jnp.divmod(number, shards)
    return turn * size + within, owner == jax.lax.axis_index(axis_name)


def chosen(x: Shaped[Array, "B t D"], tokens: Int[Array, "B M"], axis_name: str) -> Shaped[Array, "B M D"]:
    """The tokens of each row with these true numbers, from whichever shard has them, on all."""
    at, mine = held(tokens, x.shape[1], axis_name)
    found = jnp.take_along_axis(x, at[:, :, None], axis=1)
    return jax.lax.psum(jnp.where(mine[:, :, None], found, 0), axis_name)
