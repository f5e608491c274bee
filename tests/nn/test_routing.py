"""The routing functions against hand-derived values and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.nn import routing


def test_a_router_at_zero_routes_everything():
    assert bool(routing.decide(jnp.zeros(3), 0.1, 0.5).all())


@pytest.mark.parametrize(("temperature", "threshold"), [(0.1, 0.5), (1.0, 0.9), (0.5, 0.2)])
def test_decision_is_probability_above_threshold(temperature, threshold):
    z = jax.random.normal(jax.random.key(0), (1000,))
    above = routing.probability(z, temperature) >= threshold
    assert (routing.decide(z, temperature, threshold) == above).all()


def test_router_logits_are_float32_whatever_comes_in():
    h = jax.random.normal(jax.random.key(0), (2, 5, 256)).astype(jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (256,))
    z = routing.router_logits(h, w)
    exact = np.asarray(h, np.float64) @ np.asarray(w, np.float64)
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(z, exact, rtol=1e-5, atol=1e-4)


def test_straight_through_has_the_value_of_d_and_the_slope_of_p():
    d = jnp.array([True, False, True, False])
    computed = jnp.array([True, True, True, False])
    z = jnp.array([0.03, -0.2, 0.4, -0.01])

    def weighted(z):
        return jnp.sum(routing.straight_through(d, routing.probability(z, 0.1), computed) * jnp.array([1., 2., 3., 4.]))

    value, slope = jax.value_and_grad(weighted)(z)
    p = 1 / (1 + np.exp(-np.asarray(z) / 0.1))
    assert value == 1 + 3  # exactly d
    np.testing.assert_allclose(slope, np.array([1, 2, 3, 0]) * p * (1 - p) / 0.1, rtol=1e-5)
    assert slope[3] == 0  # exactly: global attention was not computed there


def test_penalty_is_the_mean_square_over_layers_and_real_tokens():
    p = jnp.array([[[0.5, 1.0, 0.9]], [[0.0, 0.2, 0.9]]])
    real = jnp.array([[True, True, False]])
    assert routing.penalty(p, real) == pytest.approx((0.25 + 1 + 0 + 0.04) / 4)


def test_a_routed_token_costs_the_keys_beyond_its_window():
    """Window 2, 1 sink: the fourth token of a document is the first with a key that neither holds."""
    ids = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]])
    keys = routing.keys_beyond(ids, ids.shape, window=2, sinks=1)
    assert keys.tolist()[0][:9] == [0, 0, 0, 1, 2, 0, 0, 0, 1]
    expected = np.array([0, 0, 0, 1, 2, 0, 0, 0, 1, 0]) * 9 / 4
    np.testing.assert_allclose(routing.cost_of_keys(keys, ids != 0)[0], expected)
    assert routing.keys_beyond(None, (1, 5), 0, 0).tolist() == [[1, 2, 3, 4, 5]]
    assert routing.cost_of_keys(jnp.zeros((1, 4), int), jnp.ones((1, 4), bool)).tolist() == [[0, 0, 0, 0]]


def test_penalty_gradient_agrees_with_finite_differences_and_reaches_h():
    h = jax.random.normal(jax.random.key(0), (1, 3, 8))
    w = jax.random.normal(jax.random.key(1), (8,)) * 0.1
    real = jnp.ones((1, 3), bool)

    def loss(h):
        return routing.penalty(routing.probability(routing.router_logits(h, w), 0.5)[None], real)

    slope, loss, step = jax.jit(jax.grad(loss))(h), jax.jit(loss), 1e-2
    for index in [(0, 0, 0), (0, 1, 5), (0, 2, 7)]:
        bump = np.zeros(h.shape, np.float32)
        bump[index] = step
        assert slope[index] == pytest.approx(float((loss(h + bump) - loss(h - bump)) / (2 * step)), rel=2e-2, abs=1e-6)
    assert jnp.abs(slope).min() > 0


def test_penalty_schedule():
    weights = [float(routing.penalty_weight(step, maximum=2.0, warmup=10, ramp=4)) for step in (0, 10, 11, 12, 14, 99)]
    assert weights == pytest.approx([0, 0, 0.5, 1.0, 2.0, 2.0])


def test_sparsity_and_entropy_ignore_padding():
    real = jnp.array([[True, True, False]])
    d = jnp.array([[[True, False, False]], [[False, False, True]]])
    np.testing.assert_allclose(routing.sparsity(d, real), [0.5, 1.0])
    p = jnp.array([[[0.5, 0.5, 1.0]]])
    np.testing.assert_allclose(routing.entropy(p, real), [np.log(2)], rtol=1e-6)


def test_random_decisions_have_the_asked_rates_per_layer():
    rates = jnp.array([0.0, 0.2, 0.7, 1.0])
    d = routing.random(jax.random.key(0), rates, 8, 4096)
    np.testing.assert_allclose(d.mean(axis=(1, 2)), rates, atol=0.01)


def test_shuffled_keeps_every_count_and_leaves_padding_alone():
    d = jax.random.bernoulli(jax.random.key(0), 0.3, (3, 2, 50))
    real = jnp.arange(50)[None] < jnp.array([[50], [31]])
    d = d & real
    out = routing.shuffled(jax.random.key(1), d, real)
    np.testing.assert_array_equal(out.sum(axis=2), d.sum(axis=2))
    assert not bool((out & ~real).any())
    assert bool((out != d).any())
    np.testing.assert_array_equal(routing.shuffled(jax.random.key(1), d).sum(axis=2), d.sum(axis=2))


def test_rows_with_a_decision_gradient_are_the_gated_sum():
    """Value and every gradient of d~ far + (1 - d~) near, from the chosen rows and the difference alone."""
    keys = jax.random.split(jax.random.key(3), 4)
    far, near, g = (jax.random.normal(key, (2, 5, 3, 4)) for key in keys[:3])
    d = jax.random.bernoulli(keys[3], 0.5, (2, 5)).astype(jnp.float32)

    def gated(open_):
        return jnp.sum(g * (routing.gate(open_, far) + routing.gate(1 - open_, near)))

    def chosen(open_):
        rows = jnp.where(d[..., None, None] > 0, far, near)
        return jnp.sum(g * routing.with_decision_gradient(rows, open_, far - near))

    ours, theirs = jax.jit(lambda d: (jax.value_and_grad(chosen)(d), jax.value_and_grad(gated)(d)))(d)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
