"""The router's logit, and what it sees beside the stream:

    z = w . h + u . s + v . silu(A h + C s + b)

h is the layer's input, s are signals that cost little to have. The linear router is the first term alone; the others
are there where a layer asks for signals (`router_sees`) or for hidden units (`router_hidden`). Everything is float32 at
highest precision, as `routing.router_logits` says why. u and v start at 0 as w does: everything is routed at first.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from l2a_jax.attention.reference import Heads, Ids, Keys, Places, at_places, segment_starts, take
from l2a_jax.attention.xla import dot
from l2a_jax.config import OF_SCORES
from l2a_jax.nn import routing

FARTHEST = 1_024
"""Windows of past at which the signal of position stops growing."""


class Scores(NamedTuple):
    """What the scores of local attention say of each token and head: their log-sum-exp in nats, and the share of the
    softmax that is on the sinks."""

    lse: Float[Array, "B T N"]
    sink: Float[Array, "B T N"]


def width(names: tuple[str, ...], num_heads: int) -> int:
    """S, the number of signals under `names`."""
    return sum(num_heads if name in OF_SCORES else 1 for name in names)


def signals(names: tuple[str, ...], positions: Int[Array, "B T"], window: int, sinks: int = 0,
            scores: Scores | None = None) -> Float[Array, "B T S"] | None:
    """The signals of each token, in the order of `names` (None: there are none); no gradient flows through any.

    `position`: ln of the token's past, itself included, in windows; 0 within the first window, where a decision changes
    nothing. `lse`, of each head: asinh of ln(mean exp score) over the keys of local attention, because some heads'
    scores have offsets in the tens. `sink`, of each head: the mass on the sinks.
    """
    if not names:
        return None
    past = (positions + 1).astype(jnp.float32)
    made = {"position": jnp.log(jnp.clip(past / window, 1.0, FARTHEST))[..., None]}
    if scores is not None:
        keys = jnp.log(jnp.minimum(past, window + sinks))[..., None]
        made |= {"lse": jnp.arcsinh(scores.lse - keys), "sink": scores.sink}
    return jax.lax.stop_gradient(jnp.concatenate([made[name] for name in names], axis=-1))


def scores_of(q: Heads, k: Keys, lse: Float[Array, "B Q N"], segment_ids: Ids | None, sinks: int,
              places: Places | None = None) -> Scores:
    """`Scores` from a log-sum-exp: the sinks' part of it needs no more than the sinks' own scores."""
    batch, length, heads, head_dim = q.shape
    starts, count = at_places(segment_starts(segment_ids, k.shape[:2]), places), min(sinks, k.shape[1])
    first = starts[:, :, None] + jnp.arange(count)
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    if segment_ids is None:
        scores = _scores("btkgh,bskh->btkgs", grouped, k[:, :count])
    else:
        found = take(k, jnp.minimum(first, k.shape[1] - 1).reshape(batch, -1))
        found = found.reshape(batch, length, count, *k.shape[2:])
        scores = _scores("btkgh,btskh->btkgs", grouped, found)
    scores = scores.reshape(batch, length, heads, count)
    index = jnp.arange(length) if places is None else places
    seen = (first <= index[..., None])[:, :, None]
    # A row without keys has any log-sum-exp: nothing is above 1.
    mass = jnp.sum(jnp.where(seen, jnp.exp(jnp.minimum(scores - lse[..., None], 0.0)), 0.0), axis=-1)
    return Scores(lse, mass)


def scores_over(q: Float[Array, "B N H"], keys: Float[Array, "B S K H"], seen: Bool[Array, "B S"],
                sink: Bool[Array, "B S"]) -> Scores:
    """`Scores` of one token a row over the keys that it has `seen`, some of them a `sink`; the token itself is seen."""
    grouped = q.reshape(q.shape[0], 1, keys.shape[2], -1, q.shape[-1])
    scores = _scores("btkgh,bskh->btkgs", grouped, keys.astype(q.dtype)).reshape(*q.shape[:2], -1)
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    mass = jnp.sum(jnp.where(sink[:, None], jnp.exp(scores - lse[..., None]), 0.0), axis=-1)
    return Scores(lse[:, None], mass[:, None])


def _scores(spec: str, q: Float[Array, ...], k: Float[Array, ...]) -> Float[Array, ...]:
    return dot(spec, q, k) / math.sqrt(q.shape[-1])


def logits(h: Float[Array, "B T D"], seen: Float[Array, "B T S"] | None, router: dict[str, Any]) -> Float[Array, "B T"]:
    """z of each token from the layer's input and its signals; `router` holds the leaves of one layer."""
    z = routing.router_logits(h, router["kernel"])
    if "signals" in router:
        z = z + _product(seen, router["signals"][:, None])[..., 0]
    if "hidden" in router:
        hidden = router["hidden"]
        units = _product(h.astype(jnp.float32), hidden["kernel"]) + hidden["bias"]
        if "signals" in hidden:
            units = units + _product(seen, hidden["signals"])
        z = z + _product(jax.nn.silu(units), hidden["out"][:, None])[..., 0]
    return z


def _product(x: Float[Array, "B T I"], kernel: Float[Array, "I O"]) -> Float[Array, "B T O"]:
    return jnp.einsum("bti,io->bto", x, kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
