"""Gradients of the attention sinks: the few keys that nearly every row sees.

Inside the key kernel they would be one long program that all others wait for. Here every chunk of rows writes its own
share and the shares are added in a fixed order, so the result is the same in every run. A chunk spans at most
`window` tokens: then all its rows that still see sinks (from beyond their window) belong to one document. Which chunks
of a packed row belong together is a table of (T / min(window, 64))^2 numbers: 17 MB for 131,072 tokens, but 4.3 GB at a
window of 4. Rows at places of their own may lie far apart: their chunks also end where another document's sinks come
into sight.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l2a_jax.attention.kernels import tile as t
from l2a_jax.attention.kernels.launch import launch, pl, plt
from l2a_jax.attention.kernels.plan import Block, Spec
from l2a_jax.attention.kernels.tile import HeadsRef, KeysRef, NumbersRef
from l2a_jax.attention.reference import Heads, Keys, take
from l2a_jax.attention.rows import Rows, compact

MAX_SINKS = 64  # more would not fit the shared memory of an sm_89 card at head width 128


def add_sink_gradients(
    spec: Spec, block: Block, d_k: Keys, d_v: Keys, q: Heads, k: Keys, v: Keys, rows: Rows | None,
    lse: Float[Array, "B N Q"], delta: Float[Array, "B N Q"], d_out: Heads,
) -> tuple[Keys, Keys]:
    """(dk, dv) with the sinks' share. Everything is in the order of q; `rows` None: they follow from row numbers."""
    batch, chunk = q.shape[0], min(spec.window, block.rows)
    chunks, begins = pl.cdiv(spec.queries, chunk), None
    origin = None if rows is None else _origins(rows, chunk, chunks)
    if spec.segmented and spec.placed is not None:
        chunk = block.rows
        begins, origin = _chunks_of_documents(spec, rows, chunk)
        chunks = origin.shape[1]
    share = jax.ShapeDtypeStruct((batch, chunks, spec.kv_heads, _padded(spec), spec.width), jnp.float32)
    shares = launch(
        functools.partial(_kernel, spec=spec, chunk=chunk),
        "l2a_attention_sinks", (share, share), (spec.kv_heads, chunks, batch),
        warps=block.num_warps, stages=block.num_stages, interpret=spec.interpret,
    )(q, k, v, lse, delta, d_out, None if rows is None else (begins, origin, rows.sink_low, rows.sink_high))
    shares = [share[..., : spec.sinks, :] for share in shares]
    if origin is None or not spec.segmented:
        count = min(spec.sinks, spec.length)
        return tuple(x.at[:, :count].add(share.sum(1)[:, :, :count].swapaxes(1, 2).astype(x.dtype))
                     for x, share in zip((d_k, d_v), shares, strict=True))
    # One document's chunks: its first one receives the sum of all, by a matrix product (a scatter would add in an
    # order of its own); the others are sent out of range.
    same = (origin[:, :, None] == origin[:, None, :]) & (origin < t.FAR)[:, :, None]
    is_first = ~jnp.any(jnp.tril(same, -1), axis=2) & (origin < t.FAR)
    target = jnp.where(is_first, origin, spec.length)[:, :, None] + jnp.arange(spec.sinks)
    where = (jnp.arange(batch)[:, None, None], target)

    def add(x, share):
        highest = jax.lax.Precision.HIGHEST
        total = jnp.einsum("bcd,bdksh->bcskh", same.astype(jnp.float32), share, precision=highest)
        return x.at[where].add(total.astype(x.dtype), mode="drop")

    return tuple(add(x, share) for x, share in zip((d_k, d_v), shares, strict=True))


def _padded(spec: Spec) -> int:
    return max(16, pl.next_power_of_2(spec.sinks))


def _origins(rows: Rows, chunk: int, chunks: int) -> Int[Array, "B C"]:
    """First sink that a row of each chunk sees from beyond its window; FAR where none does."""
    first = jnp.where(rows.sink_low < rows.sink_high, rows.sink_low, t.FAR)
    first = jnp.pad(first, ((0, 0), (0, chunks * chunk - first.shape[1])), constant_values=t.FAR)
    return first.reshape(-1, chunks, chunk).min(-1)


