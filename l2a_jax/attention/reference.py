"""The oracle: attention written as its definition, in float32, with the whole T x T table in memory.

Every other backend is compared with these few lines; `api` says what each function means. Conventions, fixed once here:

- q is [B, Q, N, H]; k and v are [B, T, K, H] with N a multiple of K; query head n reads key head n // (N // K).
- Query row r belongs to token r, and Q = T. Where queries are a part of the tokens, `places` [B, Q] are the numbers of
  their tokens, ascending; keys, values and `segment_ids` are of all T tokens then too.
- Scores are scaled by 1 / sqrt(H). A window of W keys includes the token itself: 0 <= i - j < W.
- `segment_ids` [B, T] int: contiguous runs of equal ids are the documents of a packed row, 0 is padding. Nothing is
  seen across documents, sinks are the first keys of the row's own document, and padding rows give exactly 0.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

Heads = Float[Array, "B Q N H"]
Keys = Float[Array, "B T K H"]
PerRow = Bool[Array, "B Q"]
Ids = Int[Array, "B T"]  # of documents
Places = Int[Array, "B Q"]  # of the queries' tokens
_HIGHEST = jax.lax.Precision.HIGHEST


def real_tokens(segment_ids: Int[Any, "*B T"] | None, shape: tuple[int, ...]) -> Bool[Any, "*B T"]:
    """Which tokens are real: those that are no padding, and all where there are no documents."""
    return jnp.ones(shape, bool) if segment_ids is None else segment_ids != 0


def segment_starts(segment_ids: Ids | None, shape: tuple[int, int]) -> Int[Array, "B T"]:
    """Index of the first token of each token's document; all 0 where there are no documents."""
    if segment_ids is None:
        return jnp.zeros(shape, jnp.int32)
    index = jnp.arange(shape[1], dtype=jnp.int32)
    is_start = jnp.concatenate([jnp.ones((shape[0], 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return jax.lax.cummax(jnp.where(is_start, index, 0), axis=1)


def take(x: Shaped[Array, "B T *rest"], index: Int[Array, "B Q"]) -> Shaped[Array, "B Q *rest"]:
    """x[b, index[b, r]] for x [B, T, ...]."""
    expanded = index.reshape(index.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, expanded, axis=1, mode="clip")


def at_places(of_tokens: Shaped[Array, "B T *rest"], places: Places | None) -> Shaped[Array, "B Q *rest"]:
    """What belongs to the queries' tokens, of something that belongs to every token."""
    return of_tokens if places is None else take(of_tokens, places)


def causal_mask(segment_ids: Ids | None, shape: tuple[int, int]) -> Bool[Array, "B T T"]:
    """True where query i may see key j: j <= i, in the same document, which is not padding."""
    index, starts = jnp.arange(shape[1]), segment_starts(segment_ids, shape)
    mask = (index[None, :] <= index[:, None]) & (starts[:, :, None] == starts[:, None, :])
    return mask if segment_ids is None else mask & real_tokens(segment_ids, shape)[:, :, None]


def local_mask(segment_ids: Ids | None, shape: tuple[int, int], *, window: int, sinks: int) -> Bool[Array, "B T T"]:
    """The causal mask, cut to `window` keys including the token itself plus the first `sinks` keys of its document."""
    index = jnp.arange(shape[1])
    near = index[:, None] - index[None, :] < window
    sink = index[None, None, :] - segment_starts(segment_ids, shape)[:, :, None] < sinks
    return causal_mask(segment_ids, shape) & (near[None] | sink)


def masked_softmax(scores: Float[Array, "*dims S"], mask: Bool[Array, "*#dims S"]) -> Float[Array, "*dims S"]:
    """Softmax over the last axis of what `mask` allows, 0 elsewhere. A row that may see nothing is 0, and so are its
    gradients; one that sees only -inf is NaN."""
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, _hidden(mask)), axis=-1), 0.0)


def _hidden(mask: Bool[Array, "*dims S"]) -> Float[Array, "*dims 1"]:
    """The score of what is not seen; finite in a row that sees nothing, which so stays free of NaN."""
    return jnp.where(mask.any(axis=-1, keepdims=True), -jnp.inf, 0.0)


def scores(q: Heads, k: Float[Array, "B S K H"]) -> Float[Array, "B K G Q S"]:
    """q k^T / sqrt(H), the G = N // K query heads of a key head side by side."""
    batch, length, _, width = q.shape
    q32 = q.astype(jnp.float32).reshape(batch, length, k.shape[2], -1, width)
    return jnp.einsum("btkgh,bskh->bkgts", q32, k.astype(jnp.float32), precision=_HIGHEST) * width**-0.5


def masked_attention(q: Heads, k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Bool[Array, "B Q S"]
                     ) -> Heads:
    """softmax(q k^T / sqrt(H)) v over the keys that `mask` allows; rows that may see nothing are exactly 0."""
    weights = masked_softmax(scores(q, k), mask[:, None, None])
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v.astype(jnp.float32), precision=_HIGHEST)
    return out.reshape(q.shape).astype(q.dtype)


def full(q: Heads, k: Keys, v: Keys, *, segment_ids: Ids | None = None, places: Places | None = None) -> Heads:
    return masked_attention(q, k, v, at_places(causal_mask(segment_ids, k.shape[:2]), places))


def local(q: Heads, k: Keys, v: Keys, *, window: int, sinks: int = 0, segment_ids: Ids | None = None,
          places: Places | None = None) -> Heads:
    mask = local_mask(segment_ids, k.shape[:2], window=window, sinks=sinks)
    return masked_attention(q, k, v, at_places(mask, places))


def local_with_lse(q: Heads, k: Keys, v: Keys, *, window: int, sinks: int = 0, segment_ids: Ids | None = None,
                   places: Places | None = None) -> tuple[Heads, Float[Array, "B Q N"]]:
    mask = at_places(local_mask(segment_ids, k.shape[:2], window=window, sinks=sinks), places)
    seen = jnp.where(mask[:, None, None], scores(q, k), _hidden(mask)[:, None, None])
    lse = jax.lax.stop_gradient(jax.nn.logsumexp(seen, axis=-1))  # [B, K, G, Q]
    return masked_attention(q, k, v, mask), jnp.moveaxis(lse.reshape(q.shape[0], -1, q.shape[1]), 1, 2)


def routed(q: Heads, k: Keys, v: Keys, decisions: PerRow, *, segment_ids: Ids | None = None,
           places: Places | None = None) -> Heads:
    mask = at_places(causal_mask(segment_ids, k.shape[:2]), places)
    return masked_attention(q, k, v, mask & decisions[:, :, None])


def mixed(q: Heads, k: Keys, v: Keys, decisions: PerRow, *, window: int, sinks: int = 0,
          segment_ids: Ids | None = None, places: Places | None = None) -> Heads:
    far, near = causal_mask(segment_ids, k.shape[:2]), local_mask(segment_ids, k.shape[:2], window=window, sinks=sinks)
    mask = jnp.where(decisions[:, :, None], at_places(far, places), at_places(near, places))
    return masked_attention(q, k, v, mask)
