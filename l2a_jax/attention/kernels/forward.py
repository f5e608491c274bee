"""Forward kernel: one program per tile of rows and query head, walking over the blocks of keys that its rows see.

FlashAttention-2 (arXiv 2307.08691) with the row limits of `plan`. Routed rows are gathered where they are loaded and
scattered where they are stored; programs beyond the number of routed rows return at once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from l2a_jax.attention.kernels import split
from l2a_jax.attention.kernels import tile as t
from l2a_jax.attention.kernels.launch import launch, pl, plt
from l2a_jax.attention.kernels.plan import Block, Plan, Spec


def forward(spec: Spec, block: Block, q, k, v, plan: Plan, *, interpret: bool):
    """(out [B, T, N, H], base-2 log-sum-exp [B, N, R] in working order)."""
    batch, room = q.shape[0], split.places(spec, block, q.shape[0])
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype),
              jax.ShapeDtypeStruct((batch, spec.heads, spec.rows), jnp.float32)]
    # Only routed calls leave rows unwritten: these start as zeros.
    blank = jnp.zeros_like(q) if spec.kind == "routed" else None
    out, lse, *parts = launch(
        functools.partial(_kernel, spec=spec, block=block, room=room, interpret=interpret),
        "l2a_attention_forward", shapes + (split.part_shapes(spec, block, batch) if room else []),
        t.grid(spec.heads, max(pl.cdiv(spec.rows, block.rows), room), batch, interleave=spec.ordered),
        warps=block.num_warps, stages=block.num_stages, interpret=interpret, aliases={} if blank is None else {0: 0},
    )(blank, q, k, v, plan.for_rows)
    if room > 1:
        out, lse = split.join(spec, block, plan, out, lse, *parts, interpret=interpret)
    return out, lse


def _kernel(blank, *refs, spec: Spec, block: Block, room: int, interpret: bool):
    del blank
    plan = refs[3]
    head, number, batch = t.program(interleave=spec.ordered)
    run = functools.partial(_tile, *refs, spec=spec, block=block, interpret=interpret)
    if plan.count is None:
        # The last rows see the most keys: they start first, so that no long program is left at the end.
        run(at=(batch, (pl.num_programs(1) - 1 - number) * block.rows, head), count=spec.rows)
        return
    count = plan.count[batch]
    if not room:
        start = number * block.rows
        pl.when(start < count)(lambda: run(at=(batch, start, head), count=count))
        return
    is_work, tile, part, parts = split.assignment(number, count, block.rows, room)
    pl.when(is_work)(lambda: run(at=(batch, tile * block.rows, head), count=count, share=(number, part, parts)))


def _tile(q_ref, k_ref, v_ref, plan, out_ref, lse_ref, *part_refs, spec, block, at, count, interpret, share=None):
    batch, start, head = at
    kv_head = head // spec.group_size
    here = pl.ds(start, block.rows)
    tokens, exist = t.tile_tokens(spec, plan.index, batch, start, block.rows, count)
    limits = t.tile_limits(spec, plan, batch, tokens, exist, start, block.rows)
    if plan.index is not None:
        query = plt.load(t.gathered(q_ref, batch, tokens, head), mask=exist[:, None], other=0.0)
    else:
        query = t.load_tokens(q_ref, batch, start, block.rows, head, count if spec.rows % block.rows else None)
    scale = spec.scale * t.LOG2_E
    ragged = spec.length % block.keys != 0

    def visit(key, size, limit, carry, hide):
        top, total, out = carry
        keys = t.load_tokens(k_ref, batch, key, size, kv_head, limit)
        scores = hide(t.dot(query, keys, trans_b=True))
        new_top = jnp.maximum(top, jnp.max(scores, axis=1) * scale)
        weights = t.weigh(scores, scale, new_top[:, None], interpret)
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=1)
        values = t.load_tokens(v_ref, batch, key, size, kv_head, limit)
        return new_top, total, out * shrink[:, None] + t.dot(weights.astype(values.dtype), values)

    def step(i, carry, edge):
        key = i * block.keys
        number = key + jnp.arange(block.keys)[None, :]
        low = None if limits.low is None else limits.low[:, None]
        limit = spec.length if ragged and edge is not False else None
        return visit(key, block.keys, limit, carry, lambda scores: t.hide(
            scores, lambda: t.see(low, limits.high[:, None], number), edge))

    def sink_step(key, carry):
        number = key + jnp.arange(t.sink_block(spec))[None, :]
        visible = t.see(limits.sink_low[:, None], limits.sink_high[:, None] - 1, number)
        return visit(key, t.sink_block(spec), spec.length, carry, lambda scores: t.hide(scores, lambda: visible, True))

    carry = (
        jnp.full((block.rows,), t.FLOOR, jnp.float32),
        jnp.zeros((block.rows,), jnp.float32),
        jnp.zeros((block.rows, spec.width), jnp.float32),
    )
    if spec.sinks:
        carry = t.sink_sweep(spec, limits, sink_step, carry)
    bounds = t.key_bounds(limits, block.keys)
    if share is not None:
        bounds = split.part_bounds(bounds, *share[1:])
    top, total, out = t.sweep(bounds, step, carry, flat=block.flat, bounded_below=spec.bounded_below)

    def store_whole():
        alive = limits.high >= 0
        safe = jnp.where(alive, total, 1.0)
        rows = jnp.where(alive[:, None], out / safe[:, None], 0.0)
        lse = jnp.where(alive, top + jnp.log2(safe), t.DEAD)
        view = out_ref.at[batch, here, head, :] if plan.index is None else t.gathered(out_ref, batch, tokens, head)
        plt.store(view, rows.astype(out_ref.dtype), mask=exist[:, None])
        plt.store(lse_ref.at[batch, head, here], lse, mask=start + jnp.arange(block.rows) < spec.rows)

    if share is None:
        store_whole()
        return
    number, _, parts = share
    pl.when(parts == 1)(store_whole)

    @pl.when(parts > 1)
    def _():
        place = pl.ds(number * block.rows, block.rows)
        part_refs[0][batch, head, place, :] = out
        for ref, value in zip(part_refs[1:], (top, total), strict=True):
            ref[batch, head, place] = value
