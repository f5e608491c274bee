"""Attention of one shard's tokens, where the tokens of a row are dealt over the axis "context".

Queries stay with the shard that has their tokens; keys and values come from all, and the shard computes its own rows,
which know their tokens' true numbers (`places`). A row is computed whole by one shard, so nothing has to be joined.
Backward each shard finds what its rows give back to every key, and the transpose of the gathering sums that over the
axis, in the dtype of the keys, and leaves each shard its tokens' part.

Bytes. K and V are the narrow part of a layer: of 131,072 tokens over 8 shards a device receives 59 MB a layer and
direction in Qwen2.5-0.5B, 235 MB in 7B, of which one layer's weights are 466 MB, gathered too. A window needs only the
ceil((W - 1) / stripe) stripes before each of a shard's own, against all other shards' in a full gather: of 8 shards
fewer than all where the window is below 900. That is left out: a shared set has gathered its keys for the global path
anyway, sinks are not among the neighbours, and what remains, the local one of two sets without sinks, would save at
most half of such a layer's exchange, a few hundredths of its time, and hold each key once for each stripe that sees it.

Routed rows are not dealt anew where `routed_imbalance` says that one shard has more than another: stripes as narrow as
the kernels' blocks even out runs of routed tokens for nothing, and what is left is cheaper than dealing. What it costs:
imbalance - 1 of the time of the mean shard's routed rows, forward and backward. What dealing would cost: if the m-th
routed row of a stripe goes to the m-th next shard, a pair of shards has at most t / C rows of t for each other, so
static buffers are exact; but they hold all t rows. Queries, outputs and the gradients of both go through them, in every
layer, while all wait: of 16,384 tokens a shard 4 x 29 MB in 0.5B, 4 x 117 MB in 7B, as many bytes as K and V with their
gradients. Over NVLink, at 131,072 tokens, that is about the time of one row in a hundred: it would pay where the routed
share x (imbalance - 1) is above 1 %, of a row a quarter as long above 4 %, and be lost elsewhere; a branch would have
to keep the residuals of both ways. Decisions of trained routers stay well below that, in rows and in the keys that they
read (`eval/speed.py --imbalance`).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from l2a_jax.attention.reference import Heads, Keys, Places
from l2a_jax.models.layer import Attention, Seen
from l2a_jax.sharding import stripes


@dataclass
class Striped(Attention):
    """The attention functions of a layer inside `shard_map`, over the tokens of one shard of `axis_name`. The segment
    ids are those of whole rows."""

    axis_name: str

    def keys(self, k: Keys, v: Keys) -> tuple[Seen, Seen]:
        return stripes.joined(k, self.axis_name), stripes.joined(v, self.axis_name)

    def places(self, q: Heads) -> Places:
        shards = jax.lax.axis_size(self.axis_name)
        mine = stripes.places(q.shape[1] * shards, shards, jax.lax.axis_index(self.axis_name))
        return jnp.broadcast_to(mine, q.shape[:2])


def striped(plain: Attention, axis_name: str) -> Striped:
    """The shard's attention from one that knows the segment ids of its tokens alone."""
    ids = plain.segment_ids
    return Striped(plain.l2a, None if ids is None else stripes.joined(ids, axis_name), plain.backend, axis_name)


def routed_imbalance(decisions: Bool[Array, "L B t"], axis_name: str | tuple[str, ...]) -> Float[Array, ""]:
    """How much longer routed attention takes than if every shard had as many routed rows: the sum over layers of the
    largest shard's, over that of the mean shard's. 1 where nothing is routed."""
    rows = jnp.sum(decisions, axis=(1, 2), dtype=jnp.float32)
    largest, mean = (jnp.sum(of_shards(rows, axis_name)) for of_shards in (jax.lax.pmax, jax.lax.pmean))
    return jnp.where(mean > 0, largest / jnp.where(mean > 0, mean, 1.0), 1.0)