def _chunks_of_documents(spec: Spec, rows: Rows, chunk: int) -> tuple[Int[Array, "B S"], Int[Array, "B C"]]:
    """(the first row of each chunk, and the end; the first sink that its rows see, FAR or an earlier chunk's where they
    see none): chunks of up to `chunk` rows, all of which see the sinks of one document."""
    count = rows.high.shape[1]
    # A row sees sinks beside its window where the document has more tokens than that: so many documents at most.
    chunks = min(count, pl.cdiv(count, chunk) + spec.length // (spec.window + 1))
    latest = jax.lax.cummax(jnp.where(rows.sink_low < rows.sink_high, rows.sink_low, -1), axis=1)
    changes = jnp.pad(latest[:, 1:] != latest[:, :-1], ((0, 0), (1, 0)))
    begins = compact(changes | (jnp.arange(count) % chunk == 0)).index[:, :chunks]
    begins = jnp.pad(jnp.where(begins < 0, count, begins), ((0, 0), (0, 1)), constant_values=count)
    origin = take(latest, begins[:, 1:] - 1)
    return begins, jnp.where(origin < 0, t.FAR, origin)


def _kernel(
    q_ref: HeadsRef, k_ref: KeysRef, v_ref: KeysRef, lse_ref: NumbersRef, delta_ref: NumbersRef,
    d_out_ref: HeadsRef, tables: tuple | None, d_k_ref: Float[Any, "B C K sinks H"],
    d_v_ref: Float[Any, "B C K sinks H"], *, spec: Spec, chunk: int,
) -> None:
    kv_head, number, batch = (pl.program_id(i) for i in range(3))
    size = max(16, pl.next_power_of_2(chunk))  # a window below 16 leaves rows unused
    begins = None if tables is None else tables[0]
    start = number * chunk if begins is None else begins[batch, number]
    here = pl.ds(start, size)
    inside = (jnp.arange(size) < chunk) & (start + jnp.arange(size) < spec.queries)
    if begins is not None:
        inside &= start + jnp.arange(size) < begins[batch, number + 1]
    padded = _padded(spec)
    if tables is None:
        first, low = jnp.int32(0), jnp.zeros((size,), jnp.int32)
        high = jnp.clip(start + jnp.arange(size) - (spec.window - 1), 0, spec.sinks)
    else:
        _, origins, low_ref, high_ref = tables
        first = jnp.minimum(origins[batch, number], spec.length)
        low = plt.load(low_ref.at[batch, here], mask=inside, other=0)
        high = plt.load(high_ref.at[batch, here], mask=inside, other=0)
    keys_at = first + jnp.arange(padded)
    visible = t.see(low[None, :], high[None, :] - 1, keys_at[:, None]) & inside[None, :]
    # A chunk none of whose rows sees a sink from beyond its window (a document's first chunks) visits no head.
    heads = jnp.clip(jnp.max(high - low), 0, 1) * spec.group_size
    keys = t.load_tokens(k_ref, batch, first, padded, kv_head, spec.length)
    values = t.load_tokens(v_ref, batch, first, padded, kv_head, spec.length)

    def one_head(g, carry):
        d_keys, d_values = carry
        head = kv_head * spec.group_size + g
        query, d_out = (plt.load(ref.at[batch, here, head, :], mask=inside[:, None], other=0.0)
                        for ref in (q_ref, d_out_ref))
        lse = plt.load(lse_ref.at[batch, head, here], mask=inside, other=t.DEAD)
        delta = plt.load(delta_ref.at[batch, head, here], mask=inside, other=0.0)
        scores = jnp.where(visible, t.dot(keys, query, trans_b=True), -jnp.inf)
        weights = t.weigh(scores, spec, lse[None, :])
        d_scores = weights * (t.dot(values, d_out, trans_b=True) - delta[None, :])
        return (d_keys + t.dot(d_scores.astype(query.dtype), query),
                d_values + t.dot(weights.astype(d_out.dtype), d_out))

    zeros = jnp.zeros((padded, spec.width), jnp.float32)
    d_keys, d_values = jax.lax.fori_loop(0, heads, one_head, (zeros, zeros))
    d_k_ref[batch, number, kv_head, :, :] = d_keys * spec.scale
    d_v_ref[batch, number, kv_head, :, :] = d_values
