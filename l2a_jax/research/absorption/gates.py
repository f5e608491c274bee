"""The bilinear gate and what it may do to attention: free functions of the scores, one for each form.

S [.., N, T, T] are scaled products of queries and keys, G the gate's scores of the same shape, both over all pairs;
masks are boolean, True where a key is kept. Formulas: arXiv 2603.02227, section 3, as its code has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from l2a_jax.research.absorption import masks
from l2a_jax.research.absorption.definitions import SCORES, SELECT, SOFT, Attention

HIDDEN = -1e30  # a logit whose weight is exactly 0 beside any visible one


def pair_scores(q: Float[Array, "B T N H"], k: Float[Array, "B T N H"], dtype: Any) -> Float[Array, "B N T T"]:
    """q . k / sqrt(H) for every pair, in `dtype`: S from attention's projections, G from the gate's."""
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=dtype)
    return scores * jnp.asarray(q.shape[-1] ** -0.5, dtype)


def choose(which: str | int | Array, names: tuple[str, ...], options: dict[str, Callable[[], Array]]) -> Array:
    """The option of a name, or, where `which` is a traced index into `names`, a conditional over all of them."""
    if isinstance(which, str):
        return options[which]()
    return jax.lax.switch(which, [options[name] for name in names])


def soften(s: Float[Array, "*S T T"], g: Float[Array, "*S T T"] | Callable, form: str | int | Array
           ) -> Float[Array, "*S T T"]:
    """The logits before masks: S, S * sigmoid(G), or S + log sigmoid(G), float32.

    The product cannot remove a key: a gate of 0 leaves the logit 0. The sum can, and topping it off at -inf is its
    limit. `g` may be a function, called only where G is needed.
    """
    s = s.astype(jnp.float32)

    def gate():
        return (g() if callable(g) else g).astype(jnp.float32)

    return choose(form, SOFT, {"none": lambda: s, "multiplicative": lambda: s * jax.nn.sigmoid(gate()),
                               "additive": lambda: s + jax.nn.log_sigmoid(gate())})


def masked_softmax(logits: Float[Array, "*S T T"], mask: Bool[Array, "*S T T"]) -> Float[Array, "*S T T"]:
    """Softmax over the kept keys; a query that keeps none attends to nothing (zeros, not NaN)."""
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, HIDDEN), axis=-1), 0.0)


def straight_through_softmax(logits: Float[Array, "*S T T"], mask: Bool[Array, "*S T T"], g: Float[Array, "*S T T"]
                             ) -> Float[Array, "*S T T"]:
    """The value of `masked_softmax`, and sigmoid(G)'s gradient in place of the mask's (which is 0).

    With m~ = m + sigmoid(G) - stop_gradient(sigmoid(G)): exp(l) m~ / sum exp(l) m~, so that a dropped key too has a
    gradient: what attending to it would have changed.
    """
    visible = masks.causal(logits.shape[-1])
    probability = jax.nn.sigmoid(g.astype(jnp.float32))
    soft_mask = mask + jnp.where(visible, probability - jax.lax.stop_gradient(probability), 0.0)
    # The largest kept logit as the shift keeps the sum above 0. A dropped key counts as no larger than that: the mask's
    # gradient at a key is its weight, which has no bound where the gate dropped the very key that attention wants
    # (training at 31M ended in infinities within 500 steps, all three seeds).
    top = jax.lax.stop_gradient(jnp.max(jnp.where(mask, logits, HIDDEN), axis=-1, keepdims=True))
    above = jnp.where(visible, logits - top, HIDDEN)
    weights = jnp.exp(jnp.where(mask, above, jnp.minimum(above, 0.0))) * soft_mask
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def kept_keys(
    attention: Attention,
    k: Array | int,
    *,
    scores: dict[str, Callable[[], Float[Array, "B N T T"]]],
    shape: tuple[int, ...],
    key: Array | None,
) -> Bool[Array, "B N T T"]:
    """The mask of `attention.select`; `scores` gives what "gate", "selector", "oracle" and "used" rank by."""
    length = shape[-1]
    before = attention.convention == "before" if isinstance(attention.convention, str) else attention.convention == 1

    def ranked(by):
        return lambda: masks.select(jax.lax.stop_gradient(by()).astype(jnp.float32), k, before)

    def noise():
        return jax.random.uniform(jax.random.fold_in(key, 1), shape)

    def window():  # one mask for all
        return jnp.broadcast_to(masks.select(masks.recency(length), k, before), shape)

    options = {name: ranked(by) for name, by in scores.items()}
    options |= {"random": ranked(noise), "window": window,
                "none": lambda: jnp.broadcast_to(masks.causal(length), shape)}
    return choose(attention.select, SELECT, options)


def presented(g: Float[Array, "B N T T"], attention: Attention, key: Array | None) -> Float[Array, "B N T T"]:
    """G as `attention.scores` wants it: as it is, its visible keys shuffled, or that of the batch's next text."""
    return choose(attention.scores, SCORES, {
        "own": lambda: g, "shuffled": lambda: masks.shuffled(g, jax.random.fold_in(key, 2)),
        "other_text": lambda: jnp.roll(g, 1, axis=0)})
