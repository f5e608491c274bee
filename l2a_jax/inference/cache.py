"""What generation remembers: keys and values of every token where they may be needed, of a window where not.

- `full`, [F, B, S, K, H]: every token of a row, slot = position. Plain layers, and layers that can still route.
- `ring`, [R, B, sinks + window, K, H]: the sinks, then a ring of the last `window` tokens. The local sets of separate
  attention (in every layer), and shared layers that are pruned.

With shared attention one full cache serves both paths: a local row reads just its window and sinks from it. Keys are
stored rotated, in token-major order: a new token is one contiguous write, and no layout is ever transposed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from l2a_jax import device
from l2a_jax.attention.decode import KV, Reads
from l2a_jax.config import L2AConfig, ModelConfig


class Layout(NamedTuple):
    """Which layers have which cache: `full[l]` and `ring[l]` are a layer's place in it, or None."""

    full: tuple[int | None, ...]
    ring: tuple[int | None, ...]
    slots: int  # of the full cache: the longest row, in tokens
    ring_slots: int

    @property
    def full_layers(self) -> int:
        """F, the number of layers that keep every token."""
        return sum(place is not None for place in self.full)

    @property
    def ring_layers(self) -> int:
        """R, the number of layers that keep a window."""
        return sum(place is not None for place in self.ring)


class Cache(NamedTuple):
    """Both caches; None where no layer has one."""

    full: KV | None
    ring: KV | None


def layout_of(config: ModelConfig, l2a_config: L2AConfig | None, slots: int) -> Layout:
    """The caches of a model for rows of up to `slots` tokens."""
    layers = range(config.num_layers)
    if l2a_config is None:
        return Layout(tuple(layers), (None,) * config.num_layers, slots, 0)
    pruned = set(l2a_config.pruned_layers)
    full = [layer not in pruned for layer in layers]
    ring = [layer in pruned or not l2a_config.share_attention for layer in layers]
    return Layout(_places(full), _places(ring), slots, min(slots, l2a_config.window + l2a_config.sinks))


def _places(has: list[bool]) -> tuple[int | None, ...]:
    number = np.cumsum(has) - 1
    return tuple(int(n) if here else None for n, here in zip(number, has, strict=True))


def empty_cache(config: ModelConfig, layout: Layout, batch: int, dtype: Any) -> Cache:
    """A cache of zeros."""

    def store(layers, slots):
        shape = (layers, batch, slots, config.num_kv_heads, config.head_dim)
        return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) if layers else None

    return Cache(store(layout.full_layers, layout.slots), store(layout.ring_layers, layout.ring_slots))


def cache_bytes(config: ModelConfig, l2a_config: L2AConfig | None, batch: int, tokens: int,
                dtype: Any = jnp.bfloat16) -> int:
    """Bytes of the cache of `batch` rows of `tokens` tokens."""
    layout = layout_of(config, l2a_config, tokens)
    per_slot = 2 * batch * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    return per_slot * (layout.full_layers * layout.slots + layout.ring_layers * layout.ring_slots)


def spare_bytes(params: Any) -> int:
    """Bytes of device memory beside the weights, of which decoding has a copy of its own."""
    return device.memory_bytes() - 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def ring_slot(position: Int[Array, "*S"], window: int, sinks: int) -> Int[Array, "*S"]:
    """The ring's slot of a position: the sinks stay, the others take turns."""
    return jnp.where(position < sinks, position, sinks + (position - sinks) % window)


def ring_of(rows: Float[Array, "B T K H"], lengths: Int[Array, " B"], window: int, sinks: int,
            slots: int) -> Float[Array, "B S K H"]:
    """The ring after the first `lengths[b]` tokens of each row; slots that no token has yet hold anything finite."""
    slot = jnp.arange(slots)
    last = lengths[:, None] - 1
    # The newest token p < length of a slot in the ring: p = slot modulo the window.
    newest = last - (last - slot) % window
    held = jnp.where(slot < sinks, slot, newest)
    return jnp.take_along_axis(rows, jnp.clip(held, 0, rows.shape[1] - 1)[:, :, None, None], axis=1)


def ring_reads(position: Int[Array, " B"], seen: Bool[Array, " B"], window: int, sinks: int, slots: int) -> Reads:
    """What the token at `position` reads of a ring: every slot in use but its own, where the oldest token leaves."""
    slot = ring_slot(position, window, sinks)
    return Reads(jnp.zeros_like(position), jnp.minimum(position, slots), slot, seen)


def full_reads(position: Int[Array, " B"], seen: Bool[Array, " B"], begin: Int[Array, " B"] | int) -> Reads:
    """What the token at `position` reads of a full cache: the slots from `begin` on."""
    return Reads(jnp.broadcast_to(jnp.asarray(begin, jnp.int32), position.shape), position, position, seen)


def put(store: KV, place: Int[Array, ""] | int, kept: Bool[Array, ""] | None, k: Array, v: Array) -> KV:
    """The first slots of one layer's cache set to k and v [B, T, K, H]; `kept` False: left as they are."""

    def one(store, new):
        new = new.astype(store.dtype)[None]
        start = (place, 0, 0, 0, 0)
        if kept is not None:
            new = jnp.where(kept, new, jax.lax.dynamic_slice(store, start, new.shape))
        return jax.lax.dynamic_update_slice(store, new, start)

    return KV(one(store.k, k), one(store.v, v))
