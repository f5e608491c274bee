"""How the leaves of a tree are dealt: each along one dimension, over all devices of the mesh together.

Masters, gradients and moments of a parameter are dealt alike, so that an update needs no other device. A weight is
gathered where it is used, and the transpose of that gives every device its part of the summed gradient. Layers are
scanned, so L is never the dimension that is dealt.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.custom_derivatives import linear_call
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey, tree_map_with_path
from jaxtyping import Array, Shaped

from l2a_jax.sharding.mesh import NAMES


def dimension(shape: tuple[int, ...], shards: int, stacked: bool) -> int | None:
    """The dimension of a leaf that is dealt over `shards` devices: the first that they divide, after L where layers are
    `stacked`. None: the leaf is whole on every device."""
    return next((index for index in range(int(stacked), len(shape)) if shape[index] % shards == 0), None)


def specs(tree: Any, shards: int) -> Any:
    """The PartitionSpec of each leaf of parameters, gradients, a training state or any other tree that holds parameters
    under their names; layers may be taken apart (`models.params.by_layer`)."""

    def of(path, leaf):
        stacked = DictKey("layers") in path and isinstance(path[-1], DictKey)
        dealt = dimension(leaf.shape, shards, stacked)
        return P() if dealt is None else P(*(None,) * dealt, NAMES)

    return tree_map_with_path(of, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The NamedSharding of each leaf."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh.size))


def described(tree: Any, mesh: Mesh) -> Any:
    """The tree's shapes with their shardings: what a step is compiled for, and a checkpoint read into."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree,
                        shardings(tree, mesh))


def put(tree: Any, mesh: Mesh) -> Any:
    """The arrays of `tree`, each dealt over the devices."""
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def _put(leaf: Any, sharding: NamedSharding) -> Array:
    if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    # Every process has the leaf: `device_put` would send it to the others, to compare.
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def held_bytes(tree: Any, shards: int) -> int:
    """Bytes that each of so many devices holds of all leaves; shapes suffice."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize // (shards if len(spec) else 1)
               for leaf, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs(tree, shards)), strict=True))


def whole_bytes(tree: Any, shards: int) -> int:
    """Bytes of those leaves that every device holds whole, because nothing of their shape can be divided."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize
               for leaf, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs(tree, shards)), strict=True)
               if leaf.ndim and not len(spec))


def gathered(part: Shaped[Array, "*S"], dealt: int | None, dtype: Any) -> Shaped[Array, "*W"]:
    """A whole leaf in `dtype` from its parts, inside `shard_map`. Its transpose sums the gradients of all devices in
    the dtype of the parts, which are masters where the leaf is trained, and leaves each its part."""
    if dealt is None:
        return part.astype(dtype)
    return linear_call(
        lambda _, part: jax.lax.all_gather(part.astype(dtype), NAMES, axis=dealt, tiled=True),
        lambda _, sums: jax.lax.psum_scatter(sums.astype(part.dtype), NAMES, scatter_dimension=dealt, tiled=True),
        (), part)


def summed(gradients: Any, dealt: Any) -> Any:
    """The gradients of all devices' tokens, inside `shard_map`: of leaves that are not `dealt` (their `specs`) each
    device has those of its own tokens alone."""
    return jax.tree.map(lambda leaf, spec: leaf if len(spec) else jax.lax.psum(leaf, NAMES), gradients, dealt)
