"""Arms that wait for a machine: each one's row, at the size of the tiny model, is trained and measured in seconds."""

import dataclasses

import numpy as np
import pytest

from l2a_jax.evaluation.perplexity import score_windows
from l2a_jax.files import write_json
from l2a_jax.research.replication import arms, autopsy, report, runner, trained
from l2a_jax.research.replication.builders import LAYERS
from l2a_jax.research.replication.measures import EvaluatedRow
from l2a_jax.research.replication.row import BENCHMARKS
from l2a_jax.research.replication.rows import choose, with_baselines
from l2a_jax.training.settings import Settings
from tests.research.replication.conftest import LAYER, QUICK
from tests.research.replication.recomputed import RESULTS
from tests.research.replication.test_report import fabricate

TINY = {name: value for name, value in LAYER.items() if name != "window"}


def tiny(name, under=None, **given):
    """The declared row at the sizes of the tests, asked what the packaged model can answer."""
    row = choose((name,))[0]
    own = {key: value for key, value in row.given if key not in ("tokens", *TINY)}
    if "window" in own:
        own["window"] = LAYER["window"]
    measures = dataclasses.replace(QUICK, tasks=tuple(task for task in row.measures.tasks if task not in (
        *BENCHMARKS, "contexts", "collapse")), controls=False, under=under)
    return dataclasses.replace(row, size="0.5b", given=tuple({**own, **TINY, **given}.items()),
                               data=("notes={data}/train",), measures=measures, baseline=None)


def test_arms_stand_in_the_table_and_not_yet_in_the_report(tmp_path):
    waiting = choose(groups=tuple(arms.GROUPS))
    assert {row.group for row in waiting} == set(arms.GROUPS)
    assert not {row.name for row in waiting} & {row["name"] for row in report.collect(tmp_path)["rows"]}


def test_a_dry_run_says_what_an_arm_costs(session):
    rows = [tiny("norms_only-s0"), tiny("layer-w256-p0.1-l1")]
    *lines, last = runner.dry_run(rows, session).splitlines()
    assert lines[0].startswith("norms_only-s0: 192 trained, 1,") and "a trained parameter" in lines[0]
    assert any("--regime router_only" in line and "--window 12" in line for line in lines)
    assert last.startswith("in all 2 rows, 3,") and last.endswith("about 2 min")


def test_norms_are_trained_without_a_router(session, tmp_path):
    row = tiny("norms_only-s0")
    assert runner.run_rows([row], session, tmp_path) == ([], [])
    found = runner.read_row(tmp_path / f"{row.name}.json")
    assert found["training"]["trained_parameters"] == 3 * 64 and "sparsity_last_step" not in found["training"]
    assert set(found["evaluations"]) == {"perplexity", "needle"} and found["status"] == "done"
    assert "sparsity" not in found["evaluations"]["perplexity"]["result"]
    params = trained.load_masters(session, row, tmp_path / f"{row.name}.npz")
    start = session.base("0.5b").params
    moved = {name: bool((np.asarray(params["layers"][name]["scale"]) != start["layers"][name]["scale"]).any())
             for name in ("norm_attention", "norm_mlp")}
    assert moved == {"norm_attention": True, "norm_mlp": False} and "router" not in params["layers"]


def test_twins_differ_from_the_rows_that_they_explain_in_routing_alone():
    """The same tokens, rate, text and seed; what is routed is not of a plain model."""
    for name, twin in (("norms_only-s0", "repair-w256-p0.3-s0"),
                       ("norms_only-t8192-e1-s1", "repair-t8192-w1024-p0.5-f0.3-e1-s1"),
                       ("norms_only-1.5b", "repair-w256-p0.3-1.5b")):
        one, other = (choose((each,))[0].settings() for each in (name, twin))
        differ = {field.name for field in dataclasses.fields(Settings)
                  if getattr(one, field.name) != getattr(other, field.name)}
        assert differ <= {"regime", "window", "penalty", "router_lr", "flip", "given", "rope"}, name


@pytest.mark.parametrize("rate", ["0.0001", "0.003"])
def test_the_border_is_one_of_rates_alone(rate):
    one, other = (choose((name,))[0].settings() for name in (f"l2a_ft-12M-lr{rate}", "l2a_ft-diverse-0.5b"))
    assert dataclasses.replace(one, lr=other.lr, given=()) == dataclasses.replace(other, given=())


