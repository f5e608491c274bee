"""Every form of the gate against literal matrices, and what reaches the gate in the backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.research.absorption import gates, masks

T = 5


def inputs(seed=0):
    s, g = 2 * np.random.default_rng(seed).standard_normal((2, 2, 3, T, T), np.float32)
    return jnp.asarray(s), jnp.asarray(g)


def literal_softmax(logits, mask):
    out = np.zeros(logits.shape)
    for place in np.ndindex(logits.shape[:-1]):
        keys = np.flatnonzero(mask[place])
        if keys.size:
            e = np.exp(logits[place][keys] - logits[place][keys].max())
            out[place][keys] = e / e.sum()
    return out


def test_pair_scores_by_loops():
    q, k = np.random.default_rng(0).standard_normal((2, 2, T, 3, 4), np.float32)
    found = np.asarray(gates.pair_scores(jnp.asarray(q), jnp.asarray(k), jnp.float32))
    for b, n, i, j in np.ndindex(2, 3, T, T):
        np.testing.assert_allclose(found[b, n, i, j], np.dot(q[b, i, n], k[b, j, n]) / 2.0, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("form", ("none", "multiplicative", "additive"))
def test_soft_forms_by_name_and_by_index(form):
    s, g = (np.asarray(x, np.float64) for x in inputs())
    sigmoid = 1 / (1 + np.exp(-g))
    want = {"none": s, "multiplicative": s * sigmoid, "additive": s + np.log(sigmoid)}[form]
    index = jnp.asarray(gates.SOFT.index(form))
    for which in (form, index):
        np.testing.assert_allclose(gates.soften(*inputs(), which), want, rtol=1e-5, atol=1e-5)


def test_constant_gate_is_a_temperature_of_two_and_an_additive_one_is_nothing():
    s, _ = inputs()
    mask = jnp.broadcast_to(masks.causal(T), s.shape)
    zero = jnp.zeros_like(s)
    np.testing.assert_allclose(gates.soften(s, zero, "multiplicative"), s / 2)
    np.testing.assert_allclose(gates.masked_softmax(gates.soften(s, zero, "additive"), mask),
                               gates.masked_softmax(s, mask), atol=1e-6)


def test_masked_softmax_and_its_empty_rows():
    s, g = inputs()
    mask = masks.select(g, 2, True)
    assert not mask.any(axis=-1).all(), "the case should hold empty rows"
    np.testing.assert_allclose(gates.masked_softmax(s, mask), literal_softmax(np.asarray(s, np.float64), mask),
                               atol=1e-6)


def test_hard_gate_has_exactly_no_gradient_and_straight_through_has_the_stated_one():
    s, g = inputs()
    cotangent = jax.random.normal(jax.random.key(5), s.shape)

    def hard(s, g):
        return jnp.sum(cotangent * gates.masked_softmax(s, masks.select(g, 2, False)))

    def straight(s, g):
        return jnp.sum(cotangent * gates.straight_through_softmax(s, masks.select(g, 2, False), g))

    np.testing.assert_array_equal(jax.grad(hard, 1)(s, g), 0.0)
    np.testing.assert_allclose(straight(s, g), hard(s, g), rtol=1e-5)
    # By hand: w_j = e_j m_j / Z with dm_j = sigmoid'(g_j) dg_j, at every visible key, kept or not; a dropped key's e_j
    # is at most the largest kept one's.
    s64, g64, c = (np.asarray(x, np.float64) for x in (s, g, cotangent))
    mask, visible = np.asarray(masks.select(g, 2, False)), np.tril(np.ones((T, T), bool))
    weights = literal_softmax(s64, mask)
    total = np.where(mask, np.exp(s64), 0).sum(axis=-1, keepdims=True)
    largest = np.where(mask, np.exp(s64), 0).max(axis=-1, keepdims=True)
    drawn = np.where(mask, np.exp(s64), np.minimum(np.exp(s64), largest)) / total
    slope = drawn * (c - (c * weights).sum(axis=-1, keepdims=True))
    sigmoid = 1 / (1 + np.exp(-g64))
    np.testing.assert_allclose(jax.grad(straight, 1)(s, g), np.where(visible, slope * sigmoid * (1 - sigmoid), 0),
                               rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.grad(straight, 0)(s, g), jax.grad(hard, 0)(s, g), rtol=1e-4, atol=1e-5)


def test_straight_through_gradient_is_bounded_where_the_gate_drops_the_key_that_attention_wants():
    s = jnp.zeros((1, 1, 3, 3)).at[..., 2, 0].set(200.0)
    g = jnp.zeros((1, 1, 3, 3)).at[..., 2, 1:].set(1.0)  # the gate keeps keys 1 and 2, the attention wants key 0

    def value(s, g):
        return jnp.sum(jnp.arange(3.0) * gates.straight_through_softmax(s, masks.select(g, 2, False), g)[0, 0, 2])

    of_s, of_g = jax.grad(value, (0, 1))(s, g)
    # Key 0 as large as either kept one: weight 1/2 against the mean of 1.5, times sigmoid'(0).
    np.testing.assert_allclose(of_g[0, 0, 2], [0.5 * (0 - 1.5) * 0.25, -0.25 * _slope(1.0), 0.25 * _slope(1.0)],
                               atol=1e-6)
    assert jnp.isfinite(of_s).all()


def _slope(x):
    return float(jax.nn.sigmoid(x) * (1 - jax.nn.sigmoid(x)))
