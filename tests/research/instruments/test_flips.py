"""Routing noise: what is flipped and what is kept, the sweep, and training with inverted decisions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation import perplexity
from l2a_jax.models.transformer import hidden_states
from l2a_jax.research.replication.flips import flip_sweep, flipped_decisions, format_flips
from tests.models.cases import CONFIG, LAYERS, make_params, make_tokens, packed

REAL = np.arange(200) < np.array([[200], [150], [7]])


def some_decisions(rate=0.2):
    return (np.random.default_rng(0).random((4, 3, 200)) < rate) & REAL


def test_independent_flips_have_the_share_and_spare_what_cannot_flip():
    decisions = some_decisions()
    changed = flipped_decisions(1, decisions, REAL, 0.3, "independent", pruned=(2,)) != decisions
    assert changed[[0, 1, 3]].sum() / (3 * REAL.sum()) == pytest.approx(0.3, abs=0.04)
    assert not changed[2].any() and not (changed & ~REAL).any()
    np.testing.assert_array_equal(flipped_decisions(1, decisions, REAL, 1.0, "independent"), ~decisions & REAL)
    np.testing.assert_array_equal(flipped_decisions(1, decisions, REAL, 0.0, "independent"), decisions)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 1.0])
def test_matched_flips_keep_the_rate_of_every_layer_and_window(share):
    decisions = some_decisions()
    decisions[3] = False  # nothing is on: nothing can be swapped
    flipped = flipped_decisions(1, decisions, REAL, share, "matched", pruned=(2,))
    np.testing.assert_array_equal(flipped.sum(axis=2), decisions.sum(axis=2))
    on, total = decisions.sum(axis=2), REAL.sum(axis=1)
    possible = np.minimum(np.round(share * total / 2), np.minimum(on, total - on))
    possible[2] = 0
    np.testing.assert_array_equal((flipped != decisions).sum(axis=2), 2 * possible)
    assert not (flipped & ~REAL).any() and (share == 0 or (flipped != decisions).any())


@pytest.mark.parametrize("kind", ["independent", "matched"])
def test_draws_depend_on_seed_and_window_alone(kind):
    decisions = some_decisions()
    few, many, other = (flipped_decisions(seed, decisions[:, :count], REAL[:count], 0.2, kind)
                        for seed, count in ((3, 2), (3, 3), (4, 3)))
    np.testing.assert_array_equal(few, many[:, :2])
    assert (many != other).any()
    places = many[:2, 0] != decisions[:2, 0]
    assert (places[0] != places[1]).any()  # layers do not share their draw


def test_what_cannot_be_flipped(plain, windows):
    for given, said in (((0, some_decisions(), REAL, 1.2, "matched"), "share of decisions"),
                        ((0, some_decisions(), REAL, 0.2, "both"), "one of independent, matched")):
        with pytest.raises(UserError, match=said):
            flipped_decisions(*given)
    with pytest.raises(UserError, match="plain model"):
        flip_sweep(plain, windows, perplexity.score_windows(plain, windows))


def test_noise_costs_what_the_choice_was_worth(with_layer, windows, needed):
    """Forced decisions that matter: a little noise hurts a little, and the swap hurts at an equal number of routed."""
    model = with_layer()
    learned = perplexity.score_windows(model, windows, needed)
    report = flip_sweep(model, windows, learned, shares=(0.02, 0.08), seeds=2)
    rows = {(row["kind"], row["share"]): row for row in report["rows"]}
    assert report["learned"]["worse"] == 0 and report["learned"]["perplexity"] == pytest.approx(
        np.exp(learned.nll.sum() / learned.tokens.sum()))
    for share in (0.02, 0.08):
        assert rows["matched", share]["density"] == pytest.approx(report["learned"]["density"], abs=1e-12)
    assert rows["independent", 0.08]["density"] > report["learned"]["density"] + 0.04
    assert rows["independent", 0.08]["flipped"] == pytest.approx(0.08, abs=0.02)
    assert 0 < rows["matched", 0.02]["worse"] < rows["matched", 0.08]["worse"]
    assert rows["matched", 0.08]["worse_95"][0] > 0.01
    again = perplexity.score_windows(model, windows, flipped_decisions(1, needed, windows.real, 0.08, "matched"))
    assert rows["matched", 0.08]["perplexity_by_seed"][1] == pytest.approx(
        np.exp(again.nll.sum() / again.tokens.sum()))
    assert "matched" in format_flips(report)


def value_and_router_gradient(layer, params, train=True, decisions=None):
    """A loss that reads every hidden state, its gradient to the router, and the decisions."""
    tokens, ids = make_tokens(), packed()

    def loss(kernel):
        full = {**params, "layers": {**params["layers"], "router": {"kernel": kernel}}}
        hidden, routed = hidden_states(full, tokens, CONFIG, layer, segment_ids=ids, key=jax.random.key(5),
                                       train=train, decisions=decisions)
        return jnp.sum(jnp.sin(hidden * jnp.arange(CONFIG.hidden_size))), routed.decisions

    (value, decided), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params["layers"]["router"]["kernel"])
    return float(value), np.asarray(gradient), np.asarray(decided)


def test_training_with_every_decision_inverted_is_training_the_negated_router():
    """A router with negated weights decides the opposite with p -> 1 - p, whose slope is the same: so inverting every
    decision must give the value and the gradient that the negated router has without noise. (In the last layer: in
    earlier ones the gradient also runs through later logits, whose dependence on the stream is negated too.)"""
    layer = LAYERS["shared"]
    params = make_params(layer)
    kernel = params["layers"]["router"]["kernel"]
    negated = {**params, "layers": {**params["layers"], "router": {"kernel": -kernel}}}
    value, gradient, decided = value_and_router_gradient(dataclasses.replace(layer, flip=1.0), params)
    expected, other, opposite = value_and_router_gradient(layer, negated)
    np.testing.assert_array_equal(decided, opposite)
    assert value == pytest.approx(expected, abs=1e-4) and np.abs(other[-1]).max() > 1
    np.testing.assert_allclose(gradient[-1], other[-1], atol=1e-4 * np.abs(other[-1]).max())


def test_noise_in_training_only():
    layer = dataclasses.replace(LAYERS["shared"], flip=0.3)
    params, tokens, ids = make_params(layer), make_tokens(), packed()
    options = {"segment_ids": ids, "key": jax.random.key(5)}
    clean = hidden_states(params, tokens, CONFIG, layer, **options)[1].decisions
    train = jax.jit(lambda key: hidden_states(params, tokens, CONFIG, layer, segment_ids=ids, key=key, train=True)[1])
    noisy = [np.asarray(train(jax.random.key(seed)).decisions) for seed in range(8)]
    real = np.asarray(ids != 0)
    # In the first layer nothing but the noise differs; later layers read what it changed.
    first = np.stack([decided[0] != clean[0] for decided in noisy])
    assert first[:, real].mean() == pytest.approx(0.3, abs=0.08) and not first[:, ~real].any()
    assert (noisy[0] != noisy[1]).any()
    np.testing.assert_array_equal(noisy[0], train(jax.random.key(0)).decisions)
    with pytest.raises(ValueError, match="give a key"):
        hidden_states(params, tokens, CONFIG, layer, train=True)
    with pytest.raises(ValueError, match=r"flip is 1\.5"):
        dataclasses.replace(layer, flip=1.5)
