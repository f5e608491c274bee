"""The instruments as a study's row asks them, on a stand-in for the row."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from l2a_jax.evaluation import perplexity
from l2a_jax.evaluation.needle import NeedleOptions
from l2a_jax.study import explain
from l2a_jax.training.metrics import plain as as_json


@pytest.fixture(scope="module")
def subject(with_layer, windows, needed, tmp_path_factory):
    model = with_layer()
    scores = perplexity.score_windows(model, windows, needed)
    needle = perplexity.Windows(windows.tokens[:2], windows.targets[:2], windows.scored[:2], windows.real[:2], {})
    options = NeedleOptions(lengths=(128,), depths=(0.5,), seeds=(0, 1))
    passes = SimpleNamespace(passes={}, needles=lambda row: (options, {128: needle}))
    return SimpleNamespace(model=model, session=passes, windows=windows, audited=lambda: (windows, scores),
                           row=SimpleNamespace(name="a row"), out=tmp_path_factory.mktemp("out"))


def test_routed_text_of_a_row(subject, needed):
    report = explain.routed_text(subject)
    json.dumps(as_json(report), allow_nan=False)
    assert report["share"] == pytest.approx(needed.mean()) and report["reach"] == 12
    assert (subject.out / report["picture"]).stat().st_size > 10_000 and report["picture_tokens"] == 128


def test_prunable_layers_of_a_row(subject):
    """An untrained router routes everything, so nothing can be pruned; halves of the text do not overlap."""
    report = explain.prunable_layers(subject)
    json.dumps(as_json(report), allow_nan=False)
    assert report["calibration"]["windows"] == report["text"]["windows"] == 4 and report["text"]["first_window"] == 4
    assert all(row["pruned"] == [] and np.isfinite(row["needle"]) for row in report["thresholds"])
