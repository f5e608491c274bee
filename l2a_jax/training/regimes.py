"""Regimes at work: the mask of a tree that the table (`tables`) gives, and the tree split along it.

Training differentiates the trainable subtree only (`partition`), so gradients, clipping, optimizer state and
checkpoints never hold a frozen leaf.

`attention_layers` narrows a regime further: attention is then trained in these layers alone, everything else as the
regime says. Layers are stacked in one leaf, so this is not a matter of which leaves are trained: gradients and updates
of the other layers are set to zero (`keep_layers`), while masters and optimizer state keep room for every layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from l2a_jax.models.params import Tree, map_with_path
from l2a_jax.training.tables import REGIMES, check_regime, group_of


def regime_mask(params: Tree, regime: str) -> Tree:
    """True where the regime trains a leaf: an Optax mask of `params`' structure (arrays or shapes alike)."""
    trained = REGIMES[check_regime(regime)]
    return map_with_path(lambda path, _: group_of(path) in trained, params)


def keep_layers(tree: Tree, layers: Sequence[int] | None) -> Tree:
    """`tree` (gradients or updates) with attention set to zero outside `layers`; None leaves it as it is.

    The zero is -0.0, the one number that changes no bit of a parameter it is added to.
    """
    if layers is None:
        return tree

    def kept(path, leaf):
        if group_of(path) != "attention":
            return leaf
        here = np.isin(np.arange(leaf.shape[0]), np.asarray(layers)).reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.where(here, leaf, jnp.asarray(-0.0, leaf.dtype))

    return map_with_path(kept, tree)


def count_parameters(params: Tree, mask: Tree | None = None, attention_layers: Sequence[int] | None = None) -> int:
    """Number of scalars in `params`, or in the leaves where `mask` is True; shapes suffice (`jax.eval_shape`).

    With `attention_layers`, attention counts in these layers alone.
    """
    total = 0

    def add(path, leaf, wanted):
        nonlocal total
        size = math.prod(leaf.shape) if wanted else 0
        if size and attention_layers is not None and group_of(path) == "attention":
            size = size // leaf.shape[0] * len(attention_layers)
        total += size

    map_with_path(add, params, map_with_path(lambda *_: True, params) if mask is None else mask)
    return total


def partition(tree: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """Split a tree into (where True, where False); empty branches vanish, so neither part has holes."""

    def pick(node: Any, mask: Any, wanted: bool):
        if not isinstance(node, dict):
            return node if mask is wanted else None
        picked = {name: pick(child, mask[name], wanted) for name, child in node.items()}
        return {name: child for name, child in picked.items() if child is not None} or None

    return pick(tree, mask, True) or {}, pick(tree, mask, False) or {}


def combine(first: Tree, second: Tree) -> Tree:
    """Inverse of `partition`: the union of two trees that share no leaf."""
    union = dict(first)
    for name, child in second.items():
        if name in union and not (isinstance(child, dict) and isinstance(union[name], dict)):
            raise ValueError(f"both trees hold {name!r}")
        union[name] = combine(union[name], child) if name in union else child
    return union
