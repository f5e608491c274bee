"""`eval.json` as a file: what is broken is named, two evaluations keep each other's results, places are tried first."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.config import MODELS, L2AConfig, to_dict
from l2a_jax.errors import UserError
from l2a_jax.evaluation import evaluate, intervals, perplexity, results, table
from l2a_jax.evaluation.needle import draw_heat_map
from l2a_jax.files import claim
from l2a_jax.runs import demo
from l2a_jax.sources import TINY, load_pretrained
from tests.evaluation.test_table import made_up

ROOT = Path(__file__).parents[2]
HEAD = {"source": "a", "source_hash": "b", "regime": "baseline", "model_config": {"layers": 1}, "l2a_config": None,
        "route": "learned"}


def command(name):
    spec = importlib.util.spec_from_file_location(f"eval_{name}_results", ROOT / "eval" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def changed(key, value):
    """The made-up results with one field replaced (`...`: taken out), by its dotted name."""
    found = copy.deepcopy(made_up())
    *parents, last = key.split(".")
    inside = found
    for parent in parents:
        inside = inside[parent]
    if value is ...:
        del inside[last]
    else:
        inside[last] = value
    return found


BROKEN = {
    "a list": ([1], "holds a list; expected an object"), "a text": ("eval", "holds a text; expected an object"),
    "null": (None, "holds null"),
    **{f"{key} is {value!r}": (changed(key, value), said) for key, value, said in (
        ("source", ..., "source is missing; expected a text"), ("source_hash", None, "source_hash is null"),
        ("regime", 3, "regime is 3; expected a text"), ("size", [], "size is a list; expected a text"),
        ("route", {}, "route is an object; expected a text"),
        ("run", "x", "run is 'x'; expected an object"),
        ("run.tokens_seen", "many", "run.tokens_seen is 'many'; expected a number"),
        ("tasks", ..., "tasks is missing; expected an object"), ("tasks", [], "tasks is a list"),
        ("tasks.perplexity", None, "tasks.perplexity is null; expected an object"),
        ("tasks.needle", [], "tasks.needle is a list; expected an object"),
        ("tasks.perplexity.perplexity", ..., "task perplexity: perplexity is missing; expected a number"),
        ("tasks.perplexity.perplexity_95", [1.0], "perplexity_95 is a list of 1; expected a list of 2"),
        ("tasks.perplexity.tokens", None, "task perplexity: tokens is null"),
        ("tasks.perplexity.text", "t", "text is 't'; expected an object"),
        ("tasks.perplexity.text.hash", ..., "text.hash is missing"),
        ("tasks.perplexity.window_nll", [], "window_nll is a list; expected a list of one or more entries"),
        ("tasks.perplexity.window_tokens", [100], "window_tokens has 1 entries; expected 20, as window_nll"),
        ("tasks.audit.rows", [], "task audit: rows is a list; expected an object"),
        ("tasks.audit.rows.learned", {}, "rows.learned.perplexity is missing"),
        ("tasks.hellaswag.correct", [1, 0], "task hellaswag: correct has 2 entries; expected 4, which is n"),
        ("tasks.hellaswag.correct", [1, 0, 2, 1], "task hellaswag: correct is a list; expected .* one of 0, 1"),
        ("tasks.hellaswag.n", 0, "n is 0; expected a whole number, at least 1"),
        ("tasks.hellaswag.acc", 75.0, "acc is 75.0; expected a number from 0 to 1"),
        ("tasks.needle.lengths", [], "task needle: lengths is a list; expected a list of one or more"),
        ("tasks.needle.overall.n", 0, "overall.n is 0"), ("tasks.collapse.verdict", None, "verdict is null"),
        ("tasks.looks.kinds.digit.routed", 3, "task looks: kinds.digit.routed is 3; expected a number from 0 to 1"),
        ("tasks.looks.distances", [], "task looks: distances is a list; expected a list of one or more"),
        ("tasks.unknown", {"x": 1}, "task unknown: n is missing"))},
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_the_table_and_before_an_evaluation(case, tmp_path, monkeypatch, capsys):
    content, said = BROKEN[case]
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as error:
        table.load(tmp_path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    monkeypatch.setattr(evaluate, "load_pretrained", lambda *given: pytest.fail("the weights were read"))
    with pytest.raises(UserError, match=said):
        evaluate.evaluate(evaluate.Options(TINY, ("perplexity",), out=tmp_path))
    assert json.loads(path.read_text()) == content


def test_the_unbroken_file_is_read_and_shown(tmp_path, capsys):
    (tmp_path / "eval.json").write_text(json.dumps(made_up()))
    assert command("table")([str(tmp_path)]) == 0
    found = results.read_results(tmp_path / "eval.json")
    assert "verdict: healthy" in evaluate.summary(found)
    found["run"] |= {"tokens_seen": math.nan, "trained_parameters": None}
    assert "| - | nan | 558 |" in table.markdown(table.make_table([("run", found)]))


def test_two_evaluations_into_one_file_keep_each_others_tasks(tmp_path, monkeypatch):
    """The second ends while the first computes: read, merge and write are one, on what the file holds by then."""
    entry = made_up()["tasks"]

    def steps(setup, model, unpruned, held, keep):
        def first():
            monkeypatch.setattr(evaluate, "_steps", lambda *_: [("needle", lambda: {"needle": entry["needle"]})])
            evaluate.evaluate(evaluate.Options(TINY, ("needle",), out=tmp_path))
            return {"hellaswag": entry["hellaswag"]}

        return [("hellaswag", first)]

    monkeypatch.setattr(evaluate, "_steps", steps)
    found, path = evaluate.evaluate(evaluate.Options(TINY, ("perplexity",), out=tmp_path))
    assert set(found["tasks"]) == {"needle", "hellaswag"} == set(json.loads(path.read_text())["tasks"])
    assert os.listdir(tmp_path) == ["eval.json"]


def test_a_file_that_somebody_else_is_writing_is_waited_for_and_then_named(tmp_path, monkeypatch):
    path = tmp_path / "out" / "eval.json"
    results.merge_results(path, HEAD, {}, replace=False)
    monkeypatch.setattr(results, "WAIT", 0.1)
    with claim(path.with_name(".eval.json.lock")), pytest.raises(UserError, match=f"is being written by process "
                                                                                  f"{os.getpid()}"):
        results.merge_results(path, HEAD, {"hellaswag": made_up()["tasks"]["hellaswag"]}, replace=False)
    assert results.read_results(path)["tasks"] == {}


def test_results_of_before_a_setting_was_added_are_those_of_its_default(tmp_path):
    path = tmp_path / "eval.json"
    tasks = {"hellaswag": made_up()["tasks"]["hellaswag"]}
    now = {**HEAD, "model_config": to_dict(MODELS["tiny"]), "l2a_config": to_dict(L2AConfig())}
    before = {key: value for key, value in now["l2a_config"].items() if not key.startswith("explore")}
    results.merge_results(path, {**now, "l2a_config": before}, tasks, replace=False)
    assert set(results.merge_results(path, now, {}, replace=False)["tasks"]) == {"hellaswag"}
    with pytest.raises(UserError, match="its l2a_config differ"):
        results.merge_results(path, {**now, "l2a_config": to_dict(L2AConfig(explore=0.1, leakage=0))}, {},
                              replace=False)


def test_another_models_results_stay(tmp_path):
    path = tmp_path / "eval.json"
    results.merge_results(path, HEAD, {"hellaswag": made_up()["tasks"]["hellaswag"]}, replace=False)
    other = {**HEAD, "source_hash": "c"}
    with pytest.raises(UserError, match="its source_hash differ"):
        results.merge_results(path, other, {}, replace=False)
    assert results.merge_results(path, other, {}, replace=True)["tasks"] == {}


PLACES = {
    "below a file": ("file/out", ["perplexity"], "file is no folder"),
    "a name too long": ("n" * 300, ["perplexity"], "File name too long"),
    "the results are a folder": ("taken", ["perplexity"], "eval.json cannot be written: Is a directory"),
    "the heat map is a folder": ("taken-png", ["needle"], "needle.png cannot be written: Is a directory"),
    "the samples are a folder": ("taken-jsonl", ["piqa", "--log-samples", "--task-data", "."],
                                 "samples_piqa.jsonl cannot be written: Is a directory"),
    "the disk is full": ("full", ["perplexity"], "No space left on device"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_cannot_be_written_is_found_out_before_the_weights_are_read(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("kept")
    for folder in ("taken/eval.json", "taken-png/needle.png", "taken-jsonl/samples_piqa.jsonl"):
        Path(folder).mkdir(parents=True)
    Path("piqa_x.jsonl").write_text('{"goal": "the", "sol1": "old river", "sol2": "hill"}\n')
    Path("piqa_x-labels.lst").write_text("0\n")
    out, tasks, said = PLACES[case]
    if case == "the disk is full":
        class Full(io.BytesIO):
            def write(self, content):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr("l2a_jax.files.tempfile.TemporaryFile", lambda **_: Full())
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(evaluate, "load_pretrained", lambda *given: pytest.fail("the weights were read"))
    assert command("run")([TINY, "--tasks", *tasks, "--out", out]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --out ") and said in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["file/table.md", "n" * 300, "n" * 300 + ".md", "taken"])
def test_a_table_that_cannot_be_written_is_one_line(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("eval.json").write_text(json.dumps(made_up()))
    Path("file").write_text("kept")
    Path("taken/table.json").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert command("table")([".", "--out", out]) == 2
    assert capsys.readouterr().err.startswith("error: --out ") and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flags", [[], ["--training"], ["--inference"], ["--compile"]])
def test_speed_tries_its_place_before_it_measures(flags, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert command("speed")([*flags, "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.endswith(f"speed.json cannot be written: {tmp_path / 'file'} is no folder\n")


def test_numbers_that_are_not_finite_are_said_as_such():
    assert intervals.exp(1.0) == math.e and intervals.exp(1e4) == math.inf and math.isnan(intervals.exp(math.nan))
    assert intervals.exp(-math.inf) == 0 and intervals.exp(math.inf) == math.inf
    scores = perplexity.Scores(np.array([8.0]), np.array([4]), np.array([1]), None, None, None)
    found = perplexity.result(scores, perplexity.Windows(*[np.zeros((1, 4), np.int32)] * 2, np.ones((1, 4), bool),
                                                         np.ones((1, 4), bool), {}))
    assert found["perplexity"] == pytest.approx(math.exp(2)) and np.isnan(found["perplexity_95"]).all()
    far = copy.deepcopy(made_up())
    far["tasks"]["perplexity"]["window_nll"] = [1e6] * 20
    (row,) = table.make_table([("far", far)], ("base", made_up()))["rows"]
    assert row["perplexity"]["difference"]["ratio"] == math.inf
    entry = {"precision": None, "recall": None, "routed": 0.0}
    shown = demo.format_report({"rows": {}, "router_any_layer": entry, "router_per_layer": []})
    assert shown.splitlines()[-1].split() == ["any", "layer", "-", "-", "0.0%"]


NOTHING = {
    "a mean over tokens": (lambda: intervals.token_mean(np.zeros(0), np.zeros(0, np.int32)), "no scored token"),
    "windows without tokens": (lambda: intervals.token_mean(np.zeros(2), np.zeros(2, np.int32)), "no scored token"),
    "paired items": (lambda: intervals.paired_items([], []), "there is no item"),
    "a share": (lambda: intervals.share(0, 0), "there is no item"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_mean_over_nothing_is_no_number(case):
    made, said = NOTHING[case]
    with pytest.raises(UserError, match=said):
        made()


def test_windows_without_a_scored_place_have_no_perplexity():
    """Their mean would be 0 / 0, and a needle's answer of no token would count as found (0 of 0 right)."""
    empty = np.zeros((2, 8), bool)
    windows = perplexity.Windows(*[np.zeros((2, 8), np.int32)] * 2, empty, ~empty, {"name": "nothing"})
    with pytest.raises(UserError, match="no token of nothing is to be scored"):
        perplexity.score_windows(load_pretrained(TINY, jnp.float32), windows)


