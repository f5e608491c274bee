"""The kernels that split and join rotated heads, against `apply_rope` and XLA's own gradient, in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.attention.kernels import blocks
from l2a_jax.nn import rope, rope_kernel
from l2a_jax.research.speed.compiled import lower_for_cuda, triton_kernels

SHAPES = [(1, 1, 3, 1, 16), (2, 70, 18, 2, 64), (1, 131, 16, 2, 128), (3, 64, 9, 1, 32)]  # B, T, M, K, H


@functools.partial(jax.jit, static_argnums=(0, 1))
def made(shape, dtype=jnp.float32):
    batch, length, total, kv_heads, width = shape
    keys = jax.random.split(jax.random.key(hash(shape) % 1_000), 5)
    joined = jax.random.normal(keys[0], (batch, length, total, width), dtype)
    angles = jax.random.uniform(keys[1], (batch, length, width // 2), maxval=6.3)
    gradients = tuple(jax.random.normal(key, (batch, length, heads, width), dtype)
                      for key, heads in zip(keys[2:], (total - 2 * kv_heads, kv_heads, kv_heads), strict=True))
    bias = jax.random.normal(jax.random.fold_in(keys[0], 1), (total, width), dtype)
    return joined, bias, (jnp.cos(angles), jnp.sin(angles)), gradients


def oracle(joined, bias, table, kv_heads):
    joined = joined + bias
    queries = joined.shape[2] - 2 * kv_heads
    return (rope.apply_rope(joined[:, :, :queries], table),
            rope.apply_rope(joined[:, :, queries : queries + kv_heads], table), joined[:, :, queries + kv_heads :])


@functools.partial(jax.jit, static_argnums=(0, 5))
def with_gradient(split, joined, bias, table, gradients, kv_heads):
    """What a split gives, and what its gradient makes of `gradients`."""
    found, pull = jax.vjp(lambda x, b: split(x, b, table, kv_heads), joined, bias)
    return found, pull(gradients)


@functools.partial(jax.jit, static_argnums=4)
def interpreted(joined, bias, table, gradients, kv_heads):
    return (rope_kernel.split(joined, bias, table, kv_heads, interpret=True),
            rope_kernel.join(gradients, table, interpret=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_both_kernels_are_the_plain_split_and_its_gradient(shape):
    given = *made(shape), shape[3]
    wanted = with_gradient(oracle, *given)
    for one in (with_gradient(rope.split_heads, *given), interpreted(*given)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), one, wanted)


@pytest.mark.parametrize("width", blocks.WIDTHS)
@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
def test_both_kernels_lower_for_cuda(width, arch):
    joined, bias, table, gradients = jax.eval_shape(functools.partial(made, (2, 70, 18, 2, width), jnp.bfloat16))
    split = functools.partial(rope_kernel.split, kv_heads=2)
    for name, lowered in (("split", lower_for_cuda(split, joined, bias, table, arch=arch)),
                          ("join", lower_for_cuda(rope_kernel.join, gradients, table, arch=arch))):
        assert [kernel["name"] for kernel in triton_kernels(lowered)] == [f"l2a_{name}_heads"]


def check_bfloat16(shape, both):
    """Against the float32 oracle on the same numbers; `both` splits, and joins gradients."""
    given = *made(shape, jnp.bfloat16), shape[3]
    wanted = with_gradient(oracle, *jax.tree.map(jnp.float32, given[:2]), given[2],
                           jax.tree.map(jnp.float32, given[3]), shape[3])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), b, atol=0.02, rtol=0.01), both(*given), wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_in_bfloat16(shape):
    check_bfloat16(shape, interpreted)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_the_compiled_kernels_agree(shape):
    check_bfloat16(shape, functools.partial(with_gradient, rope.split_heads))
