"""Forward kernel: one program per tile of rows and query head, walking over the blocks of keys that its rows see.

FlashAttention-2 (arXiv 2307.08691) with the row limits of `plan`. Routed rows are gathered where they are loaded and
scattered where they are stored; programs beyond the number of routed rows return at once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from l2a_jax.attention.kernels import tile as t
from l2a_jax.attention.kernels.plan import Block, Plan, Spec


def forward(spec: Spec, block: Block, q, k, v, plan: Plan, *, interpret: bool):
    """(out [B, T, N, H], base-2 log-sum-exp [B, N, R] in working order)."""
    batch = q.shape[0]
    lse = jax.ShapeDtypeStruct((batch, spec.heads, spec.rows), jnp.float32)
    out_shape = (jax.ShapeDtypeStruct(q.shape, q.dtype), lse)
    # Only routed calls leave rows unwritten: these start as zeros.
    blank = jnp.zeros_like(q) if spec.kind == "routed" else None
    plan = Plan(limits=plan.limits, index=plan.index, count=plan.count)
    return pl.pallas_call(
        functools.partial(_kernel, spec=spec, block=block),
        out_shape=out_shape,
        grid=(spec.heads, pl.cdiv(spec.rows, block.rows), batch),
        input_output_aliases={0: 0} if blank is not None else {},
        compiler_params=plt.CompilerParams(num_warps=block.num_warps, num_stages=block.num_stages),
        interpret=interpret,
        name="l2a_attention_forward",
    )(blank, q, k, v, plan)


def _kernel(blank, q_ref, k_ref, v_ref, plan, out_ref, lse_ref, *, spec: Spec, block: Block):
    del blank
    head, batch = pl.program_id(0), pl.program_id(2)
    # The last rows see the most keys: they start first, so that no long program is left at the end.
    start = (pl.num_programs(1) - 1 - pl.program_id(1)) * block.rows
    run = functools.partial(_tile, q_ref, k_ref, v_ref, plan, out_ref, lse_ref, spec, block, head, batch, start)
    if plan.count is None:
        run(spec.rows)
    else:
        count = plan.count[batch]
        pl.when(start < count)(lambda: run(count))


def _tile(q_ref, k_ref, v_ref, plan, out_ref, lse_ref, spec, block, head, batch, start, count):
    kv_head = head // spec.group_size
    limits = t.tile_limits(spec, plan, batch, start, block.rows)
    rows = start + jnp.arange(block.rows)
    inside = rows < count
    if plan.index is not None:
        rows = plt.load(plan.index.at[batch, pl.ds(start, block.rows)], mask=inside, other=spec.length)
        inside &= rows < spec.length
        query = plt.load(t.gathered(q_ref, batch, rows, head), mask=inside[:, None], other=0.0)
    else:
        query = t.load_tokens(q_ref, batch, start, block.rows, head, count if spec.rows % block.rows else None)
    scale = spec.scale * t.LOG2_E
    ragged = spec.length % block.keys != 0

    def visit(key, size, limit, carry, hide):
        top, total, out = carry
        keys = t.load_tokens(k_ref, batch, key, size, kv_head, limit)
        scores = hide(t.dot(query, keys, trans_b=True))
        new_top = jnp.maximum(top, jnp.max(scores, axis=1) * scale)
        weights = jnp.exp2(scores * scale - new_top[:, None])
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
    top, total, out = t.sweep(
        t.key_bounds(limits, block.keys), step, carry, flat=block.flat, bounded_below=spec.bounded_below)

    alive = limits.high >= 0
    total = jnp.where(alive, total, 1.0)
    out = jnp.where(alive[:, None], out / total[:, None], 0.0).astype(out_ref.dtype)
    if plan.index is not None:
        plt.store(t.gathered(out_ref, batch, rows, head), out, mask=inside[:, None])
    else:
        plt.store(out_ref.at[batch, pl.ds(start, block.rows), head, :], out, mask=inside[:, None])
    lse = jnp.where(alive, top + jnp.log2(total), t.DEAD)
    plt.store(lse_ref.at[batch, head, pl.ds(start, block.rows)], lse, mask=start + jnp.arange(block.rows) < spec.rows)
