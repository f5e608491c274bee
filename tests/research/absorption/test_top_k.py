"""Exact top-k masks: three ways to one mask, ties, -inf, and the conventions at the first positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.research.absorption import masks, top_k
from l2a_jax.research.speed.compiled import lower_for_cuda


def by_rank(scores, k):
    """A key is kept if fewer than k keys precede it: those with a larger score, or the same and an earlier place."""
    place = jnp.arange(scores.shape[-1])
    mine, other = scores[..., :, None], scores[..., None, :]
    precedes = (other > mine) | ((other == mine) & (place[None, :] < place[:, None]))
    return jnp.sum(precedes, axis=-1) < k


def scores(length):
    """Many ties, both zeros, rows of -inf."""
    s = (np.round(2 * np.random.default_rng(length).normal(size=(3, 5, length))) / 2).astype(np.float32)
    s[0, 0], s[0, 1, 3:], s[1, 1], s[1, 1, 2] = -np.inf, -np.inf, 0.0, -0.0
    return jnp.asarray(s)


@pytest.mark.parametrize("length", (7, 32))
def test_sort_is_the_definition(length):
    s = scores(length)
    for k in (1, 3, length - 1, length):
        kept, want = (np.asarray(jax.jit(f)(s, jnp.int32(k))) for f in (top_k.by_sort, by_rank))
        np.testing.assert_array_equal(kept, want)
        assert (kept.sum(axis=-1) == k).all()
        # A stable sort orders ties as we do.
        place = np.argsort(-np.asarray(s), axis=-1, kind="stable")[..., :k]
        np.testing.assert_array_equal(np.flatnonzero(kept), np.sort(
            (place + length * np.arange(15).reshape(3, 5, 1)).reshape(-1)))


def test_kernel_is_the_definition():
    s = scores(32)
    for k in (1, 5, 32):
        one = jax.jit(jax.vmap(lambda s, k=k: top_k.by_bisection(s, jnp.int32(k), interpret=True)))
        np.testing.assert_array_equal(one(s), jax.jit(by_rank)(s, jnp.int32(k)))
    with pytest.raises(ValueError, match="power of two"):
        top_k.by_bisection(scores(7), 2)


def test_kernel_lowers_for_cuda_and_is_what_cuda_runs():
    shape = jax.ShapeDtypeStruct((3, 2, 4, 512, 512), jnp.float32)
    text = lower_for_cuda(jax.vmap(lambda s: top_k.top_k_mask(s, 64)), shape).as_text()
    assert "triton" in text and "sort" not in text


def test_no_gradient_comes_through():
    s = jax.random.normal(jax.random.key(0), (4, 8))
    gradient = jax.grad(lambda s: jnp.sum(jnp.where(top_k.top_k_mask(s, 3), 2.0, 0.0)))(s)
    np.testing.assert_array_equal(gradient, 0.0)


def test_conventions_at_the_first_positions():
    """After: query t keeps all t + 1 keys until there are more than k. Before: what of the top k of all is visible."""
    s = jnp.array([[1.0, 9.0, 8.0, 2.0],
                   [3.0, 1.0, 9.0, 8.0],
                   [1.0, 5.0, 4.0, 9.0],
                   [4.0, 1.0, 2.0, 3.0]])
    after, before = masks.select(s, 2, False), masks.select(s, 2, True)
    np.testing.assert_array_equal(after, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    np.testing.assert_array_equal(before, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]])


def test_random_masks_keep_as_many_keys_as_computed():
    """k = 64 of 512: 12.5 % of the causal pairs before the mask, 23.4 % after it; about 7 empty rows before."""
    noise = jax.random.uniform(jax.random.key(3), (3, 512, 512))
    before, after = (np.asarray(masks.select(noise, 64, convention)) for convention in (True, False))
    assert abs(before.sum(axis=-1).mean() - 32.06) < 0.5
    assert abs(after.sum(axis=-1).mean() - 60.06) < 1e-2
    assert 4 < (before.sum(axis=-1) == 0).sum(axis=-1).mean() < 10


def test_shuffling_keeps_each_querys_visible_scores():
    s = jax.random.normal(jax.random.key(1), (2, 6, 6))
    mixed = masks.shuffled(s, jax.random.key(2))
    for query in range(6):
        np.testing.assert_array_equal(np.sort(mixed[:, query, : query + 1]), np.sort(s[:, query, : query + 1]))
    assert not np.array_equal(mixed, s)


def test_f1_by_hand():
    visible = np.tril(np.ones((4, 4), bool))
    mask, truth = (np.array(m, bool) & visible for m in (
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]]))
    counts = masks.agreement(jnp.asarray(mask), jnp.asarray(truth), 2)
    np.testing.assert_array_equal(counts, [6, 7, 7, 3, 4, 4])
    np.testing.assert_allclose(masks.f1(np.asarray(counts).reshape(2, 3)), [12 / 14, 6 / 8])
