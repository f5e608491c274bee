"""Memory-efficient attention in plain XLA, for any device, dtype, length and head width.

Short sequences are one masked block. Longer ones walk over chunks of query rows; each chunk visits only the blocks of
keys that one of its rows may see (a table of rows/CHUNK x keys/CHUNK truth values says which), with the online
softmax of FlashAttention (arXiv 2205.14135). The backward pass recomputes the weights from the saved log-sum-exp, so
nothing of size T x T exists in either pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from l2a_jax.attention.kernels.tile import FLOOR
from l2a_jax.attention.reference import Heads, Ids, Keys, PerRow, Places, take
from l2a_jax.attention.rows import Order, Rows, compact, partition, token_rows

PLAIN_LENGTH = 512  # up to here one block of rows x keys is cheaper than a loop
CHUNK = 256

Carry = tuple[Float[Array, "*rows"], Float[Array, "*rows"], Float[Array, "*rows H"]]
"""The online softmax so far: the largest score, the sum of weights relative to it, and that of weighted values."""


def full(q: Heads, k: Keys, v: Keys, *, segment_ids: Ids | None = None, places: Places | None = None) -> Heads:
    return _attend(q, k, v, token_rows(k.shape[:2], segment_ids, places=places))


def local(q: Heads, k: Keys, v: Keys, *, window: int, sinks: int = 0, segment_ids: Ids | None = None,
          places: Places | None = None) -> Heads:
    return _attend(q, k, v, token_rows(k.shape[:2], segment_ids, window=window, sinks=sinks, places=places))


def local_with_lse(q: Heads, k: Keys, v: Keys, *, window: int, sinks: int = 0, segment_ids: Ids | None = None,
                   places: Places | None = None) -> tuple[Heads, Float[Array, "B Q N"]]:
    rows = token_rows(k.shape[:2], segment_ids, window=window, sinks=sinks, places=places)
    if not _is_plain(q, k):
        return _flash_with_lse(q, k, v, rows)
    lse = jax.lax.stop_gradient(jax.nn.logsumexp(_plain_scores(q, k, rows), axis=-1))  # [B, K, G, Q]
    return _plain(q, k, v, rows), jnp.moveaxis(lse.reshape(q.shape[0], -1, q.shape[1]), 1, 2)


def routed(q: Heads, k: Keys, v: Keys, decisions: PerRow, *, segment_ids: Ids | None = None,
           places: Places | None = None) -> Heads:
    rows = token_rows(k.shape[:2], segment_ids, seen=decisions, places=places)
    return _attend(q, k, v, rows, functools.partial(compact, decisions))


def mixed(q: Heads, k: Keys, v: Keys, decisions: PerRow, *, window: int, sinks: int = 0,
          segment_ids: Ids | None = None, places: Places | None = None) -> Heads:
    rows = token_rows(k.shape[:2], segment_ids, window=window, sinks=sinks, everything=decisions, places=places)
    return _attend(q, k, v, rows, functools.partial(partition, decisions))


def _attend(q: Heads, k: Keys, v: Keys, rows: Rows, order: Callable[[], Order] | None = None) -> Heads:
    if _is_plain(q, k):
        return _plain(q, k, v, rows)
    return _flash(q, k, v, rows, order() if order else None)


def _is_plain(q: Heads, k: Keys) -> bool:
    return q.shape[1] * k.shape[1] <= PLAIN_LENGTH**2


def dot(spec: str, a: Float[Array, ...], b: Float[Array, ...]) -> Float[Array, ...]:
    """Products in the inputs' dtype (tensor cores), sums in float32; float32 inputs at full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def softmax_step(carry: Carry, scores: Float[Array, "*rows S"], spec: str, values: Float[Array, ...]) -> Carry:
    """The online softmax over some more scores; `spec` says how weights meet values."""
    top, total, out = carry
    new_top = jnp.maximum(top, scores.max(-1))
    weights = jnp.exp(scores - new_top[..., None])
    shrink = jnp.exp(top - new_top)
    out = out * shrink[..., None] + dot(spec, weights.astype(values.dtype), values)
    return new_top, total * shrink + weights.sum(-1), out


