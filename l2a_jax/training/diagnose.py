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


def first_non_finite(trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array, objective: Objective,
                     decisions: jax.Array | None = None) -> str:
    """One sentence: the parameter, the layer's output, or the gradient that is first not finite.

    `batch` is one step's ([A, B, T]) and `key` the step's, before the micro-batch is folded in; `decisions` are forced
    ([L, B, T]).
    """
    params = compute_params(trainable, frozen, objective.dtype)
    if spoilt := not_finite(params):
        named = [_named(path, counts, 0) for path, counts in spoilt.items()]
        return f"parameters hold values that are not finite: {', '.join(named[:5])}"

    for index in range(batch.tokens.shape[0]):
        micro = jax.tree.map(lambda x: jnp.asarray(x[index]), batch)  # noqa: B023
        micro_key = jax.random.fold_in(key, index)
        options = {"positions": micro.positions, "segment_ids": micro.segment_ids, "key": micro_key, "train": True,
                   "backend": objective.backend, "decisions": decisions}
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

        if spoilt := not_finite(jax.grad(loss)(trainable)):
            depths = {path: np.flatnonzero(counts)[-1] if counts.ndim else objective.config.num_layers
                      for path, counts in spoilt.items()}
            path = max(spoilt, key=lambda path: (depths[path], path))
            return ("the forward pass is finite; the gradient is not, first (counting back from the loss) at "
                    f"{_named(path, spoilt[path], -1)}")
    return ("a second look found every layer and gradient finite: what is not may be the sum over micro-batches, the "
            "penalty, or the step's own program, which is compiled otherwise")


def not_finite(tree: Tree) -> dict[str, np.ndarray]:
    """How many values of each leaf are NaN or infinite, by path (of each layer, where layers are stacked); leaves
    without any are left out."""
    found: dict[str, np.ndarray] = {}

    def look(path, leaf):
        axes = tuple(range(1 if path.startswith("layers/") else 0, leaf.ndim))
        found[path] = np.asarray(jnp.sum(~jnp.isfinite(leaf), axis=axes))

    map_with_path(look, tree)
    return {path: counts for path, counts in found.items() if counts.any()}


def _named(path: str, counts: np.ndarray, which: int) -> str:
    """A leaf with the first (`which` 0) or last (-1) layer in which it is not finite."""
    return f"{path} of layer {np.flatnonzero(counts)[which]}" if counts.ndim else path