def _not_finite(value):
    """Every fractional number as a file says it that is none."""
    if isinstance(value, dict):
        return {name: _not_finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_not_finite(entry) for entry in value]
    return "nan" if isinstance(value, float) else value


def test_results_that_are_not_finite_are_shown_as_such(tmp_path, capsys):
    found = _not_finite(made_up())
    found["tasks"]["pruning"] = {"pruned_layers": [1], "cache_tokens": 8, "cache_bytes_before": 8,
                                 "cache_bytes_after": 4, "cache_saved": 4, "perplexity_before": "inf",
                                 "perplexity_after": "nan", "cost": "-inf", "cost_95": ["nan", "nan"]}
    (tmp_path / "eval.json").write_text(json.dumps(found))
    shown = evaluate.summary(results.read_results(tmp_path / "eval.json"))
    assert "perplexity nan [nan, nan]" in shown and "inf -> nan (-inf nats" in shown and "mean rank nan" in shown
    assert command("table")([str(tmp_path), "--markdown", "--baseline", str(tmp_path)]) == 0
    assert "| nan [nan, nan] (2k tokens)<br>" in capsys.readouterr().out
    draw_heat_map(results.read_results(tmp_path / "eval.json")["tasks"]["needle"], tmp_path / "needle.png")
    assert (tmp_path / "needle.png").stat().st_size > 1_000
