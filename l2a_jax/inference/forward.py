"""The two forward passes of generation: a whole prompt, which fills the cache, and one token, which reads it.

Both run the block of `models.layer` as it is, with an `Attention` that keeps the keys and values it is given (prefill)
or looks into the cache (decode). Rows are padded on the right, so that a token's slot is its position; what stands in
the padding is never seen by a real token and is overwritten as the row grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from l2a_jax.attention.decode import attend_cache
from l2a_jax.attention.reference import take
from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.inference.cache import Cache, Layout, empty_cache, full_reads, put, ring_of, ring_reads
from l2a_jax.models.layer import Attention, Heads, Keys, OfLayer, PerRow, block, context_of, join_projections, pruned_of
from l2a_jax.models.params import Tree
from l2a_jax.models.transformer import unembed
from l2a_jax.nn.layers import joined, rms_norm
from l2a_jax.nn.router import Scores, scores_over
from l2a_jax.sharding import stripes
from l2a_jax.sharding.attention import Striped
from l2a_jax.sharding.mesh import CONTEXT


class _Recording:
    """Beside an attention of one layer of a prefill: remembers the keys and values of both paths."""

    near = every = None

    def full(self, q: Heads, k: Keys, v: Keys) -> Heads:
        self.every = k, v
        return super().full(q, k, v)

    def local(self, q: Heads, k: Keys, v: Keys) -> Heads:
        self.near = k, v
        return super().local(q, k, v)

    def local_with_scores(self, q: Heads, k: Keys, v: Keys) -> tuple[Heads, Scores]:
        self.near = k, v
        return super().local_with_scores(q, k, v)

    def routed(self, q: Heads, k: Keys, v: Keys, decisions: PerRow) -> Heads:
        self.every = k, v
        return super().routed(q, k, v, decisions)

    def mixed(self, q: Heads, k: Keys, v: Keys, decisions: PerRow) -> Heads:
        self.near = self.every = k, v
        return super().mixed(q, k, v, decisions)


class _Recorder(_Recording, Attention):
    """Over a whole prompt."""


class _StripedRecorder(_Recording, Striped):
    """Over one shard's tokens of it; the keys and values are those of all."""


def prefill(
    params: Tree, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], config: ModelConfig,
    l2a_config: L2AConfig | None, layout: Layout, *,
    decisions: Bool[Array, "L B T"] | None = None, pruned: Bool[Array, " L"] | None = None,
    heads: Bool[Array, "L K"] | None = None, cut: Float[Array, " L"] | None = None,
    route_last: Int[Array, ""] | None = None, backend: str = "auto", shards: int = 1,
) -> tuple[Float[Array, "B V"], Cache, Bool[Array, "L B T"] | None]:
    """Logits after the last token of each row (of `lengths[b]` tokens, then padding), the cache, and the decisions.

    `decisions`, `pruned`, `heads` and `cut` are those of `hidden_states`, `route_last` is that of `generate`; padding
    is never routed. Memory is O(T): the caches are filled layer by layer. Inside `shard_map`, `shards` devices of its
    axis "context" share the tokens of whole prompts; each holds the weights, and in the end the whole cache. ValueError
    where they do not divide T.
    """
    whole = tokens.shape
    index, recorder = jnp.arange(whole[1], dtype=jnp.int32), _Recorder(l2a_config, None, backend)
    if shards > 1:
        recorder = _StripedRecorder(l2a_config, None, backend, CONTEXT)
        tokens, index = stripes.dealt(tokens, CONTEXT), stripes.dealt(index[None], CONTEXT)[0]
        if decisions is not None:
            decisions = jax.vmap(lambda rows: stripes.dealt(rows, CONTEXT))(decisions)
    positions = jnp.broadcast_to(index, tokens.shape)
    real = positions < lengths[:, None]
    routed = None if route_last is None else positions >= (lengths - route_last)[:, None]
    context = context_of(config, l2a_config, positions, real, recorder, routed=routed)
    x = params["embed"]["embedding"][tokens]
    pruned = pruned_of(config, l2a_config) if pruned is None else pruned

    def step(carry, inputs):
        x, cache = carry
        layer, given, full_place, ring_place = inputs
        x, routing = block(x, layer, context, given)
        if cache.full is not None:
            cache = cache._replace(full=put(cache.full, *full_place, *recorder.every))
        if cache.ring is not None:
            rings = (ring_of(rows, lengths, l2a_config.window, l2a_config.sinks, layout.ring_slots)
                     for rows in recorder.near)
            cache = cache._replace(ring=put(cache.ring, *ring_place, *rings))
        return (x, cache), None if routing is None else routing.decisions

    cache = empty_cache(config, layout, tokens.shape[0], x.dtype)
    given = OfLayer(decisions, None, pruned, heads, cut)
    inputs = (params["layers"], given, _scanned(layout.full), _scanned(layout.ring))
    (x, cache), decided = jax.lax.scan(step, (x, cache), inputs)
    if shards > 1:  # whoever has a row's last token gives it to all
        mine = (positions == lengths[:, None] - 1)[:, :, None]
        last = jax.lax.psum(jnp.sum(jnp.where(mine, x, 0), axis=1, keepdims=True), CONTEXT)
        if decided is not None:
            decided = jax.vmap(lambda rows: stripes.joined(rows, CONTEXT))(decided)
    else:
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return _logits(params, last, config), cache, decided