def test_attention_trained_under_forced_decisions_is_evaluated_under_all_kinds(session, tmp_path):
    rates = (0.0, 0.5, 0.25)
    under = ("l2a_ft-learned-s2", rates)
    rows = [tiny("l2a_ft-learned-s2", under), tiny("l2a_ft-frozen-s2", under, forced=rates)]
    assert runner.run_rows(rows[1:], session, tmp_path) == ([], ["l2a_ft-frozen-s2"])
    assert "l2a_ft-learned-s2_decisions.npz is missing" in runner.read_row(tmp_path / "l2a_ft-frozen-s2.json")["error"]
    assert runner.run_rows(rows, session, tmp_path) == ([], [])
    learned, frozen = (runner.read_row(tmp_path / f"{row.name}.json") for row in rows)
    for found, own in ((learned, "learned"), (frozen, "frozen")):
        result = found["evaluations"]["under"]["result"]
        assert list(result["rows"]) == ["learned", "frozen", "static", "random", "all", "none"]
        assert abs(result["rows"][own]["worse"]) < 1e-5 and result["own"] == pytest.approx(result["rows"][own]["nll"])
        density = {name: row["density"] for name, row in result["rows"].items()}
        assert density["all"] == 1 and density["none"] == 0
        assert all(abs(density[name] - 0.25) < 0.05 for name in ("frozen", "static", "random"))
    both = [found["evaluations"]["under"]["result"]["rows"]["learned"]["density"] for found in (learned, frozen)]
    assert both[0] == both[1], "the decisions that the other row has left"
    assert frozen["evaluations"]["perplexity"]["result"]["sparsity"] == pytest.approx(
        1 - frozen["evaluations"]["under"]["result"]["rows"]["frozen"]["density"], abs=0.02)


def test_forced_rates_are_those_that_were_learned():
    found = [runner.read_row(RESULTS / "rows" / f"l2a_ft-repair-s{seed}.json")["evaluations"]["audit"]["result"]
             ["rates_per_layer"] for seed in (0, 1)]
    assert tuple(np.round(np.mean(found, axis=0), 4).tolist()) == arms.RATES
    assert len(arms.RATES) == LAYERS["0.5b"]
    rows = choose(groups=("forced",))
    assert {row.settings().forced and round(sum(row.settings().forced), 3) for row in rows} == {None, 1.796}
    assert all(len(row.commands()) == 1 + 2 * (row.settings().forced is None) for row in rows), "scored by the study"
    assert [row.name for row in with_baselines(choose(("l2a_ft-static-s4",)))] == [
        "baseline-0.5b", "l2a_ft-learned-s4", "l2a_ft-static-s4"]


def test_a_text_read_again_and_again_is_asked_for_the_reported_symptoms(session, tmp_path, monkeypatch):
    monkeypatch.setattr("l2a_jax.research.replication.benchmarks.score", lambda *given: {"acc": 0.9, "n": 100})
    monkeypatch.setattr(session, "benchmark", lambda row, name: None)
    row = tiny("l2a_ft-1M-12times-lr0.0003", unique=600)
    row = dataclasses.replace(row, measures=dataclasses.replace(row.measures, tasks=("symptoms",)))
    assert runner.run_rows([row], session, tmp_path) == ([], [])
    found = runner.read_row(tmp_path / f"{row.name}.json")
    used, result = found["training"]["data_used"], found["evaluations"]["symptoms"]["result"]
    assert used["unique_tokens"] < 800 < used["tokens"] and used["domains"]["notes"]["epochs"] >= 2
    assert set(result["symptoms"]) == {rule.verdict for rule in autopsy.SYMPTOMS} and None not in (
        result["symptoms"].values())
    assert result["logged_loss"] == pytest.approx(found["training"]["curve"][-1]["loss"], rel=0.3)
    assert result["symptoms"]["tasks above chance"] and not result["symptoms"]["zero training loss"]
    assert "generation" not in result


