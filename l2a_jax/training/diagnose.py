"""Where a number stopped being finite: rerun the failing step layer by layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from l2a_jax.data.batch import Batch
from l2a_jax.models.params import Tree, map_with_path
from l2a_jax.models.transformer import hidden_states, probe_layers
from l2a_jax.training.loss import cross_entropy
from l2a_jax.training.step import Objective, compute_params


def first_non_finite(trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array, objective: Objective) -> str:
    """One sentence: the parameter, the layer's output, or the gradient that is first not finite.

    `batch` is one step's ([A, B, T]) and `key` the step's, before the micro-batch is folded in.
    """
    params = compute_params(trainable, frozen, objective.dtype)
    spoilt: list[str] = []

    def look(path, leaf):
        if not bool(jnp.isfinite(leaf).all()):
            where = _first_layer(leaf) if path.startswith("layers/") else None
            spoilt.append(path if where is None else f"{path} of layer {where}")

    map_with_path(look, params)
    if spoilt:
        return f"parameters hold values that are not finite: {', '.join(spoilt[:5])}"

    for index in range(batch.tokens.shape[0]):
        micro = jax.tree.map(lambda x: jnp.asarray(x[index]), batch)  # noqa: B023
        micro_key = jax.random.fold_in(key, index)
        options = {"positions": micro.positions, "segment_ids": micro.segment_ids, "key": micro_key, "train": True,
                   "backend": objective.backend}
        finite = probe_layers(params, micro.tokens, objective.config, objective.l2a_config,
                              probe=lambda x: jnp.isfinite(x).all(), **options)
        bad = np.flatnonzero(~np.asarray(finite))
        if bad.size:
            place = "the embedding" if bad[0] == 0 else f"layer {bad[0] - 1} (of {objective.config.num_layers}, from 0)"
            return f"the forward pass is first not finite after {place}, in micro-batch {index}"

        def loss(part):
            full = compute_params(part, frozen, objective.dtype)
            hidden, _ = hidden_states(full, micro.tokens, objective.config, objective.l2a_config, **options,  # noqa: B023
                                      remat=objective.remat, unroll=objective.unroll)
            return cross_entropy(full, hidden, micro.targets, micro.weights, objective.config).nll  # noqa: B023

        found: list[tuple[int, str]] = []

        def inspect(path, leaf):
            if not bool(jnp.isfinite(leaf).all()):
                layer = _last_layer(leaf) if path.startswith("layers/") else objective.config.num_layers
                found.append((layer, path))  # noqa: B023

        map_with_path(inspect, jax.grad(loss)(trainable))
        if found:
            layer, path = max(found)
            return (f"the forward pass is finite; the gradient is not, first (counting back from the loss) at {path}"
                    + (f" of layer {layer}" if layer < objective.config.num_layers else ""))
    return ("a second look found every layer and gradient finite: what is not may be the sum over micro-batches, the "
            "penalty, or the step's own program, which is compiled otherwise")


def _layers(leaf: jax.Array) -> np.ndarray:
    return np.flatnonzero(~np.asarray(jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(axis=1)))


def _first_layer(leaf: jax.Array) -> int:
    return int(_layers(leaf)[0])


def _last_layer(leaf: jax.Array) -> int:
    return int(_layers(leaf)[-1])
