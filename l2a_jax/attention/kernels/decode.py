"""Decode kernel: one new token per row; the slots that a row reads are shared among programs, then joined.

Flash-Decoding with a range per row. Program (part, kv head, row) takes the part-th share of its row's slots for the
whole group of query heads that read this key head (padded to 16, the rows of a matrix product). How many parts a row
has follows from its own range, so a row that sees its window is one or two programs and the others return at once.
Part 0 also sees the sinks and the token itself, and writes its key and value: nobody reads that slot.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l2a_jax.attention.kernels import tile as t
from l2a_jax.attention.kernels.launch import launch, pl, plt

Cache = Float[Any, "L B S K H"]
Reads = tuple[Int[Any, " B"], Int[Any, " B"], Int[Any, " B"], Int[Any, " B"]]
"""The fields of `attention.decode.Reads`, in its order."""
MAX_PARTS = 64
MIN_KEYS = 256  # slots that are not worth a second program


def block_keys(itemsize: int) -> int:
    """Slots visited at a time."""
    return 64 if itemsize <= 2 else 32


def max_parts(slots: int) -> int:
    """Programs that may share a row of a cache: a power of two."""
    return min(MAX_PARTS, pl.next_power_of_2(pl.cdiv(slots, MIN_KEYS)))


def share(begin: Int[Array, "*B"], end: Int[Array, "*B"], places: int, block: int
          ) -> tuple[Int[Array, "*B"], Int[Array, "*B"]]:
    """(slots per part, parts) of a row; a row has one part at least."""
    count = jnp.maximum(end - begin, 0)
    each = jnp.maximum((count + places - 1) // places, MIN_KEYS)
    each = (each + block - 1) // block * block
    return each, jnp.maximum((count + each - 1) // each, 1)


def decode(
    q: Float[Array, "B N H"], k: Float[Array, "B K H"], v: Float[Array, "B K H"], k_cache: Cache, v_cache: Cache,
    layer: int, reads: tuple[Array, ...], *, sinks: int, write: bool, interpret: bool,
) -> tuple[Float[Array, "B N H"], Cache, Cache]:
    """(rows, k_cache, v_cache) of `attention.decode.attend_cache`; the caches are updated in place."""
    batch, heads, width = q.shape
    slots, kv_heads = k_cache.shape[2:4]
    places, block = max_parts(slots), block_keys(k_cache.dtype.itemsize)
    padded = max(16, pl.next_power_of_2(heads // kv_heads))
    reads = tuple(field.astype(jnp.int32) for field in reads)
    part_shape = (batch, kv_heads, places, padded)
    options = {"layer": layer, "sinks": sinks, "group": heads // kv_heads, "places": places, "block": block}
    parts, tops, totals, *caches = launch(
        functools.partial(_kernel, write=write, **options),
        "l2a_decode",
        [jax.ShapeDtypeStruct((*part_shape, *size), jnp.float32) for size in ((width,), (), ())]
        + [jax.ShapeDtypeStruct(store.shape, store.dtype) for store in (k_cache, v_cache) if write],
        (places, kv_heads, batch), warps=4, stages=3, interpret=interpret, aliases={3: 3, 4: 4} if write else {},
    )(q, k, v, k_cache, v_cache, reads)
    rows = launch(
        functools.partial(_join, group=heads // kv_heads, places=places, block=block),
        "l2a_decode_join", jax.ShapeDtypeStruct(q.shape, q.dtype), (heads, batch), warps=4, interpret=interpret,
    )(parts, tops, totals, reads)
    return rows, *(caches or (k_cache, v_cache))


def _kernel(
    q_ref: Float[Any, "B N H"], k_ref: Float[Any, "B K H"], v_ref: Float[Any, "B K H"], k_cache: Cache, v_cache: Cache,
    reads: Reads, part_ref: Float[Any, "B K P G H"], top_ref: Float[Any, "B K P G"],
    total_ref: Float[Any, "B K P G"], *stores: Cache, layer: int, sinks: int, group: int, places: int, block: int,
    write: bool,
) -> None:
    part, kv_head, batch = (pl.program_id(i) for i in range(3))
    *place, seen_ref = reads
    begin, end, slot = (ref[batch] for ref in place)
    each, parts = share(begin, end, places, block)
    layer = jnp.int32(layer)  # interpret mode takes no Python int beside a mask

    if write:
        @pl.when(part == 0)
        def _():
            for new, store in zip((k_ref, v_ref), stores, strict=True):
                store[layer, batch, slot, kv_head, :] = new[batch, kv_head, :]

    @pl.when((part < parts) & (seen_ref[batch] != 0))
    def _():
        width = q_ref.shape[2]
        padded = top_ref.shape[3]
        lane = jnp.arange(padded)
        scale = width**-0.5 * t.LOG2_E
        query = plt.load(q_ref.at[batch, pl.ds(kv_head * group, padded), :], mask=(lane < group)[:, None], other=0.0)

        def visit(start, size, high, carry):
            top, total, out = carry
            index = start + jnp.arange(size)
            visible = (index < high) & (index != slot)
            keys, values = (plt.load(ref.at[layer, batch, pl.ds(start, size), kv_head, :], mask=visible[:, None],
                                     other=0.0) for ref in (k_cache, v_cache))
            scores = jnp.where(visible[None, :], t.dot(query, keys, trans_b=True) * scale, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - new_top[:, None])
            shrink = jnp.exp2(top - new_top)
            total = total * shrink + jnp.sum(weights, axis=1)
            return new_top, total, out * shrink[:, None] + t.dot(weights.astype(values.dtype), values)

        # Part 0 starts from the token itself, the others from nothing.
        first = part == 0
        key, value = (ref[batch, kv_head, :].astype(jnp.float32)[None, :] for ref in (k_ref, v_ref))
        itself = jnp.where(first, jnp.sum(query.astype(jnp.float32) * key, axis=1) * scale, -jnp.inf)
        top = jnp.maximum(itself, t.FLOOR)
        weight = jnp.exp2(itself - top)
        carry = (top, weight, weight[:, None] * value)
        if sinks:
            size = max(16, pl.next_power_of_2(sinks))
            below = jnp.minimum(begin, sinks)
            visits = (first & (below > 0)).astype(jnp.int32)
            carry = jax.lax.fori_loop(0, visits, lambda _, carry: visit(jnp.int32(0), size, below, carry), carry)
        low = begin + part * each
        high = jnp.minimum(low + each, end)
        blocks = jnp.maximum(high - low + block - 1, 0) // block
        top, total, out = jax.lax.fori_loop(0, blocks, lambda i, c: visit(low + i * block, block, high, c), carry)
        part_ref[batch, kv_head, part, :, :] = out
        top_ref[batch, kv_head, part, :] = top
        total_ref[batch, kv_head, part, :] = total


def _join(
    part_ref: Float[Any, "B K P G H"], top_ref: Float[Any, "B K P G"], total_ref: Float[Any, "B K P G"],
    reads: Reads, out_ref: Float[Any, "B N H"], *, group: int, places: int, block: int,
) -> None:
    """Parts of one query head, joined by their maxima and sums (see `split.join`); all of them are loaded at once."""
    head, batch = pl.program_id(0), pl.program_id(1)
    kv_head, member = jax.lax.div(head, group), jax.lax.rem(head, group)
    begin_ref, end_ref, _, seen_ref = reads
    _, parts = share(begin_ref[batch], end_ref[batch], places, block)
    seen = seen_ref[batch] != 0
    real = (jnp.arange(places) < parts) & seen
    part = pl.ds(0, places)
    tops = plt.load(top_ref.at[batch, kv_head, part, member], mask=real, other=t.FLOOR)
    totals = plt.load(total_ref.at[batch, kv_head, part, member], mask=real, other=0.0)
    values = plt.load(part_ref.at[batch, kv_head, part, member, :], mask=real[:, None], other=0.0)
    weights = jnp.where(real, jnp.exp2(tops - jnp.max(tops)), 0.0)
    total = jnp.sum(totals * weights)
    rows = jnp.sum(values * weights[:, None], axis=0) / jnp.where(seen, total, 1.0)
    out_ref[batch, head, :] = rows.astype(out_ref.dtype)
