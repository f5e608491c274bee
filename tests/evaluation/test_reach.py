"""Reach against a literal computation: every place one by one, with windows, losses and shares written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.config import L2AConfig
from l2a_jax.errors import UserError
from l2a_jax.evaluation import controls, intervals, perplexity, reach
from l2a_jax.evaluation.evaluate import evaluate
from l2a_jax.evaluation.options import Options
from l2a_jax.models.transformer import forward
from l2a_jax.sources import TINY, load_pretrained
from tests.models.cases import with_router

LAYER = L2AConfig(window=6, sinks=1)
LENGTH, ROWS = 40, 5


@pytest.fixture(scope="module")
def plain():
    return load_pretrained(TINY, jnp.float32)


@pytest.fixture(scope="module")
def model(plain):
    return with_router(plain, LAYER, seed=5)


@pytest.fixture(scope="module")
def windows(plain):
    """Text of an odd length: the last window is padded."""
    ids = np.random.default_rng(0).integers(0, plain.config.vocab_size, LENGTH * ROWS - 11).astype(np.int32)
    return perplexity.text_windows(ids, LENGTH, LENGTH, {"name": "noise"})


@pytest.fixture(scope="module")
def found(model, windows):
    odd = np.zeros((model.config.num_layers, *windows.tokens.shape), bool)
    odd[:, :, 1::2] = True
    return reach.reach(model, windows, forced={"odd": odd}, seeds=2, batch_tokens=3 * LENGTH)


def literal(model, windows, decisions):
    """Nats by window and group of distance, place by place."""
    sums = np.zeros((len(windows.tokens), 4))
    for row in range(len(windows.tokens)):
        logits, _ = forward(model.params, jnp.asarray(windows.tokens[row : row + 1]), model.config, LAYER,
                            decisions=jnp.asarray(decisions[:, row : row + 1]), backend="reference")
        scores = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)))
        for place in range(LENGTH):
            past = place + 1
            group = 0 if past <= 7 else 1 if past <= 12 else 2 if past <= 24 else 3
            if windows.scored[row, place]:
                sums[row, group] -= scores[place, windows.targets[row, place]]
    return sums


def test_rows_are_the_literal_computation(found, model, windows):
    learned = perplexity.score_windows(model, windows, batch_tokens=3 * LENGTH)
    assert found["edges"] == [7, 12, 24] and found["window"] == 6 and found["sinks"] == 1
    counts = [sum(7 < place + 1 <= 12 for place in range(LENGTH)), 12, LENGTH - 24]
    np.testing.assert_array_equal(found["tokens"], np.array(counts) * ROWS - np.array([0, 0, 12]))
    want = {"learned": [learned.decisions]}
    for name, _, decisions in controls.controls(learned.decisions, windows.real, (), 2):
        want.setdefault(name, []).append(decisions)
    sums = {name: np.mean([literal(model, windows, one) for one in several], axis=0) for name, several in want.items()}
    tokens = found["tokens"].sum()
    gain = (sums["none"] - sums["all"])[:, 1:].sum()
    assert found["worth"] == pytest.approx(gain / tokens, abs=1e-5)
    for name, mine in sums.items():
        row = found["rows"][name]
        np.testing.assert_allclose(row["window_nll"], mine, atol=2e-3)
        assert row["beyond"] == pytest.approx(mine[:, 1:].sum() / tokens, abs=1e-4)
        if gain > 0:
            assert row["kept"] == pytest.approx((sums["none"] - mine)[:, 1:].sum() / gain, abs=2e-2)
        # Within the window no decision matters.
        assert row["nll"][0] == pytest.approx(found["rows"]["all"]["nll"][0], abs=1e-5)
    assert found["rows"]["odd"]["density"] == pytest.approx(0.5, abs=0.02)


def test_everything_keeps_one_and_nothing_zero(found):
    for name, share in (("all", 1.0), ("none", 0.0)):
        row = found["rows"][name]
        assert row["density"] == row["density_beyond"] == share
        if found["worth"] > 0:
            assert row["kept"] == pytest.approx(share, abs=1e-12)
            assert row["kept_95"] == pytest.approx([share, share], abs=1e-9)


def test_shares_and_their_intervals():
    """Sums of two windows of one group beyond: worth 3 and 1 nats of 10 and 10 tokens; a choice keeps 2 and 1."""
    none, everything = np.array([[5.0, 9.0], [5.0, 7.0]]), np.array([[5.0, 6.0], [5.0, 6.0]])
    chosen, tokens = np.array([[5.0, 7.0], [5.0, 6.0]]), np.full((2, 2), 10)
    assert reach.worth(none, everything, tokens)["worth"] == pytest.approx(4 / 20)
    found = reach.kept(none, chosen, everything)
    assert found["kept"] == pytest.approx(3 / 4) and found["kept_by_distance"] == pytest.approx([3 / 4])
    residuals = np.array([2 - 3 * 3 / 4, 1 - 3 / 4])
    half = 12.706204736 * np.sqrt(2 * np.square(residuals).sum()) / 4
    assert found["kept_95"] == pytest.approx([3 / 4 - half, 3 / 4 + half])
    assert reach.kept(everything, chosen, none)["kept"] is None  # worth less than nothing: no share of it


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (7, 2.3646), (30, 2.0423)])
def test_student(freedom, quantile):
    assert intervals.student(freedom) == pytest.approx(quantile, rel=2e-3)


def test_a_plain_model_has_its_losses_by_distance(plain, windows, monkeypatch):
    monkeypatch.setattr(reach, "PLAIN_WINDOW", 16)
    found = reach.reach(plain, windows, batch_tokens=3 * LENGTH)
    assert list(found["rows"]) == ["plain"] and found["edges"] == [16, 32]
    scores = perplexity.score_windows(plain, windows, batch_tokens=3 * LENGTH)
    assert found["rows"]["plain"]["beyond"] == pytest.approx(scores.token_nll[:, 16:].sum() / found["tokens"].sum())
    assert "nats a token" in reach.told(found)
    with pytest.raises(UserError, match="plain model, which routes nothing; odd cannot be forced"):
        reach.reach(plain, windows, forced={"odd": np.zeros((3, *windows.tokens.shape), bool)})


def test_windows_within_the_window_say_so(model, windows):
    short = perplexity.text_windows(windows.tokens.reshape(-1), 7, 7, {"name": "noise"})
    with pytest.raises(UserError, match=r"longer than the window of 6 and 1 sinks"):
        reach.reach(model, short)


def test_the_command_writes_and_tells(tmp_path, caplog):
    found, path = evaluate(Options(source=TINY, tasks=("reach",), out=tmp_path, layer={"window": 12, "sinks": 2},
                                   max_windows=4, audit_seeds=1))
    entry = found["tasks"]["reach"]
    assert path.exists() and entry["rows"]["learned"]["kept"] == pytest.approx(1)  # an untrained router routes all
    assert entry["rows"]["random"]["behind"] == pytest.approx(0)
    told = reach.told(entry)
    assert "kept [95 %]" in told and "none" in told
