"""Backward kernel for the queries: one program per tile of rows and query head, over the keys that its rows see.

It also leaves what the key kernel needs: delta = rowsum(dO * O) and, where rows are worked on in another order than
the tokens', compact copies of q and dO (they pass through this kernel's hands anyway).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from l2a_jax.attention.kernels import split
from l2a_jax.attention.kernels import tile as t
from l2a_jax.attention.kernels.launch import launch, pl, plt
from l2a_jax.attention.kernels.plan import Block, Plan, Spec


def backward_q(spec: Spec, block: Block, q, k, v, plan: Plan, out, lse, d_out, *, interpret: bool):
    """(dq [B, T, N, H], delta [B, N, R], q and dO in working order or None where that is the tokens')."""
    batch, room = q.shape[0], split.places(spec, block, q.shape[0])
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)]
    if spec.ordered:
        in_order = (batch, spec.rows, spec.heads, spec.width)
        shapes += [jax.ShapeDtypeStruct(in_order, q.dtype), jax.ShapeDtypeStruct(in_order, d_out.dtype)]
    blank = jnp.zeros_like(q) if spec.kind == "routed" else None
    outputs = launch(
        functools.partial(_kernel, spec=spec, block=block, room=room, interpret=interpret),
        "l2a_attention_backward_q", shapes + (split.part_shapes(spec, block, batch)[:1] if room else []),
        t.grid(spec.heads, max(pl.cdiv(spec.rows, block.rows), room), batch, interleave=spec.ordered),
        warps=block.num_warps, stages=block.num_stages, interpret=interpret, aliases={} if blank is None else {0: 0},
    )(blank, q, k, v, plan.for_rows, out, lse, d_out)
    if not spec.ordered:
        return (*outputs, None, None)
    d_q, delta, row_q, row_d_out, *parts = outputs
    if room > 1:
        d_q, delta = split.join(spec, block, plan, d_q, delta, *parts, interpret=interpret)
    return d_q, delta, row_q, row_d_out


def _kernel(blank, *refs, spec: Spec, block: Block, room: int, interpret: bool):
    del blank
    plan = refs[3]
    head, number, batch = t.program(interleave=spec.ordered)
    run = functools.partial(_tile, *refs, spec=spec, block=block, interpret=interpret)
    if plan.count is None:
        run(at=(batch, (pl.num_programs(1) - 1 - number) * block.rows, head), count=spec.rows)  # longest first
        return
    count = plan.count[batch]
    if not room:
        start = number * block.rows
        pl.when(start < count)(lambda: run(at=(batch, start, head), count=count))
        return
    is_work, tile, part, parts = split.assignment(number, count, block.rows, room)
    pl.when(is_work)(lambda: run(at=(batch, tile * block.rows, head), count=count, share=(number, part, parts)))


def _tile(q_ref, k_ref, v_ref, plan, out_ref, lse_ref, d_out_ref, d_q_ref, delta_ref, *more, spec, block, at, count,
          interpret, share=None):
    batch, start, head = at
    kv_head = head // spec.group_size
    here = pl.ds(start, block.rows)
    tokens, exist = t.tile_tokens(spec, plan.index, batch, start, block.rows, count)
    limits = t.tile_limits(spec, plan, batch, tokens, exist, start, block.rows)

    def view(ref):
        return ref.at[batch, here, head, :] if plan.index is None else t.gathered(ref, batch, tokens, head)

    def load(ref):
        return plt.load(view(ref), mask=exist[:, None], other=0.0)

    query, d_out = load(q_ref), load(d_out_ref)
    delta = jnp.sum(d_out.astype(jnp.float32) * load(out_ref).astype(jnp.float32), axis=1)
    number, part, parts = (0, 0, 1) if share is None else share
    first = (start + jnp.arange(block.rows) < spec.rows) & (part == 0)
    plt.store(delta_ref.at[batch, head, here], delta, mask=first)
    if spec.ordered:
        for copy, value in zip(more[:2], (query, d_out), strict=True):
            plt.store(copy.at[batch, here, head, :], value, mask=first[:, None])
    lse = plt.load(lse_ref.at[batch, head, here], mask=start + jnp.arange(block.rows) < count, other=t.DEAD)
    scale = spec.scale * t.LOG2_E
    ragged = spec.length % block.keys != 0

    def visit(key, size, limit, d_query, hide):
        keys = t.load_tokens(k_ref, batch, key, size, kv_head, limit)
        scores = hide(t.dot(query, keys, trans_b=True))
        weights = t.weigh(scores, scale, lse[:, None], interpret)
        values = t.load_tokens(v_ref, batch, key, size, kv_head, limit)
        d_weights = t.dot(d_out, values, trans_b=True)
        d_scores = weights * (d_weights - delta[:, None])
        return d_query + t.dot(d_scores.astype(keys.dtype), keys)

    def step(i, d_query, edge):
        key = i * block.keys
        number = key + jnp.arange(block.keys)[None, :]
        low = None if limits.low is None else limits.low[:, None]
        limit = spec.length if ragged and edge is not False else None
        return visit(key, block.keys, limit, d_query, lambda scores: t.hide(
            scores, lambda: t.see(low, limits.high[:, None], number), edge))

    def sink_step(key, d_query):
        number = key + jnp.arange(t.sink_block(spec))[None, :]
        visible = t.see(limits.sink_low[:, None], limits.sink_high[:, None] - 1, number)
        return visit(key, t.sink_block(spec), spec.length, d_query,
                     lambda scores: t.hide(scores, lambda: visible, True))

    d_query = jnp.zeros((block.rows, spec.width), jnp.float32)
    if spec.sinks:
        d_query = t.sink_sweep(spec, limits, sink_step, d_query)
    bounds = t.key_bounds(limits, block.keys)
    if share is not None:
        bounds = split.part_bounds(bounds, part, parts)
    d_query = t.sweep(bounds, step, d_query, flat=block.flat, bounded_below=spec.bounded_below) * spec.scale

    def store_whole():
        plt.store(view(d_q_ref), d_query.astype(d_q_ref.dtype), mask=exist[:, None])

    if share is None:
        store_whole()
        return
    pl.when(parts == 1)(store_whole)

    @pl.when(parts > 1)
    def _():
        more[2][batch, head, pl.ds(number * block.rows, block.rows), :] = d_query
