"""Saliency: the router fitted to what each decision is worth, without ever running its own decisions.

One backward pass gives, for every token and layer, worth = -<g, far - near>: the nats that next-token loss gains, to
first order, where that token sees the whole past in that layer and not only its window. A decision costs a price, and
the router learns by weighted logistic loss (`routing.fit_loss`) whether it is worth it. The price is the penalty's
weight in nats: what lambda x mean d rises by where one token is routed in one layer.

Decisions are drawn while their worth is taken: each is routed with probability `share` (1: everything is). At 1 the
model is the base model, and what it knows for sure has no slope any more: a recalled answer seems worth nothing. Below,
a decision is valued on either side of it and among others that are open or not: at one half this is the trapezoid rule
for loss(local) - loss(routed).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.data.batch import Batch
from l2a_jax.models.layer import LayerRouting, pruned_of
from l2a_jax.models.params import Tree
from l2a_jax.nn import routing
from l2a_jax.training.loss import TokenLoss, cross_entropy

Forward = Callable[..., tuple[Tree, Float[Array, "B T D"], LayerRouting]]


class Fitted(NamedTuple):
    """Sums over decisions: of `routing.fit_loss`, and of its weights, the absolute gains. `next_token` is the loss of
    the pass in which worth was taken, `routed` what the router would decide there."""

    loss: Float[Array, ""]
    weights: Float[Array, ""]
    next_token: TokenLoss
    routed: LayerRouting


def fit_to_worth(forward: Forward, trainable: Tree, batch: Batch, real: Bool[Array, "B T"],
                 decisions: Bool[Array, "L B T"], price: Float[Array, "B T"], config: ModelConfig,
                 l2a_config: L2AConfig) -> tuple[Any, Fitted]:
    """The gradient of the summed `fit_loss` in `trainable`, the router alone, and what was fitted.

    `forward(trainable, batch, **options)`: the whole tree, and `hidden_states` with these options. `price` is in nats a
    routed decision. Divided by the weights, both summed over all of a step, the loss is a mean: the scale of what
    decisions are worth then matters to no learning rate, and nothing has to be remembered from step to step.
    """
    prices = jnp.broadcast_to(price, decisions.shape)

    def loss(trainable, nudge):
        params, hidden, routed = forward(trainable, batch, decisions=decisions, nudge=nudge, price=prices)
        summed = cross_entropy(params, hidden, batch.targets, batch.weights, config)
        return summed.nll, (summed, routed)

    (gradients, slopes), (summed, routed) = jax.grad(loss, (0, 1), has_aux=True)(trainable, jnp.zeros(prices.shape))
    pruned = pruned_of(config, l2a_config)
    able = jnp.broadcast_to(real if pruned is None else real & ~pruned[:, None, None], prices.shape)
    gain = jnp.where(able, routing.advantage(-slopes, prices), 0.0)
    margins = routing.margin(routed.logits, l2a_config.temperature, l2a_config.threshold)
    own = routed._replace(decisions=(margins >= 0) & able)
    return gradients, Fitted(jnp.sum(routing.fit_loss(gain, margins)), jnp.sum(jnp.abs(gain)), summed, own)
