"""What is routed: counts that add up, rates recovered from decisions made by rule."""

import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.evaluation.token_kinds import repetitions
from l2a_jax.research.replication.routed_text import format_routed, routed_share, what_is_routed
from tests.evaluation.test_token_kinds import EXPECTED, PIECES, decode


def windows_of(tokens, real=None):
    tokens = np.asarray(tokens, np.int32)
    real = np.ones(tokens.shape, bool) if real is None else real
    return Windows(tokens, tokens, real, real, {"name": "made up"})


def test_rates_come_back_from_decisions_made_by_rule():
    """Layer 0 routes newlines, layer 1 tokens seen beyond the window, layer 2 everything, layer 3 is pruned."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, len(PIECES), (6, 80))
    real = np.arange(80) < np.array([80, 80, 80, 80, 50, 20])[:, None]
    seen = repetitions(tokens, 16)
    newline = np.isin(tokens, [i for i, form in enumerate(EXPECTED) if form == "newline"])
    decisions = np.stack([newline, seen["token seen beyond"], np.ones_like(newline), np.zeros_like(newline)]) & real
    report = what_is_routed(windows_of(tokens, real), decisions, decode, reach=16, pruned=(3,))
    classes = report["classes"]
    for kind in ("form", "position"):
        assert sum(row["tokens"] for row in classes.values() if row["kind"] == kind) == real.sum() == report["tokens"]
        assert sum(row["of_all_routed"] for row in classes.values() if row["kind"] == kind) == pytest.approx(1)
    share = decisions[:3].mean(axis=0)
    np.testing.assert_allclose(routed_share(decisions, (3,)), share)
    assert classes["newline"]["tokens"] == (newline & real).sum()
    assert classes["newline"]["share"] == pytest.approx(share[newline & real].mean())
    assert classes["newline"]["ratio"] == pytest.approx(share[newline & real].mean() / share[real].mean())
    assert classes["digit"]["share"] == pytest.approx((1 + decisions[1][np.isin(tokens, [7, 8]) & real].mean()) / 3)
    low, high = classes["newline"]["share_95"]
    assert low < classes["newline"]["share"] < high
    layers = report["layers"]
    assert layers[0]["most_routed"]["form"] == {"class": "newline", "share": 1.0}
    assert layers[1]["most_routed"]["repetition"]["class"] == "token seen beyond" and layers[2]["share"] == 1
    assert layers[3]["pruned"] and layers[3]["share"] == 0
    text = format_routed(report)
    assert "newline" in text and "pruned" in text


def test_nothing_routed_has_no_ratio_and_nothing_able_is_an_error():
    windows = windows_of(np.zeros((2, 9)))
    report = what_is_routed(windows, np.zeros((2, 2, 9), bool), decode, reach=4)
    assert report["share"] == 0 and report["classes"]["capitalised"]["ratio"] is None
    assert "capitalised" in format_routed(report)
    with pytest.raises(UserError, match="every layer is pruned"):
        routed_share(np.zeros((2, 2, 9), bool), (0, 1))
