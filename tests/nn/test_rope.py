"""Rotary embedding: its definition, and the scalings against closed forms and stored values of transformers 5.23."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.config import MODELS, RopeScaling
from l2a_jax.nn.rope import amplitude, apply_rope, inverse_frequencies, rope_table


def test_scores_depend_on_the_distance_alone():
    config = MODELS["tiny"]
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, config.head_dim))

    def score(i, j):
        rotate = lambda x, at: apply_rope(x, rope_table(jnp.array([[at]]), config, RopeScaling()))  # noqa: E731
        return float(jnp.sum(rotate(q, i) * rotate(k, j)))

    assert score(7, 3) == pytest.approx(score(107, 103), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(8, 3), rel=1e-3)


def test_literal_rotation():
    config = MODELS["tiny"]
    x = jnp.zeros((1, 1, 1, config.head_dim)).at[..., 0].set(1.0)
    out = apply_rope(x, rope_table(jnp.array([[2]]), config, RopeScaling()))
    assert out[0, 0, 0, 0] == pytest.approx(np.cos(2.0))
    assert out[0, 0, 0, config.head_dim // 2] == pytest.approx(np.sin(2.0))


def test_theta_and_linear():
    plain = inverse_frequencies(64, 1e6, RopeScaling(), 32768)
    np.testing.assert_allclose(inverse_frequencies(64, 1e6, RopeScaling("theta", 5), 32768),
                               inverse_frequencies(64, 5e6, RopeScaling(), 32768))
    np.testing.assert_allclose(inverse_frequencies(64, 1e6, RopeScaling("linear", 5), 32768), plain / 5, rtol=1e-6)


def test_yarn_keeps_fast_divides_slow_and_blends_between():
    plain = inverse_frequencies(64, 1e6, RopeScaling(), 32768)
    ratio = inverse_frequencies(64, 1e6, RopeScaling("yarn", 4), 32768) / plain
    turns = 32768 * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 64], 1.0)
    np.testing.assert_allclose(ratio[turns < 0.5], 0.25)
    assert (np.diff(ratio) <= 1e-7).all()
    assert amplitude(RopeScaling("yarn", 4)) == pytest.approx(0.1 * np.log(4) + 1)
    assert amplitude(RopeScaling("yarn", 4, attention_factor=1.5)) == 1.5


@pytest.mark.torch
@pytest.mark.parametrize(("kind", "factor"), [("linear", 5.0), ("yarn", 4.0), ("yarn", 8.0)])
@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-1.5b", "tiny"])
def test_scalings_agree_with_transformers(kind, factor, name):
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    config = MODELS[name]
    parameters = {"rope_type": kind, "factor": factor, "rope_theta": config.rope_theta}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = config.max_positions
    theirs = Qwen2RotaryEmbedding(Qwen2Config(
        hidden_size=config.hidden_size, num_attention_heads=config.num_heads, head_dim=config.head_dim,
        max_position_embeddings=config.max_positions, rope_parameters=parameters))
    ours = inverse_frequencies(config.head_dim, config.rope_theta, RopeScaling(kind, factor), config.max_positions)
    np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=1e-5)
    assert amplitude(RopeScaling(kind, factor)) == pytest.approx(theirs.attention_scaling)
