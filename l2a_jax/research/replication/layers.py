"""Attention trained in some layers only: tokens per trained parameter without changing the tokens.

The claim under test is that training attention on less than one token per trained parameter collapses. Training it in
1, 3, 6, 12 or all layers moves that ratio at a fixed number of tokens, with everything else as in the regime. This
file says which layers, and what they count; training itself is `--attention-layers` (`training.regimes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.errors import UserError
from l2a_jax.models.params import Tree, abstract_params, map_with_path
from l2a_jax.training.regimes import check_attention_layers, count_parameters, group_of, regime_mask


def evenly_spaced(count: int, num_layers: int) -> tuple[int, ...]:
    """The middles of `count` equal stretches of `num_layers` layers, such as 4, 12, 20 for 3 of 24."""
    if not 1 <= count <= num_layers:
        raise UserError(f"{count} evenly spaced layers were asked for; expected 1 to {num_layers}")
    return tuple((2 * index + 1) * num_layers // (2 * count) for index in range(count))


def ratios(config: ModelConfig, l2a_config: L2AConfig | None, regime: str, tokens: int,
           counts: Sequence[int] = (1, 3, 6, 12)) -> list[dict[str, Any]]:
    """A row for each number of trained attention layers, all of them last: which, trained parameters, and tokens per
    trained parameter. Masters and optimizer state have room for all layers in every row."""
    params = abstract_params(config, l2a_config)
    rows = []
    for count in (*counts, config.num_layers):
        layers = evenly_spaced(count, config.num_layers)
        check_attention_layers(layers, regime, config.num_layers)
        trained = count_parameters(params, regime_mask(params, regime), layers)
        rows.append({"layers": layers, "trained_parameters": trained, "tokens": tokens,
                     "tokens_per_trained_parameter": tokens / trained})
    return rows


def changed_layers(before: Tree, after: Tree) -> dict[str, Any]:
    """Where two trees differ in any bit: {"attention": layers, "other": paths outside attention}. For checking that a
    narrowed run trained what it says and nothing else."""
    layers: set[int] = set()
    other: list[str] = []

    def look(path, one, two):
        one, two = np.asarray(one), np.asarray(two)
        same = one.view(np.uint8).reshape(one.shape[0], -1) == two.view(np.uint8).reshape(two.shape[0], -1)
        if group_of(path) == "attention":
            layers.update(np.flatnonzero(~same.all(axis=1)).tolist())
        elif not same.all():
            other.append(path)

    map_with_path(look, before, after)
    return {"attention": sorted(layers), "other": sorted(other)}
