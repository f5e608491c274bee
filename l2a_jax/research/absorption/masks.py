"""Which keys a query keeps, and how far two such choices agree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from l2a_jax.research.absorption.top_k import top_k_mask


def causal(length: int) -> Bool[Array, "T T"]:
    """Query t sees keys 0..t."""
    return jnp.tril(jnp.ones((length, length), bool))


def select(scores: Float[Array, "*S T T"], k: Int[Array, ""] | int, before: Bool[Array, ""] | bool
           ) -> Bool[Array, "*S T T"]:
    """The kept, visible keys: [..., query, key].

    `before` False (`after` the causal mask): the top k of the visible keys, all of them for the first k queries.
    `before` True: the top k of all T keys, then the causal mask; k T / T of them are visible on average at query T,
    hardly any at the first, and a row may be empty.
    """
    visible = causal(scores.shape[-1])
    return top_k_mask(jnp.where(visible | before, scores, -jnp.inf), k) & visible


def recency(length: int) -> Float[Array, "T T"]:
    """Scores whose top k are the k nearest keys: a sliding window."""
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.float32), (length, length))


def shuffled(scores: Float[Array, "*S T T"], key: Array) -> Float[Array, "*S T T"]:
    """Each query's scores of its visible keys in a random order, one order per query for all heads and rows.

    Only visible keys change places, so nothing of the future comes in.
    """
    visible = causal(scores.shape[-1])
    noise = jnp.where(visible, jax.random.uniform(key, visible.shape), 2.0 + jnp.arange(scores.shape[-1]))
    order = jnp.argsort(noise, axis=-1)
    return jnp.take_along_axis(scores, jnp.broadcast_to(order, scores.shape), axis=-1)


def agreement(mask: Bool[Array, "*S T T"], truth: Bool[Array, "*S T T"], k: Int[Array, ""] | int
              ) -> Float[Array, " 6"]:
    """Counts for F1: true positives, kept by `mask`, kept by `truth`; over all queries, then over the contested ones
    (more than k visible keys: elsewhere both masks hold every key and agree for nothing)."""
    contested = (jnp.arange(mask.shape[-1]) >= k)[:, None]
    counts = [jnp.sum(x, dtype=jnp.float32) for within in (True, contested)
              for x in (mask & truth & within, mask & within, truth & within)]
    return jnp.stack(counts)


def f1(counts: Float[np.ndarray, "*S 3"]) -> Float[np.ndarray, "*S"] | np.floating:
    """2 TP / (kept + kept by truth), from (summed) counts: the micro average; 2PR / (P + R) in other words."""
    return 2 * counts[..., 0] / np.maximum(counts[..., 1] + counts[..., 2], 1)
