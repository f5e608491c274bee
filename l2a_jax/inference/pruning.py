"""Pruning: layers that hardly route lose global attention for good, and with it their cache of every token.

The statistic is the share of a calibration text's tokens that a layer does not route (arXiv 2603.17484 prunes layers
of consistently high sparsity and names no threshold; ours is an argument). A pruned layer never routes, in generation
and everywhere else; its weights stay, so that pruning is one line of the configuration and can be undone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from l2a_jax.config import L2AConfig
from l2a_jax.errors import UserError
from l2a_jax.inference.cache import cache_bytes
from l2a_jax.sources import Pretrained


def prune_by_sparsity(sparsity_per_layer: Sequence[float], threshold: float) -> tuple[int, ...]:
    """Layers whose sparsity (share of tokens not routed, see `routing.sparsity`) exceeds `threshold`.

    Raises UserError on a threshold outside 0..1, or a sparsity that is no share (NaN included).
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"the pruning threshold is {threshold}; expected a share of tokens, from 0 to 1")
    values = [float(value) for value in sparsity_per_layer]
    if not all(0 <= value <= 1 for value in values):
        raise UserError(f"sparsity per layer is {values}; expected shares of tokens, from 0 to 1")
    return tuple(layer for layer, value in enumerate(values) if value > threshold)


def check_prunable(layer: L2AConfig | None, asked: str, model: str = "the model") -> None:
    """UserError, beginning with the flag or argument that `asked`, where a plain model is to be pruned."""
    if layer is None:
        raise UserError(f"{asked}: {model} is plain, and only layers that route can lose global attention")


def pruned(model: Pretrained, layers: Sequence[int]) -> Pretrained:
    """The model with `layers` pruned, besides those that are already.

    Raises UserError where the model has no router, or a layer does not exist.
    """
    check_prunable(model.l2a_config, "layers")
    beyond = sorted(layer for layer in layers if not 0 <= layer < model.config.num_layers)
    if beyond:
        raise UserError(f"layers {beyond} cannot be pruned: the model has {model.config.num_layers}, from 0")
    every = {*model.l2a_config.pruned_layers, *layers}
    return model._replace(l2a_config=dataclasses.replace(model.l2a_config, pruned_layers=tuple(sorted(every))))


def cache_saving(model: Pretrained, tokens: int, batch: int = 1) -> tuple[int, int]:
    """Cache bytes of `batch` rows of `tokens` tokens: (as the model is, with nothing pruned)."""
    dtype = model.params["embed"]["embedding"].dtype
    whole = None if model.l2a_config is None else dataclasses.replace(model.l2a_config, pruned_layers=())
    return (cache_bytes(model.config, model.l2a_config, batch, tokens, dtype),
            cache_bytes(model.config, whole, batch, tokens, dtype))
