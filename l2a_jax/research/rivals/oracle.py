"""What each decision is worth, by one backward pass, and the choice that knows it: a bound for choices of tokens.

With everything routed, the gradient of the loss with respect to a decision is <g, far - near>: to first order, what the
loss rises by where that token's global attention in that layer is given up. The oracle routes the decisions that are
worth most. It has seen the very tokens that it is scored on, so it is no rival that could be deployed; and it is of
first order, so that a choice which saw more of the loss could be better.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.models.transformer import hidden_states
from l2a_jax.nn.shard import ALONE
from l2a_jax.progress import progress
from l2a_jax.research.rivals.beyond import beyond
from l2a_jax.sharding import whole
from l2a_jax.sharding.mesh import ROWS, STACKED, axes_of
from l2a_jax.sources import Pretrained
from l2a_jax.training.loss import cross_entropy


def decision_worth(model: Pretrained, windows: Windows, backend: str = "auto",
                   mesh: Mesh | None = None) -> Float[np.ndarray, "L B T"]:
    """Nats, summed over the places beyond the window, that are lost to first order where a decision becomes local.
    `mesh`: deals windows, one for each part of its axis "data" at a time, and their tokens."""
    given, params = beyond(windows, model, "context", mesh), whole.put(model.params, mesh)
    (count, length), rows, parts = windows.tokens.shape, axes_of(mesh).data, []
    with progress("oracle", count) as report:
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            parts.append(jax.device_get(_worth(params, *(x[start : start + rows] for x in given), config=model.config,
                                               l2a_config=model.l2a_config, backend=backend, mesh=mesh)))
            report(stop, f"{stop} windows")
    return np.concatenate(parts, axis=1)[:, :count, :length]


@functools.partial(jax.jit, static_argnames=("config", "l2a_config", "backend", "mesh"))
def _worth(params, tokens, targets, weights, *, config, l2a_config, backend, mesh) -> Float[Array, "L B T"]:
    def found(params, *windows, shard=ALONE):
        tokens, targets, weights = map(shard.tokens, windows)
        everything = jnp.ones((config.num_layers, *tokens.shape), bool)

        def loss(nudge):
            hidden, _ = hidden_states(params, tokens, config, l2a_config, decisions=everything, nudge=nudge, remat=True,
                                      backend=backend, shard=shard)
            return cross_entropy(params, hidden, targets, weights, config, logits_dtype=jnp.float32).nll

        return shard.joined(-jax.grad(loss)(jnp.zeros(everything.shape)))

    if mesh is None:
        return found(params, tokens, targets, weights)
    found = functools.partial(found, shard=whole.dealt(mesh, config, l2a_config))
    return jax.shard_map(found, mesh=mesh, in_specs=(P(), ROWS, ROWS, ROWS), out_specs=STACKED, check_vma=False)(
        params, tokens, targets, weights)


def most_worth(worth: Float[np.ndarray, "L B T"], real: Bool[np.ndarray, "B T"],
               density: float) -> Bool[np.ndarray, "L B T"]:
    """Decisions that route the share `density` of all real ones: those that are worth most."""
    count = round(density * worth.shape[0] * int(real.sum()))
    values = np.where(real, worth, -np.inf).reshape(-1)
    chosen = np.zeros(values.size, bool)
    chosen[np.argsort(-values, kind="stable")[:count]] = True
    return chosen.reshape(worth.shape)
