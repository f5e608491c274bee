"""Regimes: which parameters a run trains, as one table of path patterns.

Every leaf belongs to exactly one group, and a regime is a set of groups; a leaf that no pattern covers, or two do, is
an error, never a silently frozen or trained parameter. The mask is the declaration. Training differentiates the
trainable subtree only (`partition`), so gradients, clipping, optimizer state and checkpoints never hold a frozen leaf.

`attention_layers` narrows a regime further: attention is then trained in these layers alone, everything else as the
regime says. Layers are stacked in one leaf, so this is not a matter of which leaves are trained: gradients and updates
of the other layers are set to zero (`keep_layers`), while masters and optimizer state keep room for every layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from l2a_jax.errors import UserError
from l2a_jax.models.params import Tree, map_with_path

GROUPS: dict[str, str] = {
    "router": r"layers/router/kernel",
    "attention": r"layers/attention(_local|_global)?/(q|k|v|o)/(kernel|bias)",
    "attention_norms": r"layers/norm_(attention|local|global)/scale",
    "mlp": r"layers/mlp/(gate|up|down)/kernel",
    "other_norms": r"(layers/norm_mlp|norm_final)/scale",
    "embeddings": r"(embed/embedding|unembed/kernel)",
}

REGIMES: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "router_strict": ("router",),
    "router_only": ("router", "attention_norms"),
    "l2a_ft": ("router", "attention_norms", "attention"),
    "l2a_paper": ("router", "attention_norms", "attention", "other_norms"),
    "full_ft": tuple(GROUPS),
    "pretrain": tuple(GROUPS),
}
# These run a plain model: they add no router.
PLAIN_REGIMES = ("baseline", "pretrain")


def group_of(path: str) -> str:
    """The one group whose pattern covers the whole path. Raises ValueError where none or several do."""
    groups = [name for name, pattern in GROUPS.items() if re.fullmatch(pattern, path)]
    if len(groups) != 1:
        raise ValueError(f"parameter {path!r} is covered by {len(groups)} groups of the regime table {groups}; "
                         "expected exactly one")
    return groups[0]


def check_regime(regime: str, flag: str = "--regime") -> str:
    """`regime` itself, or UserError naming the known ones."""
    if regime not in REGIMES:
        raise UserError(f"{flag} is {regime!r}; expected one of {', '.join(REGIMES)}")
    return regime


def regime_mask(params: Tree, regime: str) -> Tree:
    """True where the regime trains a leaf: an Optax mask of `params`' structure (arrays or shapes alike)."""
    trained = REGIMES[check_regime(regime)]
    return map_with_path(lambda path, _: group_of(path) in trained, params)


def check_attention_layers(layers: Sequence[int] | None, regime: str, num_layers: int) -> None:
    """UserError where `layers` (None: all) is no choice of attention layers to train for this regime and model."""
    if layers is None:
        return
    if "attention" not in REGIMES[check_regime(regime)]:
        trains = ", ".join(name for name, groups in REGIMES.items() if "attention" in groups)
        raise UserError(f"--attention-layers chooses where attention is trained, but --regime {regime} trains no "
                        f"attention; expected one of {trains}")
    if not layers or len(set(layers)) != len(layers):
        raise UserError(f"--attention-layers is {list(layers)}; expected at least one layer, each once")
    beyond = [layer for layer in layers if not 0 <= layer < num_layers]
    if beyond:
        raise UserError(f"--attention-layers names {beyond[0]}; the model has layers 0 to {num_layers - 1}")


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
