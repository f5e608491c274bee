"""The two forward passes of generation: a whole prompt, which fills the cache, and one token, which reads it.

Both run the layer of `models.l2a` as it is: its context's `attention` is replaced by an object that keeps the keys and
values it is given (prefill), or looks into the cache (decode). Rows are padded on the right, so that a token's slot is
its position; what stands in the padding is never seen by a real token and is overwritten as the row grows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from l2a_jax import attention
from l2a_jax.attention.decode import attend_cache
from l2a_jax.config import L2AConfig, ModelConfig, rope_of
from l2a_jax.inference.cache import Cache, Layout, empty_cache, full_reads, put, ring_of, ring_reads
from l2a_jax.models.layer import Context, attend, join_projections
from l2a_jax.models.params import Tree
from l2a_jax.models.transformer import unembed
from l2a_jax.nn.layers import gated_mlp, joined, linear, rms_norm
from l2a_jax.nn.rope import rope_table


class _Recorder:
    """`l2a_jax.attention` for one layer of a prefill, remembering the keys and values of both paths."""

    near = every = None

    def local(self, q, k, v, **options):
        self.near = k, v
        return attention.local(q, k, v, **options)

    def routed(self, q, k, v, decisions, **options):
        self.every = k, v
        return attention.routed(q, k, v, decisions, **options)

    def mixed(self, q, k, v, decisions, **options):
        self.near = self.every = k, v
        return attention.mixed(q, k, v, decisions, **options)

    def full(self, q, k, v, **options):
        self.every = k, v
        return attention.full(q, k, v, **options)


def prefill(
    params: Tree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, B],
    config: ModelConfig,
    l2a_config: L2AConfig | None,
    layout: Layout,
    *,
    decisions: Bool[Array, "L B T"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "B V"], Cache, Bool[Array, "L B T"] | None]:
    """Logits after the last token of each row (of `lengths[b]` tokens, then padding), the cache, and the decisions.

    `decisions` override the router; padding is never routed. Memory is O(T): the caches are filled layer by layer.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    real = positions < lengths[:, None]
    context = _context(config, l2a_config, positions, real, backend)
    x = params["embed"]["embedding"][tokens]
    pruned = None
    if l2a_config is not None and l2a_config.pruned_layers:
        pruned = jnp.isin(jnp.arange(config.num_layers), jnp.asarray(l2a_config.pruned_layers))

    def block(carry, inputs):
        x, cache = carry
        layer, forced, pruned, full_place, ring_place = inputs
        recorder = _Recorder()
        x, routing = attend(x, layer, context._replace(attention=recorder), forced, None, pruned)
        x = x + gated_mlp(rms_norm(x, layer["norm_mlp"], config.rms_norm_eps), layer["mlp"])
        if cache.full is not None:
            cache = cache._replace(full=put(cache.full, *full_place, *recorder.every))
        if cache.ring is not None:
            rings = (ring_of(rows, lengths, l2a_config.window, l2a_config.sinks, layout.ring_slots)
                     for rows in recorder.near)
            cache = cache._replace(ring=put(cache.ring, *ring_place, *rings))
        return (x, cache), None if routing is None else routing.decisions

    cache = empty_cache(config, layout, tokens.shape[0], x.dtype)
    inputs = (params["layers"], decisions, pruned, _scanned(layout.full), _scanned(layout.ring))
    (x, cache), decided = jax.lax.scan(block, (x, cache), inputs)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return _logits(params, last, config), cache, decided


def _scanned(places):
    """A layer's place in a cache and whether it has one, as arrays over the layers; no question where all have."""
    has = [place is not None for place in places]
    index = jnp.asarray([place or 0 for place in places], jnp.int32)
    return index, None if all(has) else jnp.asarray(has)


class DecodeParams(NamedTuple):
    """Weights as a decode step wants them: `rest` without the layers, and one tree a layer, where q, k and v are one
    product, and so are gate and up."""

    rest: Tree
    layers: tuple[Tree, ...]


def decode_params(params: Tree) -> DecodeParams:
    """The layers taken apart and their products joined, once per generation: a step then starts few kernels."""

    block = join_projections(params["layers"])
    block["mlp"] = {"gate_up": joined(block["mlp"], ("gate", "up")), "down": block["mlp"]["down"]}
    count = params["layers"]["norm_mlp"]["scale"].shape[0]
    layers = tuple(jax.tree.map(lambda leaf: leaf[layer], block) for layer in range(count))  # noqa: B023
    return DecodeParams({name: tree for name, tree in params.items() if name != "layers"}, layers)