def _plain_scores(q: Heads, k: Keys, rows: Rows) -> Float[Array, "B K G Q T"]:
    batch, length, _, width = q.shape
    mask = rows.visible(jnp.arange(k.shape[1]))[:, None, None]
    grouped = q.reshape(batch, length, k.shape[2], -1, width)
    hidden = jnp.where(_alive(rows), -jnp.inf, 0.0)  # a row without keys stays free of NaN
    return jnp.where(mask, dot("brkgh,bskh->bkgrs", grouped, k) * width**-0.5, hidden)


def _alive(rows: Rows) -> Bool[Array, "B 1 1 Q 1"]:
    return (rows.high >= 0)[:, None, None, :, None]


def _plain(q: Heads, k: Keys, v: Keys, rows: Rows) -> Heads:
    weights = jax.nn.softmax(_plain_scores(q, k, rows), axis=-1)
    weights = jnp.where(_alive(rows), weights, 0.0).astype(v.dtype)
    return dot("bkgrs,bskh->brkgh", weights, v).reshape(q.shape).astype(q.dtype)


@jax.custom_vjp
def _flash(q: Heads, k: Keys, v: Keys, rows: Rows, order: Order | None) -> Heads:
    return _flash_forward(q, k, v, rows, order)[0]


def _flash_forward(q, k, v, rows, order):
    blocks = _Blocks(q, k, rows, order)
    keys, values = _split(k), _split(v)

    def chunk(xs):
        query, limits, needed, count = xs

        def visit(i, carry):
            block = needed[i]
            scores = blocks.scores(query, keys[block], limits, block)
            return softmax_step(carry, scores, "bkgrs,bskh->bkgrh", values[block])

        shape = query.shape[:1] + query.shape[2:4] + (CHUNK,)
        start = (jnp.full(shape, FLOOR), jnp.zeros(shape), jnp.zeros((*shape, query.shape[-1])))
        top, total, out = jax.lax.fori_loop(0, count, visit, start)
        total = jnp.where((limits.high >= 0)[:, None, None], total, 1.0)
        return (out / total[..., None]).transpose(0, 3, 1, 2, 4).astype(q.dtype), top + jnp.log(total)

    out, lse = jax.lax.map(chunk, (blocks.split_rows(q), *blocks.limits_and_table))
    return blocks.join_rows(out), (q, k, v, rows, order, out, lse)


