"""A lower threshold routes more, up to everything; what it buys is measured on the same windows and needles."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation import perplexity
from l2a_jax.evaluation.needle import NeedleOptions
from l2a_jax.research.replication import needles
from l2a_jax.research.replication.thresholds import format_thresholds, threshold_sweep

OPTIONS = NeedleOptions(lengths=(64,), depths=(0.0, 1.0), seeds=(0, 1), distractors=1)


def test_the_sweep(with_layer, windows):
    base = with_layer()
    router = np.random.default_rng(0).normal(size=(3, base.config.hidden_size)).astype(np.float32) * 0.02
    model = base._replace(params={**base.params, "layers": {**base.params["layers"],
                                                            "router": {"kernel": jnp.asarray(router)}}})
    learned = perplexity.score_windows(model, windows)
    prepared = needles.prepare(model, OPTIONS)
    report = threshold_sweep(model, windows, learned, prepared, OPTIONS, thresholds=(0.2, 1e-6))
    own, lower, least = report["rows"]
    assert own["threshold"] == 0.5 and own["worse"] == 0 and own["worse_95"] == [0, 0]
    assert own["sparsity"] > lower["sparsity"] > 0
    at = model._replace(l2a_config=dataclasses.replace(model.l2a_config, threshold=0.2))
    again = perplexity.score_windows(at, windows)
    assert lower["worse"] == pytest.approx((again.nll.sum() - learned.nll.sum()) / learned.tokens.sum(), abs=1e-6)
    assert lower["needle"] == {"64": needles.score(at, prepared, OPTIONS)["exact_match"]}
    everything = perplexity.score_windows(model, windows, np.ones_like(learned.decisions))
    change = (everything.nll.sum() - learned.nll.sum()) / learned.tokens.sum()
    assert least["sparsity"] == 0 and least["worse"] == pytest.approx(change, abs=1e-5)
    text = format_thresholds(report)
    assert len(text.splitlines()) == 4 and "needle 64" in text and "+0.0000" in text


def test_what_has_no_threshold(plain, with_layer, windows):
    prepared = needles.prepare(plain, OPTIONS)
    with pytest.raises(UserError, match="plain model"):
        threshold_sweep(plain, windows, perplexity.score_windows(plain, windows), prepared, OPTIONS)
    model = with_layer()
    with pytest.raises(UserError, match="a threshold is 0; expected"):
        threshold_sweep(model, windows, perplexity.score_windows(model, windows), prepared, OPTIONS, thresholds=(0,))
