"""The instruments as a study's row asks them, on a stand-in for the row."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from l2a_jax.evaluation import perplexity
from l2a_jax.evaluation.needle import NeedleOptions
from l2a_jax.study import explain
from l2a_jax.study.faulty import FAULTS
from l2a_jax.training.metrics import plain as as_json
from tests.study.conftest import data_dir, make_row, session  # noqa: F401  (fixtures)


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


def test_the_autopsy_of_a_row(session, monkeypatch):  # noqa: F811
    """A row's own data, rates and layer; the benchmarks are left out, their items being words that the model lacks."""
    monkeypatch.setattr(explain, "CHANCE", {})
    monkeypatch.setattr(explain, "task_margin", lambda scores: None)
    monkeypatch.setattr(explain, "PROMPTS", ("each green hill stands", "the quiet river"))
    row = make_row("faulty", "l2a_ft", topology="sequential", share_attention=False, sinks=0)
    report = explain.autopsy_of(session, row, steps=4, windows=2, faults=FAULTS[:2])
    json.dumps(as_json(report), allow_nan=False)
    names = [found["fault"] for found in report["rows"]]
    assert names == ["plain model", "untrained", "none", "NaN weights", "NaN weights, evaluated before"]
    assert report["steps"] == 4 and report["text"]["windows"] == 2 and "needle" in report["rows"][2]
    assert report["rows"][3]["symptoms"]["zero training loss"] and report["rows"][2]["finite_losses"] == 1