def _scanned(places: tuple[int | None, ...]) -> tuple[Int[Array, " L"], Bool[Array, " L"] | None]:
    """A layer's place in a cache and whether it has one, as arrays over the layers; no question where all have."""
    has = [place is not None for place in places]
    return jnp.asarray([place or 0 for place in places], jnp.int32), None if all(has) else jnp.asarray(has)


class DecodeParams(NamedTuple):
    """Weights as a decode step wants them: `rest` without the layers, and one tree a layer, where q, k and v are one
    product, and so are gate and up."""

    rest: Tree
    layers: tuple[Tree, ...]


def decode_params(params: Tree) -> DecodeParams:
    """The layers taken apart and their products joined, once per generation: a step then starts few kernels."""
    stack = join_projections(params["layers"])
    stack["mlp"] = {"gate_up": joined(stack["mlp"], ("gate", "up")), "down": stack["mlp"]["down"]}
    count = params["layers"]["norm_mlp"]["scale"].shape[0]
    layers = tuple(jax.tree.map(lambda leaf: leaf[layer], stack) for layer in range(count))  # noqa: B023
    return DecodeParams({name: tree for name, tree in params.items() if name != "layers"}, layers)


@dataclass
class _Reader(Attention):
    """The attention of a decode step: looks at the cache of one layer after the other, and stores the token there."""

    cache: Cache
    layout: Layout
    position: Int[Array, " B"]
    active: Bool[Array, " B"]
    layer: int = 0
    stored: bool = False

    def full(self, q: Heads, k: Keys, v: Keys) -> Heads:
        return self._full(q, k, v, 0, self.active, 0)

    def local(self, q: Heads, k: Keys, v: Keys) -> Heads:
        place = self.layout.ring[self.layer]
        if place is None:
            return self._full(q, k, v, self._window(), self.active, self.l2a.sinks)
        reads = ring_reads(self.position, self.active, self.l2a.window, self.l2a.sinks, self.layout.ring_slots)
        rows, ring = attend_cache(q[:, 0], k[:, 0], v[:, 0], self.cache.ring, place, reads, backend=self.backend)
        self.cache = self.cache._replace(ring=ring)
        return rows[:, None]

    def local_with_scores(self, q: Heads, k: Keys, v: Keys) -> tuple[Heads, Scores]:
        """The scores are taken once more, from the keys in the cache: the token's own is there by now."""
        rows, place = self.local(q, k, v), self.layout.ring[self.layer]
        position, sinks = self.position[:, None], self.l2a.sinks
        if place is None:
            place, keys = self.layout.full[self.layer], self.cache.full.k
            near = jnp.maximum(position + 1 - self.l2a.window, sinks) + jnp.arange(self.l2a.window)
            first = jnp.broadcast_to(jnp.arange(sinks), (near.shape[0], sinks))
            slots = jnp.concatenate([first, near], axis=1)
            held = take(keys[place], jnp.minimum(slots, keys.shape[2] - 1))
        else:
            held = self.cache.ring.k[place]
            slots = jnp.arange(held.shape[1])[None]
        return rows, scores_over(q[:, 0], held, slots <= position, jnp.broadcast_to(slots < sinks, held.shape[:2]))

    def routed(self, q: Heads, k: Keys, v: Keys, decisions: PerRow) -> Heads:
        if self.layout.full[self.layer] is None:
            return jnp.zeros_like(q)
        return self._full(q, k, v, 0, decisions[:, 0], 0)

    def mixed(self, q: Heads, k: Keys, v: Keys, decisions: PerRow) -> Heads:
        if self.layout.full[self.layer] is None:
            return self.local(q, k, v)
        begin = jnp.where(decisions[:, 0], 0, self._window())
        return self._full(q, k, v, begin, self.active, self.l2a.sinks)

    def _window(self) -> Int[Array, " B"]:
        return jnp.maximum(self.position + 1 - self.l2a.window, 0)

    def _full(self, q: Heads, k: Keys, v: Keys, begin: Int[Array, " B"] | int, seen: Bool[Array, " B"],
              sinks: int) -> Heads:
        # A shared layer whose router has seen local attention looks twice; the token is stored the first time.
        rows, full = attend_cache(q[:, 0], k[:, 0], v[:, 0], self.cache.full, self.layout.full[self.layer],
                                  full_reads(self.position, seen, begin), sinks=sinks, write=not self.stored,
                                  backend=self.backend)
        self.cache, self.stored = self.cache._replace(full=full), True
        return rows[:, None]


