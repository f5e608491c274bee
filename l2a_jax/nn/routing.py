"""The routing decision: straight-through gates, the penalty and its schedule, statistics, and control decisions.

Formulas: the L2A layer (arXiv 2603.17484) as DESIGN.md states it. z is a token's router logit in one layer,
p = sigmoid(z / temperature), d = 1[z >= temperature * logit(threshold)]. Everything here is float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from l2a_jax.attention.reference import segment_starts
from l2a_jax.nn.shard import ALONE, Shard

Rates = Float[Any, " L"] | Sequence[float]  # share of tokens that are routed in each layer


def router_logits(h: Float[Array, "B T D"], kernel: Float[Array, " D"]) -> Float[Array, "B T"]:
    """z = w . h, in float32 at highest precision: a bfloat16 product would move tokens across the threshold."""
    return jnp.einsum("btd,d->bt", h.astype(jnp.float32), kernel.astype(jnp.float32),
                      precision=jax.lax.Precision.HIGHEST)


def least(temperature: float, threshold: float) -> float:
    """temperature * logit(threshold): the router logit from which on a token is routed."""
    return temperature * math.log(threshold / (1 - threshold))


def decide(z: Float[Array, "*S"], temperature: float, threshold: float) -> Bool[Array, "*S"]:
    """d = 1[z >= temperature * logit(threshold)]; `>=`, so that a router at zero routes everything at threshold 0.5."""
    return z >= least(temperature, threshold)


def flipped(key: PRNGKeyArray, d: Bool[Array, "*S"], share: Any, shard: Shard = ALONE) -> Bool[Array, "*S"]:
    """Decisions of which each is inverted with probability `share`, independently: routing noise."""
    return d ^ shard.drawn(functools.partial(jax.random.bernoulli, key, share), d.shape)


def explored(key: PRNGKeyArray, p: Float[Array, "B T"], able: Bool[Array, "B T"], share: float,
             by: str, shard: Shard = ALONE) -> tuple[Bool[Array, "B T"], Float[Array, "B T"]]:
    """Which of the `able` rows are drawn, about `share` of them, and what each then counts for: 1 / its chance.

    `by` "uniform": every chance is `share`. "unsure": chances go as the sigmoid's slope p (1 - p), so that every row
    drawn pulls on its logit alike however sure the router is of it; none is above 1.
    """
    p = jax.lax.stop_gradient(p)
    chance = jnp.full(p.shape, share, p.dtype)
    if by == "unsure":
        slope = jnp.where(able, p * (1 - p), 0.0)
        chance = jnp.minimum(1.0, share * shard.total(jnp.sum(able)) * slope
                             / jnp.maximum(shard.total(jnp.sum(slope)), 1e-30))
    drawn = able & (shard.drawn(functools.partial(jax.random.uniform, key), p.shape) < chance)
    return drawn, jnp.where(drawn, 1 / jnp.maximum(chance, 1e-30), 1.0)


def probability(z: Float[Array, "*S"], temperature: float) -> Float[Array, "*S"]:
    """p = sigmoid(z / temperature)."""
    return jax.nn.sigmoid(z / temperature)


def straight_through(d: Bool[Array, "*S"], p: Float[Array, "*S"], computed: Bool[Array, "*S"],
                     counts: Float[Array, "*S"] | None = None) -> Float[Array, "*S"]:
    """d~ = d + (p - stop_gradient(p)): the value of d, the gradient of p (times what the row `counts` for), and none
    where global was not `computed`.

    The inner bracket is exactly 0, so the value is exactly d. A row whose global attention was not computed has no
    evidence about its decision: its gradient is exactly 0, in the parallel topology too, where the local branch alone
    would otherwise pull on it.
    """
    slope = p - jax.lax.stop_gradient(p)
    return d.astype(p.dtype) + jnp.where(computed, slope if counts is None else counts * slope, 0.0)


def gate(weight: Float[Array, "B T"], rows: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """weight * rows, in float32 so that the weight's gradient, a sum over all heads, is not rounded to bfloat16."""
    return (weight[..., None, None] * rows.astype(jnp.float32)).astype(rows.dtype)


