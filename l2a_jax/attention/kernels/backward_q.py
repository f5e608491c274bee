"""Backward kernel for the queries: one program per tile of rows and query head, over the keys that its rows see.

It also leaves what the key kernel needs: delta = rowsum(dO * O) and, where rows are worked on in another order than
the tokens', compact copies of q and dO (they pass through this kernel's hands anyway).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from l2a_jax.attention.kernels import tile as t
from l2a_jax.attention.kernels.plan import Block, Plan, Spec


def backward_q(spec: Spec, block: Block, q, k, v, plan: Plan, out, lse, d_out, *, interpret: bool):
    """(dq [B, T, N, H], delta [B, N, R], q and dO in working order or None where that is the tokens')."""
    batch = q.shape[0]
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)]
    if spec.kind != "all":
        ordered = (batch, spec.rows, spec.heads, spec.width)
        shapes += [jax.ShapeDtypeStruct(ordered, q.dtype), jax.ShapeDtypeStruct(ordered, d_out.dtype)]
    blank = jnp.zeros_like(q) if spec.kind == "routed" else None
    plan = Plan(limits=plan.limits, index=plan.index, count=plan.count)
    outputs = pl.pallas_call(
        functools.partial(_kernel, spec=spec, block=block),
        out_shape=shapes,
        grid=(spec.heads, pl.cdiv(spec.rows, block.rows), batch),
        input_output_aliases={0: 0} if blank is not None else {},
        compiler_params=plt.CompilerParams(num_warps=block.num_warps, num_stages=block.num_stages),
        interpret=interpret,
        name="l2a_attention_backward_q",
    )(blank, q, k, v, plan, out, lse, d_out)
    return (*outputs, None, None)[:4]


def _kernel(blank, *refs, spec: Spec, block: Block):
    del blank
    plan = refs[3]
    head, batch = pl.program_id(0), pl.program_id(2)
    start = (pl.num_programs(1) - 1 - pl.program_id(1)) * block.rows  # longest first
    if plan.count is None:
        _tile(*refs, spec=spec, block=block, at=(batch, start, head), count=spec.rows)
    else:
        count = plan.count[batch]
        pl.when(start < count)(lambda: _tile(*refs, spec=spec, block=block, at=(batch, start, head), count=count))


def _tile(q_ref, k_ref, v_ref, plan, out_ref, lse_ref, d_out_ref, d_q_ref, delta_ref, *copies, spec, block, at, count):
    batch, start, head = at
    kv_head = head // spec.group_size
    limits = t.tile_limits(spec, plan, batch, start, block.rows)
    here = pl.ds(start, block.rows)
    inside = start + jnp.arange(block.rows) < count
    if plan.index is None:
        view = lambda ref: ref.at[batch, here, head, :]  # noqa: E731
    else:
        tokens = plt.load(plan.index.at[batch, here], mask=inside, other=spec.length)
        inside &= tokens < spec.length
        view = lambda ref: t.gathered(ref, batch, tokens, head)  # noqa: E731

    def load(ref):
        return plt.load(view(ref), mask=inside[:, None], other=0.0)

    query, d_out = load(q_ref), load(d_out_ref)
    delta = jnp.sum(d_out.astype(jnp.float32) * load(out_ref).astype(jnp.float32), axis=1)
    in_rows = start + jnp.arange(block.rows) < spec.rows
    plt.store(delta_ref.at[batch, head, here], delta, mask=in_rows)
    for copy, value in zip(copies, (query, d_out)):
        plt.store(copy.at[batch, here, head, :], value, mask=in_rows[:, None])
    lse = plt.load(lse_ref.at[batch, head, here], mask=inside, other=t.DEAD)
    scale = spec.scale * t.LOG2_E
    ragged = spec.length % block.keys != 0

    def visit(key, size, limit, d_query, hide):
        keys = t.load_tokens(k_ref, batch, key, size, kv_head, limit)
        scores = hide(t.dot(query, keys, trans_b=True))
        weights = jnp.exp2(scores * scale - lse[:, None])
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
    d_query = t.sweep(
        t.key_bounds(limits, block.keys), step, d_query, flat=block.flat, bounded_below=spec.bounded_below)
    plt.store(view(d_q_ref), (d_query * spec.scale).astype(d_q_ref.dtype), mask=inside[:, None])
