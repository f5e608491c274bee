"""How the tokens of a row are dealt over the axis "context": in stripes, in turn.

Stripe s belongs to shard s modulo the shards. Early tokens see few keys and late ones many, and routed tokens stand
together: stripes spread both.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int, Shaped

from l2a_jax.sharding.mesh import CONTEXT

LARGEST = 256
"""Tokens of a stripe, at most. A power of two, so that stripes are whole blocks of the kernels."""


def shards_of(mesh: Mesh | None) -> int:
    """Devices over which the tokens of a row are dealt; without a mesh, one. ValueError where it has no such axis."""
    if mesh is not None and CONTEXT not in mesh.shape:
        raise ValueError(f"the mesh has the axes {tuple(mesh.shape)}; expected one that is called {CONTEXT!r}")
    return 1 if mesh is None else mesh.shape[CONTEXT]


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
