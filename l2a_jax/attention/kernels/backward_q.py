"""Backward kernel for the queries, over tiles of rows and the keys that they see.

It also leaves what the key kernel needs: delta = rowsum(dO * O) and, where rows are worked on in another order than
the tokens', compact copies of q and dO (they pass through this kernel's hands anyway).
"""

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


def backward_q(
    spec: Spec, block: Block, q: Heads, k: Keys, v: Keys, plan: Plan, out: Heads, lse: Float[Array, "B N R"],
    d_out: Heads,
) -> tuple[Heads, Float[Array, "B N R"], Float[Array, "B R N H"], Float[Array, "B R N H"]]:
    """(dq, delta, q in working order, dO in working order)."""
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)]
    if spec.ordered:
        in_order = (q.shape[0], spec.rows, spec.heads, spec.width)
        shapes += [jax.ShapeDtypeStruct(in_order, q.dtype), jax.ShapeDtypeStruct(in_order, d_out.dtype)]
    d_q, delta, *copies = over_row_tiles(_tile, "l2a_attention_backward_q", spec, block, plan, q, k, v,
                                         (out, lse, d_out), shapes, 1)
    return d_q, delta, *(copies or (q, d_out))


def _tile(tile: RowTile, q_ref: HeadsRef, out_ref: HeadsRef, lse_ref: NumbersRef, d_out_ref: HeadsRef,
          d_q_ref: HeadsRef, delta_ref: NumbersRef, *more: Float[Any, "B ..."]) -> None:
    spec = tile.spec
    here = pl.ds(tile.start, tile.block.rows)

    def load(ref):
        return plt.load(tile.view(ref), mask=tile.exist[:, None], other=0.0)

    query, d_out = load(q_ref), load(d_out_ref)
    delta = jnp.sum(d_out.astype(jnp.float32) * load(out_ref).astype(jnp.float32), axis=1)
    first = (tile.numbers < spec.rows) & ((0 if tile.share is None else tile.share[1]) == 0)
    plt.store(delta_ref.at[tile.batch, tile.head, here], delta, mask=first)
    copies, shares = (more[:2], more[2:]) if spec.ordered else ((), more)
    for copy, value in zip(copies, (query, d_out), strict=False):
        plt.store(copy.at[tile.batch, here, tile.head, :], value, mask=first[:, None])
    lse = plt.load(lse_ref.at[tile.batch, tile.head, here], mask=tile.numbers < tile.count, other=t.DEAD)

    def visit(scores, keys, load_values, d_query):
        weights = t.weigh(scores, spec, lse[:, None])
        d_weights = t.dot(d_out, load_values(), trans_b=True)
        d_scores = weights * (d_weights - delta[:, None])
        return d_query + t.dot(d_scores.astype(keys.dtype), keys)

    d_query = tile.walk(query, visit, jnp.zeros((tile.block.rows, spec.width), jnp.float32)) * spec.scale

    def store_whole():
        plt.store(tile.view(d_q_ref), d_query.astype(d_q_ref.dtype), mask=tile.exist[:, None])

    tile.store(store_whole, *((ref, d_query) for ref in shares))
