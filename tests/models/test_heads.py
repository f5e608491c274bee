"""Key/value heads that see everything, whatever is decided: against a literal mask, and in a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.inference.generate import generate
from l2a_jax.models.transformer import hidden_states
from tests.inference.cases import sequences_of, whole
from tests.models.cases import CONFIG, LAYERS, hidden, make_params, make_tokens
from tests.models.test_layer import oracle

SHARED = [name for name in LAYERS if name.startswith("shared")]
HEADS = jnp.array([[True, False], [False, False], [False, True]])


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_heads_are_a_literal_mask(name, rate):
    layer, params, tokens = LAYERS[name], make_params(LAYERS[name]), make_tokens(1, 17)
    decisions = jax.random.bernoulli(jax.random.key(3), rate, (CONFIG.num_layers, 1, 17))
    ours, _ = hidden(params, tokens, CONFIG, layer, decisions=decisions, heads=HEADS, backend="reference")
    np.testing.assert_allclose(ours, oracle(params, tokens, CONFIG, layer, decisions, HEADS), atol=2e-4, rtol=1e-3)


def test_all_heads_are_everything_routed_and_no_head_is_the_decisions():
    layer, params, tokens = LAYERS["shared"], make_params(LAYERS["shared"]), make_tokens()
    for heads, decisions in ((jnp.ones_like(HEADS), True), (jnp.zeros_like(HEADS), False)):
        forced = jnp.full((CONFIG.num_layers, *tokens.shape), decisions)
        opened, _ = hidden(params, tokens, CONFIG, layer, decisions=jnp.zeros_like(forced), heads=heads)
        want, _ = hidden(params, tokens, CONFIG, layer, decisions=forced)
        np.testing.assert_allclose(opened, want, atol=2e-5)


@pytest.mark.parametrize("name", SHARED)
def test_decoding_with_heads_is_the_whole_sequence(name):
    layer, params = LAYERS[name], make_params(LAYERS[name])
    prompts = [np.asarray(make_tokens(1, size, seed=size))[0].tolist() for size in (21, 9)]
    out = generate(params, CONFIG, layer, prompts, max_new_tokens=7, heads=HEADS, backend="reference")
    every, _ = whole(params, sequences_of(prompts, out), layer, out.decisions, heads=HEADS)
    for row, prompt in enumerate(prompts):
        scores = every[row, len(prompt) - 1 : len(prompt) + 6]
        np.testing.assert_array_equal(scores.argmax(-1), out.tokens[row])
        np.testing.assert_allclose(scores.max(-1), out.log_probabilities[row], atol=2e-5)


@pytest.mark.parametrize("layer", [LAYERS["sequential"], LAYERS["parallel"],
                                   dataclasses.replace(LAYERS["shared"], pruned_layers=(1,))])
def test_heads_need_one_set_and_the_whole_cache(layer):
    params = make_params(layer)
    with pytest.raises(ValueError, match="need a shared layer"):
        hidden_states(params, make_tokens(), CONFIG, layer, heads=HEADS)
    with pytest.raises(ValueError, match="need a shared layer"):
        generate(params, CONFIG, layer, [[1, 2]], max_new_tokens=2, heads=HEADS)


def test_heads_of_another_shape():
    with pytest.raises(ValueError, match=r"expected \[L, K\]"):
        hidden_states(make_params(LAYERS["shared"]), make_tokens(), CONFIG, LAYERS["shared"], heads=HEADS[:2])