def _flash_backward(saved, d_out):
    q, k, v, rows, order, out, lse = saved
    blocks = _Blocks(q, k, rows, order)
    keys, values = _split(k), _split(v)

    def chunk(carry, xs):
        query, limits, needed, count, out, lse, d_out = xs
        # delta = rowsum(dO * O) = rowsum(P * dP): FlashAttention-2 (arXiv 2307.08691), section 3.1.2
        delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1).transpose(0, 2, 3, 1)

        def visit(i, carry):
            d_query, d_keys, d_values = carry
            block = needed[i]
            scores = blocks.scores(query, keys[block], limits, block)
            weights = jnp.exp(scores - lse[..., None])
            d_weights = dot("brkgh,bskh->bkgrs", d_out, values[block])
            d_scores = (weights * (d_weights - delta[..., None]) * blocks.scale).astype(q.dtype)
            d_values = d_values.at[block].add(dot("bkgrs,brkgh->bskh", weights.astype(q.dtype), d_out))
            d_keys = d_keys.at[block].add(dot("bkgrs,brkgh->bskh", d_scores, query))
            return d_query + dot("bkgrs,bskh->brkgh", d_scores, keys[block]), d_keys, d_values

        start = (jnp.zeros(query.shape, jnp.float32), *carry)
        d_query, d_keys, d_values = jax.lax.fori_loop(0, count, visit, start)
        return (d_keys, d_values), d_query.astype(q.dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    xs = (blocks.split_rows(q), *blocks.limits_and_table, out, lse, blocks.split_rows(d_out))
    (d_keys, d_values), d_q = jax.lax.scan(chunk, (zeros, zeros), xs)
    return blocks.join_rows(d_q), *(_join(x, k.shape[1]).astype(k.dtype) for x in (d_keys, d_values)), None, None


_flash.defvjp(_flash_forward, _flash_backward)


@jax.custom_vjp
def _flash_with_lse(q: Heads, k: Keys, v: Keys, rows: Rows) -> tuple[Heads, Float[Array, "B Q N"]]:
    return _flash_with_lse_forward(q, k, v, rows)[0]


def _flash_with_lse_forward(q, k, v, rows):
    out, saved = _flash_forward(q, k, v, rows, None)
    lse = saved[-1].transpose(1, 0, 4, 2, 3)  # from [chunks, B, K, G, CHUNK]
    return (out, lse.reshape(q.shape[0], -1, q.shape[2])[:, : q.shape[1]]), saved


_flash_with_lse.defvjp(_flash_with_lse_forward, lambda saved, cotangents: _flash_backward(saved, cotangents[0])[:4])


def _split(x: Shaped[Array, "B T *rest"], fill: int = 0) -> Shaped[Array, "chunks B C *rest"]:
    """Chunks of CHUNK rows or keys, padded."""
    chunks = -(-x.shape[1] // CHUNK)
    pad = [(0, 0), (0, chunks * CHUNK - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad, constant_values=fill)
    return x.reshape(x.shape[0], chunks, CHUNK, *x.shape[2:]).swapaxes(0, 1)


def _join(x: Shaped[Array, "chunks B C *rest"], length: int) -> Shaped[Array, "B {length} *rest"]:
    """Inverse of `_split`."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


class _Blocks:
    """The bookkeeping of both passes: padding, chunking, the working order, and which blocks a chunk visits."""

    def __init__(self, q, k, rows, order):
        self.length, self.kv_heads, self.scale, self.order = q.shape[1], k.shape[2], q.shape[-1] ** -0.5, order
        blocks = -(-k.shape[1] // CHUNK)
        if order is not None:
            rows = Rows(*(take(field, order.index) for field in rows))
            alive = jnp.arange(self.length) < order.count[:, None]
            rows = rows._replace(high=jnp.where(alive, rows.high, -1), sink_high=jnp.where(alive, rows.sink_high, 0))
        low, high, sink_low, sink_high = (
            _split(field, fill) for field, fill in zip(rows, (0, -1, 0, 0), strict=True))
        # [chunks, 1, B, C] against [1, blocks, 1, 1]: does any row of the chunk see any key of the block?
        first = (jnp.arange(blocks) * CHUNK)[None, :, None, None]
        last = first + CHUNK - 1
        see = (low[:, None] <= last) & (high[:, None] >= first)
        see_sink = (sink_low[:, None] <= last) & (sink_high[:, None] > first) & (sink_high > sink_low)[:, None]
        table = jnp.any(see | see_sink, axis=(2, 3))
        needed = jax.vmap(lambda row: jnp.nonzero(row, size=blocks, fill_value=0)[0])(table)
        self.limits_and_table = (Rows(low, high, sink_low, sink_high), needed, table.sum(1))

    def split_rows(self, x):
        """Rows [B, T, N, H] in working order, as [chunks, B, CHUNK, K, N // K, H]."""
        x = x if self.order is None else take(x, self.order.index)
        return _split(x.reshape(*x.shape[:2], self.kv_heads, -1, x.shape[-1]))

    def join_rows(self, x):
        """Inverse of `split_rows`; tokens outside the working order are exactly 0."""
        x = _join(x, self.length)
        x = x.reshape(*x.shape[:2], -1, x.shape[-1])
        if self.order is None:
            return x
        rank = self.order.rank
        mine = jnp.take_along_axis(self.order.index, rank, axis=1) == jnp.arange(self.length)
        mine &= rank < self.order.count[:, None]
        return jnp.where(mine[:, :, None, None], take(x, rank), 0)

    def scores(self, query, key, limits, block):
        """Scaled scores [B, K, G, C, C] of a chunk against one block of keys; invisible ones are -inf."""
        mask = limits.visible(block * CHUNK + jnp.arange(CHUNK))[:, None, None]
        return jnp.where(mask, dot("brkgh,bskh->bkgrs", query, key) * self.scale, -jnp.inf)
