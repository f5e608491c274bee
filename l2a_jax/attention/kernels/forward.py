"""Forward kernel: FlashAttention-2 (arXiv 2307.08691) over tiles of rows, with the row limits of `plan`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from l2a_jax.attention.kernels import tile as t
from l2a_jax.attention.kernels.launch import pl, plt
from l2a_jax.attention.kernels.plan import Block, Plan, Spec
from l2a_jax.attention.kernels.row_tiles import RowTile, over_row_tiles
from l2a_jax.attention.kernels.tile import HeadsRef, NumbersRef
from l2a_jax.attention.reference import Heads, Keys


def forward(spec: Spec, block: Block, q: Heads, k: Keys, v: Keys, plan: Plan) -> tuple[Heads, Float[Array, "B N R"]]:
    """(out, base-2 log-sum-exp in working order)."""
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype),
              jax.ShapeDtypeStruct((q.shape[0], spec.heads, spec.rows), jnp.float32)]
    return over_row_tiles(_tile, "l2a_attention_forward", spec, block, plan, q, k, v, (), shapes, 3)


def _tile(tile: RowTile, q_ref: HeadsRef, out_ref: HeadsRef, lse_ref: NumbersRef,
          *part_refs: Float[Any, "B N places ..."]) -> None:
    spec, rows = tile.spec, tile.block.rows
    if spec.ordered:
        query = plt.load(tile.view(q_ref), mask=tile.exist[:, None], other=0.0)
    else:
        query = t.load_tokens(q_ref, tile.batch, tile.start, rows, tile.head, tile.count if spec.rows % rows else None)
    scale = spec.scale * t.LOG2_E

    def visit(scores, keys, load_values, carry):
        top, total, out = carry
        new_top = jnp.maximum(top, jnp.max(scores, axis=1) * scale)
        weights = t.weigh(scores, spec, new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=1)
        values = load_values()
        return new_top, total, out * shrink[:, None] + t.dot(weights.astype(values.dtype), values)

    carry = (jnp.full((rows,), t.FLOOR, jnp.float32), jnp.zeros((rows,), jnp.float32),
             jnp.zeros((rows, spec.width), jnp.float32))
    top, total, out = tile.walk(query, visit, carry)

    def store_whole():
        alive = tile.limits.high >= 0
        safe = jnp.where(alive, total, 1.0)
        whole = jnp.where(alive[:, None], out / safe[:, None], 0.0)
        lse = jnp.where(alive, top + jnp.log2(safe), t.DEAD)
        plt.store(tile.view(out_ref), whole.astype(out_ref.dtype), mask=tile.exist[:, None])
        plt.store(lse_ref.at[tile.batch, tile.head, pl.ds(tile.start, rows)], lse, mask=tile.numbers < spec.rows)

    tile.store(store_whole, *zip(part_refs, (out, top, total), strict=False))
