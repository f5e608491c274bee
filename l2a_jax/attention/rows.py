"""What each query row may see, as two intervals of keys; and the order in which rows are worked on.

Every operation of this package is the same computation over different rows: a row sees the keys `low..high` (its
window, or its whole document) and the keys `sink_low..sink_high - 1` (its document's first keys, where the window has
left them). The XLA and the Pallas backend both work from these four numbers per row, so no mask is ever stored.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from l2a_jax.attention.reference import Places, at_places, real_tokens, segment_starts


class Rows(NamedTuple):
    """Key j is visible where low <= j <= high, or sink_low <= j < sink_high. A row with high = -1 sees nothing."""

    low: Int[Array, "B R"]
    high: Int[Array, "B R"]
    sink_low: Int[Array, "B R"]
    sink_high: Int[Array, "B R"]

    def visible(self, keys: Int[Array, " S"]) -> Bool[Array, "B R S"]:
        """The mask itself, for a few keys at a time."""
        low, high, sink_low, sink_high = (field[:, :, None] for field in self)
        return ((low <= keys) & (keys <= high)) | ((sink_low <= keys) & (keys < sink_high))


def token_rows(
    shape: tuple[int, int],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    window: int | None = None,
    sinks: int = 0,
    seen: Bool[Array, "B Q"] | None = None,
    everything: Bool[Array, "B Q"] | None = None,
    places: Places | None = None,
) -> Rows:
    """One row per token of `shape` [B, T], or for those at `places`. `window` None: the whole document; `everything`:
    rows that see it all the same; `seen` False (not routed) and padding: rows that see nothing."""
    index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape) if places is None else places
    start = at_places(segment_starts(segment_ids, shape), places)
    low = start if window is None else jnp.maximum(start, index - (min(window, shape[1]) - 1))
    if everything is not None:
        low = jnp.where(everything, start, low)
    sink_high = jnp.minimum(low, start + min(sinks, shape[1]))
    alive = jnp.ones(index.shape, bool) if seen is None else seen
    if segment_ids is not None:
        alive = alive & at_places(real_tokens(segment_ids, shape), places)
    return Rows(
        jnp.where(alive, low, 0), jnp.where(alive, index, -1),
        jnp.where(alive, start, 0), jnp.where(alive, sink_high, 0),
    )


class Order(NamedTuple):
    """A working order of the tokens. Row r of it is token `index[b, r]`; token t is its row `rank[b, t]`. Where queries
    are a part of the tokens, tokens are counted among the queries.

    Rows that are nobody's have index -1; all rows r >= count[b] are. `first` counts the rows of the leading group (see
    `partition`).
    """

    index: Int[Array, "B R"]
    rank: Int[Array, "B T"]
    count: Int[Array, " B"]
    first: Int[Array, " B"]


def compact(decisions: Bool[Array, "B T"]) -> Order:
    """Tokens with a True decision, in order; a cumulative sum and a scatter, no sort."""
    rank = jnp.cumsum(decisions, axis=1, dtype=jnp.int32) - 1
    count = rank[:, -1] + 1
    return Order(_invert(jnp.where(decisions, rank, decisions.shape[1])), jnp.maximum(rank, 0), count, count)


def partition(decisions: Bool[Array, "B T"]) -> Order:
    """All tokens: those with a True decision first, then the others, each group in order."""
    true_rank = jnp.cumsum(decisions, axis=1, dtype=jnp.int32) - 1
    first = true_rank[:, -1] + 1
    false_rank = jnp.cumsum(~decisions, axis=1, dtype=jnp.int32) - 1 + first[:, None]
    rank = jnp.where(decisions, true_rank, false_rank)
    return Order(_invert(rank), rank, jnp.full_like(first, decisions.shape[1]), first)


def align_groups(order: Order, decisions: Bool[Array, "B T"], align: int, size: int) -> Order:
    """A partition of `size` rows whose second group starts at a multiple of `align` rows."""
    gap = -order.first % align
    rank = jnp.where(decisions, order.rank, order.rank + gap[:, None])
    return Order(_invert(rank, size), rank, order.count + gap, order.first)


def _invert(rank: Int[Array, "B T"], size: int | None = None) -> Int[Array, "B R"]:
    """index with index[b, rank[b, t]] = t; ranks outside 0..size-1 are dropped, rows that nobody has hold -1."""
    batch, length = rank.shape
    token = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), rank.shape)
    index = jnp.full((batch, length if size is None else size), -1, jnp.int32)
    return index.at[jnp.arange(batch)[:, None], rank].set(token, mode="drop", unique_indices=True)
