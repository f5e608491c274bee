"""RULER under a choice: prompts and answers, and the cut that the router has as it is."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.evaluation import ruler, ruler_source
from l2a_jax.evaluation.options import Options
from l2a_jax.evaluation.ruler_text import Item
from l2a_jax.nn import routing
from l2a_jax.research.rivals import rows
from l2a_jax.research.rivals.choices import Choice
from l2a_jax.research.rivals.options import RivalOptions
from l2a_jax.research.rivals.prepare import Prepared
from l2a_jax.research.rivals.unfinished import Unfinished
from l2a_jax.sources import TINY
from tests.research.rivals.conftest import LAYER

TASK, LENGTH = "niah_single_1", 40


@pytest.fixture(scope="module")
def prepared(model):
    rng = np.random.default_rng(0)
    items = [Item(rng.integers(0, model.config.vocab_size, LENGTH).astype(np.int32), ["a"]) for _ in range(2)]
    return Prepared(None, None, {(TASK, LENGTH): items},
                    Options(source=TINY, tasks=("ruler",), lengths=(LENGTH,), ruler_tasks=(TASK,)))


def decided(model, prepared, choice, monkeypatch):
    """The decisions of prompts and answers, and what is told of the prompts."""
    made, generate = [], ruler.generate
    with monkeypatch.context() as patch:
        patch.setattr(ruler, "generate", lambda *given, **options: made.append(generate(*given, **options)) or made[-1])
        told = dict(rows._ruler(model, prepared, choice, {"mesh": None}))
    [out] = made
    count = int(out.lengths.min())
    assert count > 4
    return np.asarray(out.decisions)[:, :, : LENGTH + count - 1], told[f"{TASK} {LENGTH}"]["local"]


def test_an_answer_is_written_under_the_choice_of_its_prompt(model, prepared, monkeypatch):
    layers, heads = model.config.num_layers, model.config.num_kv_heads
    assert ruler_source.settings(TASK).new_tokens > 4
    free, _ = decided(model, prepared, Choice("learned", 0.5), monkeypatch)
    assert 0 < free[:, :, LENGTH:].mean() < 1  # so that whoever decides can be told

    rates = np.eye(layers)[1]
    found, local = decided(model, prepared, Choice("searched", 1 / layers, rates=rates), monkeypatch)
    assert (found == rates.astype(bool)[:, None, None]).all() and local == pytest.approx(1 - 1 / layers)
    opened = np.zeros((layers, heads), bool)
    opened[2, 0] = True
    found, local = decided(model, prepared, Choice("heads", opened.mean(), heads=opened), monkeypatch)
    assert not found.any() and local == pytest.approx(1 - opened.mean())

    moved = dataclasses.replace(LAYER, threshold=0.7)
    cut = routing.least(moved.temperature, moved.threshold)
    found, local = decided(model, prepared, Choice("learned", 0.3, cut=cut), monkeypatch)
    other, _ = decided(model._replace(l2a_config=moved), prepared, Choice("learned", 0.3), monkeypatch)
    np.testing.assert_array_equal(found, other)
    assert found.mean() < free.mean() and local == pytest.approx(1 - found[:, :, :LENGTH].mean())


def test_a_router_is_known_at_the_cut_of_its_own_threshold(model, windows, prepared, monkeypatch, tmp_path):
    """Not at 0, where one of another threshold routes otherwise."""
    z = jnp.linspace(-3, 3, 61)
    np.testing.assert_array_equal(routing.decide(z, 0.5, 0.2), z >= routing.least(0.5, 0.2))

    class Reached(Exception):
        pass

    def choices(model, text, found, known, passes):
        raise Reached(known)

    monkeypatch.setattr(rows.reach, "distances", lambda text, model: ([0], None))
    monkeypatch.setattr(rows, "_found", lambda *_: None)
    monkeypatch.setattr(rows, "Choices", choices)
    mine = model._replace(l2a_config=dataclasses.replace(LAYER, temperature=0.5, threshold=0.2))
    kept = Unfinished(tmp_path)
    kept.parts = {"all": [[0.0]], "none": [[1.0]], "rates": [0.1, 0.2, 0.3]}
    with pytest.raises(Reached) as reached:
        rows.rows_of(RivalOptions(source=TINY, text="a", calibration="b"), mine, prepared._replace(text=windows), {},
                     kept)
    [(cut, rates)] = reached.value.args[0].items()
    assert cut == pytest.approx(0.5 * np.log(0.25)) and rates.tolist() == [0.1, 0.2, 0.3]
