"""A row's softmax over a large vocabulary as one Pallas kernel: statistics in one pass, gradients in a second.

One program owns one row of logits and keeps the running maximum, its multiplicity and the sum of exponentials (the
online softmax of arXiv 1805.02867) in every lane, so that lanes are merged once, at the end of the row. The second
pass follows at once, while much of the row (0.3 MB of float16 at 152K tokens) may still be in the card's L2 cache.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l2a_jax.attention.kernels.launch import launch, pl, plt
from l2a_jax.attention.kernels.tile import FLOOR, LOG2_E

BLOCK = 4_096  # logits at a time, 16 a thread
PerRow = Float[Any, " n"]


def softmax_rows(
    logits: Float[Array, "n V"],
    targets: Int[Array, " n"],
    weights: Float[Array, " n"],
    slopes_dtype: Any = None,
    *,
    block: int = BLOCK,
    interpret: bool = False,
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " n"], Float[Array, "n V"] | None]:
    """(largest logit, how many are as large, log-sum-exp in nats, weight x (softmax - onehot of the target)), float32.

    The last in `slopes_dtype` (None: not computed, and None). A NaN among the logits makes the log-sum-exp NaN.
    """
    rows, vocabulary = logits.shape
    if rows * vocabulary >= 2**31:
        raise ValueError(f"{rows} x {vocabulary} logits: the kernel counts elements in 32 bits; take fewer rows")
    numbers = jax.ShapeDtypeStruct((rows,), jnp.float32)
    slopes = [] if slopes_dtype is None else [jax.ShapeDtypeStruct(logits.shape, slopes_dtype)]
    out = launch(
        functools.partial(_kernel, vocabulary=vocabulary, block=block), "l2a_softmax_rows", [numbers] * 3 + slopes,
        (rows,), warps=max(1, block // 512), stages=2, interpret=interpret)(logits, targets, weights)
    return (*out[:3], out[3] if slopes else None)


def _kernel(logits_ref: Float[Any, "n V"], targets_ref: Int[Any, " n"], weights_ref: PerRow, top_ref: PerRow,
            level_ref: PerRow, normaliser_ref: PerRow, *slopes_ref: Float[Any, "n V"], vocabulary: int, block: int
            ) -> None:
    row, lanes = pl.program_id(0), jnp.arange(block)

    def sweep(function, carry):
        """`function(logits, first column, mask, carry)` over the row's blocks; the last one may stick out."""

        def visit(i, carry):
            start = i * block
            mask = start + lanes < vocabulary
            x = plt.load(logits_ref.at[row, pl.ds(start, block)], mask=mask, other=-jnp.inf)
            return function(x.astype(jnp.float32), start, mask, carry)

        return jax.lax.fori_loop(0, pl.cdiv(vocabulary, block), visit, carry)

    def merge(x, start, mask, carry):
        top, level, total = carry
        greater = x > top
        shrink = jnp.exp2(-jnp.abs(x - top) * LOG2_E)
        total = jnp.where(greater, total * shrink + 1.0, total + shrink)
        level = jnp.where(greater, 1.0, level + jnp.where(x == top, 1.0, 0.0))
        return jnp.maximum(top, x), level, total

    carry = tuple(jnp.full((block,), value, jnp.float32) for value in (FLOOR, 0.0, 0.0))
    tops, levels, totals = sweep(merge, carry)
    top = jnp.max(tops)
    normaliser = top + jnp.log(jnp.sum(totals * jnp.exp2((tops - top) * LOG2_E)))
    top_ref[row], normaliser_ref[row] = top, normaliser
    level_ref[row] = jnp.sum(jnp.where(tops == top, levels, 0.0))
    if not slopes_ref:
        return
    target, weight = targets_ref[row], weights_ref[row]

    def slope(x, start, mask, carry):
        value = (jnp.exp2((x - normaliser) * LOG2_E) - jnp.where(start + lanes == target, 1.0, 0.0)) * weight
        at = slopes_ref[0].at[row, pl.ds(start, block)]
        plt.store(at, value.astype(slopes_ref[0].dtype), mask=mask)
        return carry

    sweep(slope, 0)