@jax.custom_vjp
def with_decision_gradient(
    rows: Float[Array, "B T N H"], open_: Float[Array, "B T"], difference: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    """`rows`, made to depend on the decision that chose them: d rows / d open_ is the difference of the two choices.

    What `gate(open_, far) + gate(1 - open_, near)` is, value and gradients, where rows is that sum already and
    difference = far - near; the gradient is summed over all heads in float32.
    """
    return rows


def _with_decision_gradient_fwd(rows, open_, difference):
    return rows, difference


def _with_decision_gradient_bwd(difference, g):
    d_open = jnp.sum(g.astype(jnp.float32) * difference.astype(jnp.float32), axis=(2, 3))
    return g, d_open, jnp.zeros_like(difference)


with_decision_gradient.defvjp(_with_decision_gradient_fwd, _with_decision_gradient_bwd)


MOST_NATS = 1.0
"""For how much one decision may count in a fit, at most: what is worth more is as clear, and tails are heavy."""


def margin(z: Float[Array, "*S"], temperature: float, threshold: float) -> Float[Array, "*S"]:
    """logit(p) - logit(threshold): at least 0 where a token is routed."""
    return z / temperature - math.log(threshold / (1 - threshold))


def advantage(worth: Float[Array, "*S"], price: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Nats that routing a token gains over its price, at most `MOST_NATS` either way."""
    return jnp.clip(worth - price, -MOST_NATS, MOST_NATS)


def fit_loss(gain: Float[Array, "*S"], margins: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """|gain| x logistic loss of the margin against the sign of the gain (cost-sensitive classification).

    Whatever the noise of one gain, the margin that is best on average over tokens that the router cannot tell apart is
    log(E[gain+] / E[gain-]): it is above 0, and these tokens are routed, exactly where their mean gain is.
    """
    return jnp.abs(gain) * jax.nn.softplus(jnp.where(gain > 0, -margins, margins))


@jax.custom_vjp
def fitted(nudge: Float[Array, "B T"], margins: Float[Array, "B T"], price: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """`nudge`, whose cotangent is minus what a decision is worth in nats: on its way back it gives the margin the slope
    of `fit_loss` against that worth. One backward pass so values every decision and fits the router to it."""
    return nudge


def _fitted_fwd(nudge, margins, price):
    return nudge, (margins, price)


def _fitted_bwd(residuals, g):
    margins, price = residuals
    slope = jax.grad(lambda m: jnp.sum(fit_loss(advantage(-g, price), m)))(margins)
    return g, slope, jnp.zeros_like(price)


fitted.defvjp(_fitted_fwd, _fitted_bwd)


def penalty(p: Float[Array, "L B T"], real: Bool[Array, "B T"], cost: Float[Array, "B T"] | None = None
            ) -> Float[Array, ""]:
    """Mean of p^2 over layers and real tokens (the L2A regulariser in mean form), each token `cost` times."""
    squares = jnp.square(p) if cost is None else cost * jnp.square(p)
    return jnp.sum(jnp.where(real, squares, 0.0)) / (p.shape[0] * jnp.maximum(jnp.sum(real), 1))


def keys_beyond(segment_ids: Int[Array, "B T"] | None, shape: tuple[int, int], window: int, sinks: int
                ) -> Int[Array, "B T"]:
    """Keys of a token's own document, up to itself, that are neither among its last `window` nor the first `sinks`."""
    past = jnp.arange(shape[1], dtype=jnp.int32) - segment_starts(segment_ids, shape)
    return jnp.maximum(past + 1 - window - sinks, 0)


def cost_of_keys(keys: Int[Array, "*B T"], real: Bool[Array, "*B T"]) -> Float[Array, "*B T"]:
    """What each token's routed decision costs: the `keys` that it then reads, as a multiple of their mean over real
    tokens; 0 at padding, and everywhere where no token reads any."""
    keys = jnp.where(real, keys, 0).astype(jnp.float32)
    return keys * (jnp.sum(real) / jnp.maximum(jnp.sum(keys), 1.0))


def penalty_weight(step: Int[Array, ""] | int, *, maximum: Any, warmup: Any, ramp: Any) -> Float[Array, ""]:
    """lambda(step): 0 up to step `warmup`, linear over the next `ramp` steps, then `maximum`; numbers or traced."""
    progress = (jnp.asarray(step, jnp.float32) - warmup) / jnp.maximum(ramp, 1)
    return maximum * jnp.clip(progress, 0.0, 1.0)


def sparsity(decisions: Bool[Array, "L B T"], real: Bool[Array, "B T"]) -> Float[Array, " L"]:
    """Share of real tokens that are not routed, per layer."""
    return jnp.sum(~decisions & real, axis=(1, 2)) / jnp.maximum(jnp.sum(real), 1)


def entropy(p: Float[Array, "L B T"], real: Bool[Array, "B T"]) -> Float[Array, " L"]:
    """Mean entropy of the routing probability per layer, in nats: 0.69 undecided, 0 certain."""
    q = jnp.clip(p, 1e-7, 1 - 1e-7)
    nats = -(q * jnp.log(q) + (1 - q) * jnp.log1p(-q))
    return jnp.sum(jnp.where(real, nats, 0.0), axis=(1, 2)) / jnp.maximum(jnp.sum(real), 1)


def random(key: PRNGKeyArray, rates: Rates, batch: int, length: int) -> Bool[Array, "L B T"]:
    """Control decisions: each token of layer l is routed with probability rates[l], independently."""
    rates = jnp.asarray(rates, jnp.float32)
    return jax.random.uniform(key, (rates.shape[0], batch, length)) < rates[:, None, None]


def frozen(key: PRNGKeyArray, rates: Rates, batch: int, length: int) -> Bool[Array, "L B T"]:
    """Control decisions: drawn once for every layer and place of a row, and the same in every row and step."""
    drawn = random(key, rates, 1, length)
    return jnp.broadcast_to(drawn, (drawn.shape[0], batch, length))


def shuffled(
    key: PRNGKeyArray, decisions: Bool[Array, "L B T"], real: Bool[Array, "B T"] | None = None
) -> Bool[Array, "L B T"]:
    """Control decisions: each layer's and row's decisions permuted over its tokens, so that every count is kept.

    With `real`, only real tokens change places (padding neither gives nor takes a decision).
    """
    real = jnp.ones(decisions.shape[1:], bool) if real is None else real

    def permute(key, row, real):
        # Ranks of the real tokens in a random order: the n-th real place takes the decision of rank n.
        noise = jnp.where(real, jax.random.uniform(key, row.shape), 2.0)
        taken = row[jnp.argsort(noise)]
        place = jnp.cumsum(real) - 1
        return jnp.where(real, taken[place], False)

    keys = jax.random.split(key, decisions.shape[:2])
    return jax.vmap(jax.vmap(permute, in_axes=(0, 0, 0)), in_axes=(0, 0, None))(keys, decisions, real)
