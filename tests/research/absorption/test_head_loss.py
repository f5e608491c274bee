"""The chunked loss against log_softmax: values and gradients, odd sizes, several models at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from l2a_jax.research.absorption.head_loss import summed_nll, token_nll


def reference(hidden, kernel, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(hidden @ kernel.T), targets[:, None], axis=-1)[:, 0]


def test_values_and_gradients_of_two_models():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, kernel = jax.random.normal(keys[0], (2, 13, 8)), jax.random.normal(keys[1], (2, 131, 8))
    targets = jax.random.randint(keys[2], (2, 13), 0, 131)

    def with_gradients(of_one):
        def total(hidden, kernel):
            each = jax.vmap(of_one)(hidden, kernel, targets)
            return 3 * each.sum(), each

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, kernel)

    (_, found), gradients = with_gradients(lambda h, k, t: summed_nll(h, k, t, 5))
    (_, each), wanted = with_gradients(reference)
    np.testing.assert_allclose(found, each.sum(axis=1), rtol=1e-5)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    one = jax.jit(jax.vmap(lambda h, k, t: token_nll(h, k, t, 5)))
    np.testing.assert_allclose(one(hidden, kernel, targets), each, rtol=1e-5)
