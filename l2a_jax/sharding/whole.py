"""Weights whole on every device of a mesh, for a model that is read and not trained.

Without gradients and moments a model is small beside a device's memory: 7B takes 15 GB in bfloat16, and what decoding
makes of it as much again. To deal it would have all weights sent to all devices for every batch, and in generation for
every token, where reading them from memory takes most of the time already. So nothing is dealt but rows and tokens.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.models.params import Tree, by_path, param_shapes
from l2a_jax.sharding.dealt import Dealt
from l2a_jax.sharding.mesh import axes_of


def put(params: Tree, mesh: Mesh | None) -> Tree:
    """The leaves whole on every device; as they are without a mesh, or where they lie so already."""
    return params if mesh is None else jax.device_put(params, NamedSharding(mesh, P()))


def alone(params: Tree) -> Tree:
    """The leaves of one device, of those that `put` gave all; without a copy."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), params)


def dealt(mesh: Mesh, config: ModelConfig, l2a: L2AConfig | None) -> Dealt:
    """What a device of `mesh` holds of a batch: its rows and tokens, and every weight."""
    return Dealt(axes_of(mesh), dict.fromkeys(by_path(param_shapes(config, l2a))))