def decode_step(
    params: DecodeParams, tokens: Int[Array, " B"], position: Int[Array, " B"], active: Bool[Array, " B"], cache: Cache,
    config: ModelConfig, l2a_config: L2AConfig | None, layout: Layout, *,
    decisions: Bool[Array, "L B"] | None = None, pruned: Bool[Array, " L"] | None = None,
    heads: Bool[Array, "L K"] | None = None, cut: Float[Array, " L"] | None = None, backend: str = "auto",
) -> tuple[Float[Array, "B V"], Cache, Bool[Array, "L B"] | None]:
    """Logits after one more token per row, at `position` (the number of tokens before it); cache; decisions.

    Rows that are not `active` read nothing; their logits mean nothing. `decisions` override the router; `pruned`,
    `heads` and `cut` are those of `hidden_states`.
    """
    reader = _Reader(l2a_config, None, backend, cache, layout, position, active)
    context = context_of(config, l2a_config, position[:, None], active[:, None], reader)
    x = params.rest["embed"]["embedding"][tokens[:, None]]
    decided = []
    for index, layer in enumerate(params.layers):
        reader.layer, reader.stored = index, False
        forced = None if decisions is None else decisions[index][:, None]
        own = jnp.asarray(True) if l2a_config is not None and index in l2a_config.pruned_layers else None
        off = own if pruned is None else pruned[index]
        opened, least = (None if of is None else of[index] for of in (heads, cut))
        x, routing = block(x, layer, context, OfLayer(forced, None, off, opened, least))
        decided.append(None if routing is None else routing.decisions[:, 0])
    return _logits(params.rest, x, config), reader.cache, None if l2a_config is None else jnp.stack(decided)


def _logits(params: Any, x: Float[Array, "B T D"], config: ModelConfig) -> Float[Array, "B V"]:
    return unembed(params, rms_norm(x, params["norm_final"], config.rms_norm_eps), config)[:, 0]