class _Reader:
    """`l2a_jax.attention` for one layer of a decode step: looks at the cache, and holds the new one afterwards."""

    def __init__(self, cache: Cache, layout: Layout, layer: int, position, real, l2a_config):
        self.cache, self.position, self.real, self.l2a = cache, position, real, l2a_config
        self.full_place, self.ring_place, self.slots = layout.full[layer], layout.ring[layer], layout.ring_slots
        self.stored = False

    def full(self, q, k, v, *, segment_ids, backend):
        return self._full(q, k, v, 0, self.real, 0, backend)

    def local(self, q, k, v, *, window, sinks, segment_ids, backend):
        if self.ring_place is None:
            return self._full(q, k, v, self._window(window), self.real, sinks, backend)
        reads = ring_reads(self.position, self.real, window, sinks, self.slots)
        rows, ring = attend_cache(q[:, 0], k[:, 0], v[:, 0], self.cache.ring, self.ring_place, reads, backend=backend)
        self.cache = self.cache._replace(ring=ring)
        return rows[:, None]

    def routed(self, q, k, v, decisions, *, segment_ids, backend):
        if self.full_place is None:
            return jnp.zeros_like(q)
        return self._full(q, k, v, 0, decisions[:, 0], 0, backend)

    def mixed(self, q, k, v, decisions, *, window, sinks, segment_ids, backend):
        if self.full_place is None:
            return self.local(q, k, v, window=window, sinks=sinks, segment_ids=segment_ids, backend=backend)
        begin = jnp.where(decisions[:, 0], 0, self._window(window))
        return self._full(q, k, v, begin, self.real, sinks, backend)

    def _window(self, window):
        return jnp.maximum(self.position + 1 - window, 0)

    def _full(self, q, k, v, begin, seen, sinks, backend):
        # A shared layer whose router has seen local attention looks twice; the token is stored the first time.
        rows, full = attend_cache(q[:, 0], k[:, 0], v[:, 0], self.cache.full, self.full_place,
                                  full_reads(self.position, seen, begin), sinks=sinks, write=not self.stored,
                                  backend=backend)
        self.cache, self.stored = self.cache._replace(full=full), True
        return rows[:, None]


def decode_step(
    params: DecodeParams,
    tokens: Int[Array, B],
    position: Int[Array, B],
    active: Bool[Array, B],
    cache: Cache,
    config: ModelConfig,
    l2a_config: L2AConfig | None,
    layout: Layout,
    *,
    decisions: Bool[Array, "L B"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "B V"], Cache, Bool[Array, "L B"] | None]:
    """Logits after one more token per row, at `position` (the number of tokens before it); cache; decisions.

    Rows that are not `active` read nothing; their logits mean nothing. `decisions` override the router.
    """
    context = _context(config, l2a_config, position[:, None], active[:, None], backend)
    x = params.rest["embed"]["embedding"][tokens[:, None]]
    decided = []
    for index, layer in enumerate(params.layers):
        reader = _Reader(cache, layout, index, position, active, l2a_config)
        forced = None if decisions is None else decisions[index][:, None]
        pruned = jnp.asarray(True) if l2a_config is not None and index in l2a_config.pruned_layers else None
        x, routing = attend(x, layer, context._replace(attention=reader), forced, None, pruned)
        gate, up = jnp.split(linear(rms_norm(x, layer["norm_mlp"], config.rms_norm_eps), layer["mlp"]["gate_up"]), 2,
                             axis=-1)
        x = x + linear(jax.nn.silu(gate) * up, layer["mlp"]["down"])
        cache = reader.cache
        decided.append(None if routing is None else routing.decisions[:, 0])
    return _logits(params.rest, x, config), cache, None if l2a_config is None else jnp.stack(decided)


def _context(config, l2a_config, positions, real, backend) -> Context:
    rope = rope_table(positions, config, rope_of(config, l2a_config))
    return Context(config, l2a_config, rope, None, real, False, backend)


def _logits(params: Any, x: Float[Array, "B T D"], config: ModelConfig) -> Float[Array, "B V"]:
    return unembed(params, rms_norm(x, params["norm_final"], config.rms_norm_eps), config)[:, 0]
