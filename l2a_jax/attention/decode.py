"""Attention of one new token per row over a cache of keys and values: the decode step's side of the public face.

A cache holds the keys and values of several layers, [L, B, S, K, H], S slots a row. Every call is for one layer and
does two things at once, so that on a GPU they are one kernel: it writes the new token's key and value into its slot,
and lets the token look at the slots that its row of `Reads` names, and at itself. A row that reads little costs
little, whatever its neighbours read and however long the cache is: routing is a range of slots, not a branch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from l2a_jax import device
from l2a_jax.attention.api import Call, choose
from l2a_jax.attention.kernels import decode as kernel
from l2a_jax.attention.kernels.tile import FLOOR
from l2a_jax.attention.reference import masked_attention
from l2a_jax.attention.xla import dot, softmax_step
from l2a_jax.errors import Unsupported

Query = Float[Array, "B N H"]
Key = Float[Array, "B K H"]
CHUNK = 256  # slots that the XLA version visits at a time


class KV(NamedTuple):
    """Keys (rotated) and values of some layers."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]


class Reads(NamedTuple):
    """What the new token of each row looks at: slots begin..end - 1 but `slot`, the first `sinks` slots below `begin`,
    and itself. Its key and value go to `slot`, `seen` or not. A row that is not `seen` gives exactly 0."""

    begin: Int[Array, " B"]
    end: Int[Array, " B"]
    slot: Int[Array, " B"]
    seen: Bool[Array, " B"]


def attend_cache(q: Query, k: Key, v: Key, cache: KV, layer: int, reads: Reads, *, sinks: int = 0, write: bool = True,
                 backend: str = "auto") -> tuple[Query, KV]:
    """(the new tokens' attention, the cache with them in it) for one layer of the cache.

    q, k, v: the new tokens, rotated, taken in the cache's dtype; the result has q's. `write` False: the token is in its
    slot already (a second look by the same token), and the cache comes back as it was. Where `sinks` is 0 nothing below
    `begin` is seen. Raises ValueError on shapes that do not fit, Unsupported where the named backend cannot serve.
    """
    batch, slots, kv_heads, width = cache.k.shape[1:]
    if q.shape[0] != batch or k.shape != (batch, kv_heads, width) or v.shape != k.shape or q.shape[2] != width:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit the cache {cache.k.shape}")
    if not 0 <= layer < cache.k.shape[0] or q.shape[1] % kv_heads or cache.v.shape != cache.k.shape:
        raise ValueError(f"layer {layer} of the cache {cache.k.shape}, {cache.v.shape} with {q.shape[1]} heads")
    if cache.k.dtype != cache.v.dtype:
        raise ValueError(f"the cache holds keys of {cache.k.dtype} and values of {cache.v.dtype}; expected one dtype")
    call = Call("decode", batch, slots, q.shape[1], kv_heads, width, jnp.dtype(cache.k.dtype).name, sinks=sinks)
    name = choose(call, backend, device.platform())
    dtype = q.dtype
    q, k, v = (x.astype(cache.k.dtype) for x in (q, k, v))
    with jax.named_scope("attention_decode"):
        if name in KERNELS:
            rows, *stored = kernel.decode(q, k, v, *cache, layer, reads, sinks=min(sinks, slots), write=write,
                                          interpret=name == "pallas_interpret")
            return rows.astype(dtype), KV(*stored)
        if name not in LOOKS:
            raise Unsupported(f"attention backend {name!r} has no decode step; expected one of "
                              f"{', '.join((*KERNELS, *LOOKS))}")
        if write:
            at = (layer, jnp.arange(batch), reads.slot)
            cache = KV(*(store.at[at].set(new, mode="promise_in_bounds", unique_indices=True)
                         for store, new in zip(cache, (k, v), strict=True)))
        return LOOKS[name](q, k, v, cache, layer, reads, min(sinks, slots)).astype(dtype), cache


def _reference(q: Query, k: Key, v: Key, cache: KV, layer: int, reads: Reads, sinks: int) -> Query:
    """The definition, over every slot: the oracle of the other two."""
    index = jnp.arange(cache.k.shape[2])
    begin, end, slot, seen = (field[:, None] for field in reads)
    mask = ((begin <= index) & (index < end)) | (index < jnp.minimum(begin, sinks))
    mask = jnp.pad(mask & (index != slot), ((0, 0), (0, 1)), constant_values=True) & seen  # the token itself is last
    keys, values = (jnp.concatenate([store[layer], new[:, None]], axis=1)
                    for store, new in zip(cache, (k, v), strict=True))
    return masked_attention(q[:, None], keys, values, mask[:, None])[:, 0]


def _xla(q: Query, k: Key, v: Key, cache: KV, layer: int, reads: Reads, sinks: int) -> Query:
    """Rows one after another, each over the chunks of its own range, with an online softmax."""
    slots, kv_heads, width = cache.k.shape[2:]
    size, scale = min(CHUNK, slots), width**-0.5

    def one(row):
        number, query, key, value, mine = row
        query = query.reshape(kv_heads, -1, width)

        def visit(start, length, low, high, carry):
            start = jnp.clip(start, 0, slots - length)
            keys, values = (jax.lax.dynamic_slice(store, (layer, number, start, 0, 0), (1, 1, length, *store.shape[3:]))
                            [0, 0] for store in cache)
            index = start + jnp.arange(length)
            visible = (low <= index) & (index < high) & (index != mine.slot)
            scores = jnp.where(visible, dot("kgh,skh->kgs", query, keys) * scale, -jnp.inf)
            return softmax_step(carry, scores, "kgs,skh->kgh", values)

        def step(i, carry):
            low = mine.begin + i * size  # a chunk at the end of the cache starts earlier, and skips what was seen
            return visit(low, size, low, jnp.minimum(low + size, mine.end), carry)

        itself = dot("kgh,kh->kg", query, key.astype(query.dtype)) * scale
        top = jnp.maximum(itself, FLOOR)
        weight = jnp.exp(itself - top)
        carry = (top, weight, weight[..., None] * value[:, None].astype(jnp.float32))
        count = jnp.where(mine.seen, (mine.end - mine.begin + size - 1) // size, 0)
        carry = jax.lax.fori_loop(0, count, step, carry)
        if sinks:
            carry = visit(0, sinks, 0, jnp.minimum(mine.begin, sinks), carry)
        return jnp.where(mine.seen, carry[2] / carry[1][..., None], 0.0).astype(q.dtype)

    rows = jax.lax.map(one, (jnp.arange(q.shape[0]), q, k, v, reads))
    return rows.reshape(q.shape)


# The backends that decode: kernels, which write the cache as they read it, and those that only look.
KERNELS = ("pallas", "pallas_interpret")
LOOKS = {"reference": _reference, "xla": _xla}