def test_a_text_read_again_and_again_is_declared_with_its_epochs():
    rows = [row.settings() for row in choose(groups=("border",)) if row.settings().unique]
    assert {(run.unique, run.tokens // run.unique, run.lr) for run in rows} == {
        (1_000_000, 12, 5e-5), (1_000_000, 12, 3e-4), (100_000, 100, 5e-5), (100_000, 100, 3e-4)}


def test_a_row_is_asked_beyond_its_windows_and_with_everything_routed(session, tmp_path, monkeypatch):
    asked = []

    def task(work):
        asked.append((work.options.lengths, work.options.ruler_items, work.prepared))
        assert work.path.with_name("samples") and not work.options.log_samples
        scored = {"length": 64, "control": "learned", "score": 0.5, "n": 4}
        return {"cells": [{**scored, "written": ["text"]}], "overall": [{**scored, "score_95": [0.1, 0.9]}],
                "made_of": {"haystack": {"name": "/a/path", "tokens": 5}, "words": "some"}}

    monkeypatch.setattr("l2a_jax.evaluation.ruler.prepare", lambda name, options, model: options.needle["haystack"])
    monkeypatch.setattr("l2a_jax.evaluation.ruler.task", task)
    row = tiny("router_only-diverse-0.5b-s2")
    measures = dataclasses.replace(row.measures, tasks=("reach", "ruler", "needle", "all_routed"), far_context=128,
                                   ruler_lengths=(64,), ruler_items=4)
    row = dataclasses.replace(row, measures=measures)
    assert runner.run_rows([row], session, tmp_path) == ([], [])
    found = {name: entry["result"] for name, entry in
             runner.read_row(tmp_path / f"{row.name}.json")["evaluations"].items()}
    assert asked == [((64,), 4, ("recall",))] and found["ruler"]["cells"] == [
        {"length": 64, "control": "learned", "score": 0.5, "n": 4}]
    assert found["ruler"]["made_of"]["haystack"] == {"name": "recall", "tokens": 5}, "not this machine's"
    rows = found["reach"]["rows"]
    assert {"all", "none", "learned"} <= set(rows) and found["reach"]["window"] == LAYER["window"]
    again = found["all_routed"]["contexts"]["128"]
    params = trained.load_masters(session, row, tmp_path / f"{row.name}.npz")
    evaluated = EvaluatedRow(session, row, params, [])
    everything = np.ones((3, *evaluated.windows.tokens.shape), bool)
    forced = score_windows(evaluated.model, evaluated.windows, everything, **session.passes)
    assert np.log(again["perplexity"]) == pytest.approx(forced.nll.sum() / forced.tokens.sum(), rel=1e-5)
    assert again["routing_costs"] == pytest.approx((evaluated.scores.nll - forced.nll).sum() / forced.tokens.sum(),
                                                   abs=1e-5)
    assert set(found["all_routed"]["needle"]) == {"64"} and not found["all_routed"]["benchmarks"]


def test_rows_of_the_main_table_are_asked_anew_beside_a_plain_model_that_is_asked_the_same():
    rows = choose(groups=("far",))
    assert {row.regime for row in rows} == {"baseline", "router_only", "router_strict", "l2a_ft", "full_ft"}
    for row in rows:
        assert {"reach", "ruler"} <= set(row.measures.tasks)
        assert row.baseline in (None, f"baseline-far-{row.size}")
    one, other = (choose((name,))[0] for name in ("l2a_ft-diverse-1.5b-s2", "l2a_ft-diverse-1.5b"))
    assert one.training_hash != other.training_hash == dataclasses.replace(
        one, given=tuple({**dict(one.given), "seed": 0}.items())).training_hash


def test_an_arm_that_was_run_has_its_table(tmp_path):
    found = {
        "reach": {"rows": {"learned": {"beyond": 3.0, "kept": 0.75, "kept_95": [0.7, 0.8]}}},
        "ruler": {"overall": [{"length": 4_096, "control": "learned", "score": 0.25, "score_95": [0.1, 0.4]}]},
        "all_routed": {"contexts": {"2048": {"perplexity": 30.0, "routing_costs": 0.02,
                                             "routing_costs_95": [0.01, 0.03]}}, "benchmarks": {}},
        "symptoms": {"symptoms": {"text loops": True, "needle lost": None}},
        "under": {"own": 2.0, "rows": {"learned": {"nll": 2.0, "worse": 0.0}, "none": {"nll": 2.5, "worse": 0.5}}}}
    for name in ("baseline-far-0.5b", "router_only-diverse-0.5b-s2"):
        row = choose((name,))[0]
        evaluations = {task: {"hash": "", "seconds": 1.0, "result": result} for task, result in found.items()}
        file = fabricate(row)
        write_json(tmp_path / f"{name}.json", {**file, "evaluations": {
            **file["evaluations"], **(evaluations if row.baseline else {})}})
    report.write(tmp_path, tmp_path)
    text = (tmp_path / "replication.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| router_only-diverse-0.5b-s2"))
    assert ("| 2,048: 30.00, +0.020 |" in line and "| 0.750 [0.700, 0.800] | 4,096: 25.0% |" in line
            and "| text loops | learned 2.0000<br>none 2.5000 |" in line)
    assert "0 of 135 declared rows were run, and 2 of later arms" in text
    assert "## Later arms" in text and "2 of 12 declared rows were run." in text


def test_the_guide_says_what_each_arm_trains():
    guide = (RESULTS.parents[1] / "train" / "README.md").read_text()
    for name in arms.GROUPS:
        rows = choose(groups=(name,))
        tokens = sum(row.settings().tokens for row in rows if row.regime != "baseline")
        assert f"| `{name}` | {len(rows)} | {tokens // 10**6}M |" in guide, (name, len(rows), tokens)
