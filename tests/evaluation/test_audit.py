"""The routing audit: controls keep what they promise, and a choice of tokens that matters is told from one that not."""

import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.config import L2AConfig
from l2a_jax.data.recall import RecallCorpus, needs_memory
from l2a_jax.errors import UserError
from l2a_jax.evaluation import audit, controls, perplexity
from l2a_jax.models.params import add_routing
from l2a_jax.sources import TINY, load_pretrained

LAYER = L2AConfig(window=12, sinks=2)


@pytest.fixture(scope="module")
def plain():
    return load_pretrained(TINY, jnp.float32)


@pytest.fixture(scope="module")
def model(plain):
    return plain._replace(l2a_config=LAYER, params=add_routing(plain.params, plain.config, LAYER))


@pytest.fixture(scope="module")
def windows():
    corpus = RecallCorpus(128, 32)  # the sizes of test_run: compiled once for both
    return perplexity.batch_windows(list(corpus.held_out(1)), {"name": "recall corpus"}, needs_memory)


@pytest.fixture(scope="module")
def oracle(model, windows):
    """A router that knows: exactly the tokens that need memory are routed, in every layer."""
    needed = np.broadcast_to(needs_memory(windows.tokens), (3, *windows.tokens.shape))
    return perplexity.score_windows(model, windows, needed, batch_tokens=4_096)


@pytest.fixture(scope="module")
def report(model, windows, oracle):
    return audit.audit(model, windows, oracle, seeds=2, batch_tokens=4_096)


def test_a_choice_that_matters_beats_every_control(report, windows):
    rows = report["rows"]
    for name in ("none", "random", "shuffled"):
        assert rows[name]["worse_95"][0] > 0.02, name
        assert rows[name]["recall_accuracy"] < 0.4 < 0.9 < rows["learned"]["recall_accuracy"]
    assert report["gap"] == rows["random"]["worse"] and report["gap_perplexity"] > 0
    assert rows["all"]["density"] == 1 and rows["none"]["density"] == 0
    assert rows["shuffled"]["density"] == pytest.approx(rows["learned"]["density"], abs=1e-12)
    assert rows["random"]["density"] == pytest.approx(rows["learned"]["density"], abs=0.02)
    assert rows["static"]["density"] == pytest.approx(rows["learned"]["density"], abs=0.02)
    assert len(rows["random"]["perplexity_by_seed"]) == 2 and rows["random"]["perplexity_sd"] > 0
    assert report["reproduced_within"] < 1e-5
    assert "random" in audit.told(report)


def test_rows_are_what_forcing_those_decisions_gives(report, model, windows, oracle):
    rates = perplexity.routing_rates(oracle.decisions, windows.real)
    shape = windows.tokens.shape
    again = {
        "all": [np.ones((3, *shape), bool)], "none": [np.zeros((3, *shape), bool)],
        "random": [controls.random_decisions(seed, rates, *shape) for seed in (0, 1)],
        "static": [controls.static_decisions(0, rates, *shape)[0]],
    }
    for name, several in again.items():
        scores = [perplexity.score_windows(model, windows, one, batch_tokens=4_096) for one in several]
        total = np.mean([one.nll.sum() for one in scores]) - oracle.nll.sum()
        assert report["rows"][name]["worse"] == pytest.approx(total / windows.scored.sum(), abs=1e-9)


def test_a_choice_that_does_not_matter_has_no_gap(model, windows):
    rates = np.full(3, 0.3)
    learned = perplexity.score_windows(model, windows, controls.random_decisions(9, rates, *windows.tokens.shape),
                                       batch_tokens=4_096)
    report = audit.audit(model, windows, learned, seeds=2, batch_tokens=4_096)
    low, high = report["gap_95"]
    assert low < 0.02 and high > -0.02


def test_decisions_that_are_not_the_routers_are_refused(model, windows, oracle):
    with pytest.raises(UserError, match="more than rounding in float32"):
        audit.audit(model, windows, oracle._replace(decisions=~oracle.decisions), batch_tokens=4_096)
    with pytest.raises(UserError, match="more than rounding"):
        audit.audit(model, windows, oracle._replace(nll=oracle.nll + np.nan), batch_tokens=4_096)


def test_a_plain_model_has_nothing_to_audit(plain, windows, oracle):
    with pytest.raises(UserError, match="plain model"):
        audit.audit(plain, windows, oracle._replace(decisions=None))


def test_random_decisions_depend_on_seed_and_window_alone():
    rates = np.array([0.0, 0.25, 0.9, 1.0])
    few, many, other = (controls.random_decisions(*given) for given in ((3, rates, 4, 50), (3, rates, 40, 50),
                                                                     (4, rates, 40, 50)))
    np.testing.assert_array_equal(few, many[:, :4])
    assert (many != other).any()
    np.testing.assert_allclose(many.mean(axis=(1, 2)), rates, atol=0.04)
    assert not many[0].any() and many[3].all()


def test_shuffling_keeps_every_count_and_padding():
    rng = np.random.default_rng(0)
    real = np.arange(30) < np.array([[30], [17], [1]])
    decisions = (rng.random((4, 3, 30)) < 0.4) & real
    shuffled = controls.shuffled_decisions(1, decisions, real)
    np.testing.assert_array_equal(shuffled.sum(axis=2), decisions.sum(axis=2))
    assert not (shuffled & ~real).any() and (shuffled != decisions).any()


@pytest.mark.parametrize(("rates", "chosen"), [
    ([0.1, 0.5, 0.3, 0.2], [0, 1, 0.1, 0]), ([0.5, 0.5], [1, 0]), ([0, 0], [0, 0]), ([1, 1], [1, 1]),
    ([0.0, 0.9, 0.8], [0, 1, 0.7]),
])
def test_static_layers_by_rate_up_to_the_density(rates, chosen):
    decisions, found = controls.static_decisions(0, np.array(rates, float), 20, 100)
    np.testing.assert_allclose(found, chosen, atol=1e-9)
    np.testing.assert_allclose(decisions.mean(axis=(1, 2)), chosen, atol=0.04)


def test_pruned_layers_stay_pruned(model, windows):
    pruned = model._replace(l2a_config=L2AConfig(window=12, sinks=2, pruned_layers=(1,)))
    learned = perplexity.score_windows(pruned, windows, np.ones((3, *windows.tokens.shape), bool), batch_tokens=4_096)
    rows = audit.audit(pruned, windows, learned, seeds=1, batch_tokens=4_096)["rows"]
    assert rows["all"]["density"] == pytest.approx(2 / 3) == rows["learned"]["density"]
    assert rows["all"]["worse"] == 0 and rows["static"]["layer_rates"].tolist() == [1, 0, 1]
