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
from jaxtyping import Bool, Float

from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.evaluation.reach import distances
from l2a_jax.models.transformer import hidden_states
from l2a_jax.progress import progress
from l2a_jax.sources import Pretrained
from l2a_jax.training.loss import cross_entropy


def decision_worth(model: Pretrained, windows: Windows, backend: str = "auto") -> Float[np.ndarray, "L B T"]:
    """Nats, summed over the places beyond the window, that are lost to first order where a decision becomes local."""
    weights = (distances(windows, model)[1] > 0).astype(np.float32)
    parts = []
    with progress("oracle", len(windows.tokens)) as report:
        for row in range(len(windows.tokens)):
            one = slice(row, row + 1)
            parts.append(jax.device_get(_worth(model.params, windows.tokens[one], windows.targets[one], weights[one],
                                               config=model.config, l2a_config=model.l2a_config, backend=backend)))
            report(row + 1, f"{row + 1} windows")
    return np.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnames=("config", "l2a_config", "backend"))
def _worth(params, tokens, targets, weights, *, config, l2a_config, backend):
    everything = jnp.ones((config.num_layers, *tokens.shape), bool)

    def loss(nudge):
        hidden, _ = hidden_states(params, tokens, config, l2a_config, decisions=everything, nudge=nudge, remat=True,
                                  backend=backend)
        return cross_entropy(params, hidden, targets, weights, config, logits_dtype=jnp.float32).nll

    return -jax.grad(loss)(jnp.zeros(everything.shape))


def most_worth(worth: Float[np.ndarray, "L B T"], real: Bool[np.ndarray, "B T"],
               density: float) -> Bool[np.ndarray, "L B T"]:
    """Decisions that route the share `density` of all real ones: those that are worth most."""
    count = round(density * worth.shape[0] * int(real.sum()))
    values = np.where(real, worth, -np.inf).reshape(-1)
    chosen = np.zeros(values.size, bool)
    chosen[np.argsort(-values, kind="stable")[:count]] = True
    return chosen.reshape(worth.shape)
