"""The distance of residual streams: cases whose answer is known, and the definition written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.config import L2AConfig, RopeScaling
from l2a_jax.errors import UserError
from l2a_jax.models.transformer import probe_layers
from l2a_jax.research.replication.residual import residual_distance


def everything(windows):
    return np.ones((3, *windows.tokens.shape), bool)


@pytest.mark.parametrize("share", [True, False])
def test_parallel_with_everything_routed_is_the_plain_model(plain, with_layer, windows, share):
    routed = with_layer(L2AConfig(window=12, sinks=2, share_attention=share))
    found = residual_distance(plain, routed, windows, everything(windows), buckets=(0,))
    assert max(found["relative_l2"]) < 2e-6 and found["relative_l2"][0] == 0
    assert min(found["cosine"]) > 1 - 1e-6 and found["norm_ratio"] == pytest.approx([1] * 4, abs=1e-6)
    assert found["tokens"] == windows.real.sum() and found["decisions"] == "given"
    if share:  # the untrained router routes everything by itself
        assert max(residual_distance(plain, routed, windows, buckets=(0,))["relative_l2"]) < 2e-6


def test_sequential_and_other_ropes_are_not(plain, with_layer, windows):
    sequential = L2AConfig(window=12, topology="sequential", share_attention=False)
    linear = L2AConfig(window=12, sinks=2, rope=RopeScaling("linear", 5))
    for layer in (sequential, linear):
        found = residual_distance(plain, with_layer(layer), windows, everything(windows), buckets=(0,))
        assert found["relative_l2"][0] == 0 and min(found["relative_l2"][1:]) > 0.05, layer
        assert max(found["cosine"][1:]) < 0.999


def test_nothing_routed_differs_only_beyond_the_window(plain, with_layer, windows):
    """Window 12 and 2 sinks: position 13 still sees every key, position 14 misses key 2."""
    found = residual_distance(plain, with_layer(), windows, ~everything(windows), buckets=(0, 14, 1_000))
    inside, beyond = found["buckets"]
    assert (inside["from"], inside["to"], beyond["from"], beyond["to"]) == (0, 14, 14, 128)
    assert max(inside["relative_l2"]) < 2e-6 < 1e-2 < min(beyond["relative_l2"][1:])
    assert inside["tokens"] == 14 * 8 and inside["tokens"] + beyond["tokens"] == found["tokens"]
    pooled = (np.array(inside["cosine"]) * inside["tokens"] + np.array(beyond["cosine"]) * beyond["tokens"])
    np.testing.assert_allclose(found["cosine"], pooled / found["tokens"], rtol=1e-6)


def test_the_definition_written_out(plain, with_layer, windows, needed):
    """Streams of both models token by token in float64, with padding left out, in batches of three windows."""
    routed = with_layer()
    real = windows.real & (np.arange(128) < np.linspace(128, 40, 8).astype(int)[:, None])
    found = residual_distance(plain, routed, windows._replace(real=real), needed, batch_tokens=3 * 128, buckets=(0, 50))
    streams = [np.asarray(probe_layers(model.params, jnp.asarray(windows.tokens), model.config, model.l2a_config,
                                       probe=lambda x: x, decisions=None if forced is None else jnp.asarray(forced)),
                          np.float64)
               for model, forced in ((plain, None), (routed, needed))]
    relative, cosine = np.zeros(4), np.zeros(4)
    for depth in range(4):
        for row, column in np.argwhere(real):
            x, y = (stream[depth, row, column] for stream in streams)
            relative[depth] += np.sqrt(((y - x) ** 2).sum() / (x**2).sum())
            cosine[depth] += (x @ y) / np.sqrt((x @ x) * (y @ y))
    np.testing.assert_allclose(found["relative_l2"], relative / real.sum(), atol=2e-6)
    np.testing.assert_allclose(found["cosine"], cosine / real.sum(), atol=2e-6)
    assert found["relative_l2"][-1] > 0.01 and found["buckets"][1]["tokens"] == real[:, 50:].sum()


def test_what_cannot_be_compared(plain, with_layer, windows):
    with pytest.raises(UserError, match="plain model with a routed one"):
        residual_distance(with_layer(), plain, windows)
    broken = with_layer()
    params = {**broken.params, "embed": {"embedding": broken.params["embed"]["embedding"] * np.nan}}
    with pytest.raises(UserError, match="not finite"):
        residual_distance(plain, broken._replace(params=params), windows, everything(windows), buckets=(0,))
