"""The chunked loss against log_softmax: values and gradients, odd sizes, several models at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from l2a_jax.absorption.loss import summed_nll, token_nll


def reference(hidden, kernel, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(hidden @ kernel.T), targets[:, None], axis=-1)[:, 0]


def test_values_and_gradients_of_two_models():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, kernel = jax.random.normal(keys[0], (2, 13, 8)), jax.random.normal(keys[1], (2, 131, 8))
    targets = jax.random.randint(keys[2], (2, 13), 0, 131)
    chunked = jax.vmap(lambda h, k, t: 3 * summed_nll(h, k, t, 5))
    want = jax.vmap(lambda h, k, t: 3 * reference(h, k, t).sum())
    np.testing.assert_allclose(chunked(hidden, kernel, targets), want(hidden, kernel, targets), rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda h, k, t: token_nll(h, k, t, 5))(hidden, kernel, targets),
                               jax.vmap(reference)(hidden, kernel, targets), rtol=1e-5)
    found, expected = (jax.grad(lambda h, k, f=f: f(h, k, targets).sum(), (0, 1))(hidden, kernel)
                       for f in (chunked, want))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
