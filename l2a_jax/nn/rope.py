"""Rotary position embedding and its scalings.

Formulas: RoFormer (arXiv 2104.09864) in the half-split layout of Qwen2.5; linear interpolation (arXiv 2306.15595);
YaRN (arXiv 2309.00071) with the bounds rounded to whole dimensions, as transformers does. All angles are float32.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from l2a_jax.attention.kernels import blocks
from l2a_jax.attention.kernels.launch import on_gpu
from l2a_jax.config import ModelConfig, RopeScaling
from l2a_jax.nn import rope_kernel
from l2a_jax.nn.rope_kernel import Parts, Table


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling, max_positions: int) -> np.ndarray:
    """Radians per position for each of the H/2 pairs, as float32 [H/2].

    `theta` multiplies the base; `linear` divides every frequency (the same as dividing positions); `yarn` divides
    the slow ones, keeps the fast ones, and blends between the dimensions that turn `beta_fast` and `beta_slow` times
    over the trained length.
    """
    base = theta * scaling.factor if scaling.kind == "theta" else theta
    frequencies = 1.0 / base ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    if scaling.kind != "yarn":
        return frequencies.astype(np.float32)

    trained = scaling.original_max_positions or max_positions

    def dimension_turning(turns: float) -> float:
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_turning(scaling.beta_slow)), head_dim - 1)
    # Equal bounds would divide by zero; transformers opens the ramp by a thousandth of a dimension.
    width = (high - low) or 0.001
    interpolate = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
    return (frequencies * (1 - interpolate) + frequencies / scaling.factor * interpolate).astype(np.float32)


def amplitude(scaling: RopeScaling) -> float:
    """Factor on cos and sin: YaRN's attention temperature (0.1 ln(factor) + 1 unless given), 1 for every other kind."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def rope_table(positions: Int[Array, "B T"], config: ModelConfig, scaling: RopeScaling) -> Table:
    """cos and sin of every position's angles, float32, h = H/2."""
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, scaling, config.max_positions)
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies)
    return jnp.cos(angles) * amplitude(scaling), jnp.sin(angles) * amplitude(scaling)


def apply_rope(x: Float[Array, "B T N H"], table: Table) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x[i], x[i + H/2]) by their position's angle, in float32."""
    cos, sin = (part[:, :, None, :] for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def split_heads(joined: Float[Array, "B T M H"], bias: Float[Array, "M H"], table: Table, kv_heads: int) -> Parts:
    """(q, k, v) of joined + bias, whose heads lie side by side in this order, M = N + 2K; q and k rotated as by
    `apply_rope`.

    By a kernel (`rope_kernel`) on NVIDIA GPUs at the kernels' head widths, elsewhere by XLA; the two agree up to
    rounding. Differentiable in reverse mode, in joined and bias only.
    """
    plain = functools.partial(_split, kv_heads=kv_heads)
    kernel = functools.partial(rope_kernel.split, kv_heads=kv_heads) if joined.shape[3] in blocks.WIDTHS else plain
    return on_gpu(kernel, plain, joined, bias, table)


def _split(joined: Float[Array, "B T M H"], bias: Float[Array, "M H"], table: Table, kv_heads: int) -> Parts:
    """The oracle of `rope_kernel.split`, up to rounding below float32."""
    rotated, values = jnp.split(joined + bias.astype(joined.dtype), (joined.shape[2] - kv_heads,), axis=2)
    q, k = jnp.split(apply_rope(rotated, table), (joined.shape[2] - 2 * kv_heads,), axis=2)
    return q, k, values


def _join(parts: Parts, table: Table) -> tuple[Float[Array, "B T M H"], Float[Array, "M H"]]:
    """The oracle of `rope_kernel.join`, up to rounding below float32: the transpose of a rotation turns back."""
    cos, sin = table
    q, k, values = parts
    joined = jnp.concatenate([apply_rope(jnp.concatenate([q, k], axis=2), (cos, -sin)), values], axis=2)
    return joined, jnp.sum(joined.astype(jnp.float32), axis=(0, 1))


def _split_heads_fwd(joined, bias, table, kv_heads):
    return split_heads(joined, bias, table, kv_heads), (bias, table)


def _split_heads_bwd(kv_heads, residuals, gradients):
    bias, table = residuals
    kernel = rope_kernel.join if gradients[0].shape[3] in blocks.WIDTHS else _join
    joined, d_bias = on_gpu(kernel, _join, gradients, table)
    return joined, d_bias.astype(bias.dtype), jax.tree.map(jnp.zeros_like, table)


split_heads.defvjp(_split_heads_fwd, _split_heads_bwd)
