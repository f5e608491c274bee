"""The report: from files of rows to tables, differences and figures. Numbers here are made up, for their form alone."""

import gzip
import json
import pathlib
import re
import runpy
import zlib

import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation import intervals
from l2a_jax.files import from_plain, write_json
from l2a_jax.research.replication import damage, facts, plots, report, runner
from l2a_jax.research.replication.rows import choose

ROOT = pathlib.Path(__file__).parents[3]
rebuild = runpy.run_path(str(ROOT / "eval" / "table.py"))["main"]
WINDOWS = np.full(20, 100)
NLL = np.random.default_rng(0).normal(250, 20, 20)


def fabricate(row, nats=0.0, sparsity=0.9, needle=10, bits="1100110011", seed=0, **training):
    """A file as the runner writes it: `nats` a token above the baseline (with noise), `needle` of 10 found."""
    rng = np.random.default_rng(seed)
    nll = NLL + nats * 100 + (rng.normal(0, 0.5, 20) if row.regime != "baseline" else 0)
    text = {"name": "text", "hash": "h", "context": 100, "stride": 100}
    results = {
        "perplexity": {"perplexity": float(np.exp(nll.sum() / 2000)), "perplexity_95": [10.0, 20.0], "nll": 2.5,
                       "tokens": 2000, "text": text, "window_nll": nll, "window_tokens": WINDOWS,
                       **({} if row.regime == "baseline" else {"sparsity": sparsity,
                                                               "sparsity_per_layer": [sparsity] * 24})},
        "audit": {"gap": 0.1, "gap_95": [0.05, 0.15], "seeds": 1, "rows": {
            name: {"worse": worse, "worse_95": [worse - 0.1, worse + 0.1], "perplexity": 12.0}
            for name, worse in (("learned", 0.0), ("all", -0.05), ("random", 0.1), ("static", 0.2), ("none", 0.3))}},
        "needle": {"exact_match": needle / 10, "exact_match_95": [0.1, 0.9], "n": 10, "correct": needle,
                   "lengths": {"2048": {"exact_match": needle / 10, "exact_match_95": [0.1, 0.9], "n": 10,
                                        "correct": needle, "by_depth": [needle / 10] * 2, "log_probability": -1.0,
                                        "sparsity": 0.95, "controls": {
                                            name: {"exact_match": value} for name, value in (
                                                ("random", 0.2), ("static", 0.1), ("none", 0.0))}}}},
        "contexts": {"8192": {"perplexity": 10.0, "tokens": 2000, "text": {**text, "context": 200}, "window_nll": nll,
                              "window_tokens": WINDOWS, "sparsity": 2 * sparsity - 1}},
        "collapse": {"verdict": "healthy"},
        "residual": {"relative_l2": [0.0, 0.1, 0.2]},
        **{task: {"acc": bits.count("1") / 10, "acc_95": [0.2, 0.8], "acc_norm": 0.5, "n": 10,
                  "source": f"{task}.jsonl", "acc_bits": bits, "acc_norm_bits": bits}
           for task in ("hellaswag", "piqa", "arc_challenge")},
    }
    head = runner._head(row, runner.environment())
    return {**head, "status": "done", "seconds": {"train": 10.0},
            "training": {"trained_parameters": 43_008, "tokens_seen": 4_000_000, "tokens_per_trained_parameter": 93.0,
                         "tokens_per_second_median": 1e5, "loss_last_5_percent": 2.0, "held_out_loss": 2.1,
                         "non_finite": None, "memory": {"compiled_gb": 9.0}, **training},
            "evaluations": {task: {"hash": row.task_hash(task), "seconds": 1.0, "result": results[task]}
                            for task in row.measures.tasks if task in results}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for row in choose(("baseline-0.5b", "router_only-diverse-0.5b", "repair-w256-p0.3-s0", "repair-w256-p1-s0",
                       "repair-t8192-w1024-p0.2-f0.3-e1")):
        write_json(folder / f"{row.name}.json", fabricate(
            row, {"baseline-0.5b": 0.0, "router_only-diverse-0.5b": 0.2}.get(row.name, -0.05)))
    for name, needle in (("repair-w256-p0.3-f0.3-s0", 8), ("repair-w256-p0.5-f0.3-s0", 5), ("repair-w256-p0.5-s0", 3)):
        write_json(folder / f"{name}.json", fabricate(*choose((name,)), needle=needle, sparsity=0.8))
    nearly = choose(("repair-t8192-w1024-p0.3",))[0]  # one prompt of ten is missed
    write_json(folder / f"{nearly.name}.json", fabricate(nearly, -0.05, needle=9, sparsity=0.98,
                                                         source_hash="2a9129527b8b5f59"))
    sparse = choose(("repair-t8192-w1024-p0.5-f0.3-e1",))[0]
    write_json(folder / f"{sparse.name}.json", {**fabricate(sparse, -0.02, sparsity=0.98), "status": "partial"})
    broken = choose(("l2a_ft-0.44M-s0",))[0]
    write_json(folder / f"{broken.name}.json", fabricate(broken, non_finite={"step": 7, "loss": float("nan"),
                                                                             "where": "layer 3"}))
    for index, row in enumerate(choose(groups=("damage",))):
        cell = dict(row.factors)
        nats = 0.3 * (cell["topology"] == "sequential") + 0.5 * (cell["rope"] == "linear:5")
        write_json(folder / f"{row.name}.json", fabricate(row, nats, needle=3, seed=index))
    return folder


def test_the_report_holds_what_was_run_and_says_what_was_not(folder, tmp_path, capsys):
    paths = report.write(folder, tmp_path)
    names = {path.name for path in paths}
    assert {"replication.md", "replication.json", "replication_frontier.png", "replication_combinations.png",
            "replication_collapse.png", "replication_residual.png", "replication_layers.png"} == names
    assert all(path.stat().st_size > 500 for path in paths)
    text, made = paths[0].read_text(), json.loads(paths[1].read_text())
    assert "*22.38*" in text and "*reported, diverse*" in text  # the study's row under ours
    assert "not run: no 3B weights were at hand" in text and "| l2a_ft-44M-s0 | not run |" in text
    assert "+0.050 [-0.050, +0.150]" in text, "what routing costs beside the same weights, all routed"
    assert "not finite at step 7" in text and "| sequential | parallel |" in text
    assert "python train/run.py --regime router_only" in json.dumps(made["commands"])
    assert str(folder) not in text + json.dumps(made)
    rows = {row["name"]: row for row in made["rows"]}
    assert rows["repair-w256-p0.3-s0"]["needle"]["at_least_baseline"] and not rows["repair-w256-p0.3-s0"]["contexts"]
    assert rows["repair-t8192-w1024-p0.2-f0.3-e1"]["contexts"]["8192"]["sparsity"] == pytest.approx(0.8)
    assert " (repair-t8192-w1024-p0.5-f0.3-e1 in part)" in text and ", 96.0% |\n" in text
    assert "8,192, 30% inverted, echoes 100%" in text
    assert rows["router_only-diverse-0.5b"]["perplexity_ratio"]["ratio"] > 1
    assert rebuild([str(paths[1])]) == 0  # the main table, from the JSON alone
    again = capsys.readouterr().out.removeprefix("## 0.5b\n\n")
    assert again in text and "Δ x1.2" in again
    (tmp_path / "replication.json").write_text("{}")
    assert rebuild([str(paths[1])]) == 2 and "is not a study's replication.json" in capsys.readouterr().err
    for part in ("100 / 10 / 20 / 0 % (95.0%)", "Weights, by hash: 0.5b 2a9129527b8b."):
        assert part in text, part
    assert made["together"]["crossed"][2][1][2]["needle"] == 0.3 and "### One factor changed" in text
    term = made["damage"]["nats a token above the baseline"]["main_effects"]["terms"]["rope"]["levels"]["linear:5"]
    assert term["interval"][0] < 0.5 < term["interval"][1] and term["difference"] == pytest.approx(0.5, abs=0.02)


def test_differences_are_paired():
    base, row = choose(("baseline-0.5b", "router_only-diverse-0.5b"))
    one, two = (from_plain(json.loads(json.dumps(value, default=lambda x: x.tolist())))
                for value in (fabricate(base), fabricate(row, 0.2, bits="1010110011")))
    found = facts.facts(two, row, one)
    nats, interval = intervals.paired_windows(np.array(two["evaluations"]["perplexity"]["result"]["window_nll"]), NLL,
                                              WINDOWS)
    assert found["perplexity_ratio"]["nats"] == pytest.approx(nats)
    assert found["perplexity_ratio"]["ratio_95"] == pytest.approx(np.exp(interval).tolist())
    difference = found["benchmarks"]["piqa"]["difference"]
    assert difference["points"] == 0 and difference["differ"] == 2 and difference["points_95"][0] < -5
    other = json.loads(json.dumps(two))
    other["evaluations"]["perplexity"]["result"]["text"]["hash"] = "another text"
    other["evaluations"]["piqa"]["result"] = {"not_finite": "the log-probability of request 3 is nan"}
    found = facts.facts(other, row, one)
    assert found["perplexity_ratio"] is None and found["benchmarks"]["piqa"] is None


@pytest.mark.parametrize("task", ("perplexity", "audit", "needle", "hellaswag", "collapse", "task_controls"))
@pytest.mark.parametrize("result", (None, {"not_finite": "the loss of window 3 is nan"}))
def test_the_report_stands_whatever_is_missing(folder, tmp_path, task, result):
    """Rows that are still running, were stopped between two tasks, or have numbers that are not finite."""
    for path in folder.glob("*.json"):
        found = json.loads(path.read_text())
        if found["evaluations"].pop(task, None) is not None and result is not None:
            found["evaluations"][task] = {"hash": "", "seconds": 1.0, "result": result}
        write_json(tmp_path / path.name, found)
    text = report.markdown(report.collect(tmp_path), {})
    assert "### nats a token above the baseline" in text or task == "perplexity"


def test_rows_that_failed_before_anything_was_measured_are_rows(folder, tmp_path):
    for path in folder.glob("*.json"):
        found = json.loads(path.read_text())
        runner_wrote = {**found, "training": {}, "evaluations": {}, "status": "failed", "error": "no memory"}
        write_json(tmp_path / path.name, {name: value for name, value in runner_wrote.items() if name != "seconds"})
    assert "failed: no memory" in json.dumps(report.collect(tmp_path)["rows"])
    assert "## 6. Speed" in report.markdown(report.collect(tmp_path), {})


def test_no_figure_without_a_run(tmp_path):
    row = choose(("baseline-0.5b",))[0]
    write_json(tmp_path / f"{row.name}.json", fabricate(row))
    assert {path.name for path in report.write(tmp_path, tmp_path / "out")} == {"replication.md", "replication.json"}
    with pytest.raises(UserError, match="no file of a declared row"):
        report.write(tmp_path / "out", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_a_file_of_other_settings_does_not_count(tmp_path):
    row = choose(("router_only-diverse-0.5b",))[0]
    write_json(tmp_path / f"{row.name}.json", {**fabricate(row), "training_hash": "of something else"})
    assert facts.load(tmp_path, [row]) == {}


def unpacked(packed):
    """What a gzip file holds; None where it cannot be read."""
    try:
        return gzip.decompress(packed)
    except (OSError, EOFError, zlib.error):
        return None


def test_a_packed_file_counts_and_a_damaged_one_does_not_pass(tmp_path):
    row = choose(("baseline-0.5b",))[0]
    packed = tmp_path / f"{row.name}.json.gz"
    write_json(tmp_path / "plain.json", fabricate(row))
    packed.write_bytes(gzip.compress((tmp_path / "plain.json").read_bytes()))
    assert set(facts.load(tmp_path, [row])) == {row.name}
    whole = packed.read_bytes()
    middle = len(whole) // 2
    flipped = [whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1:] for place in range(middle, middle + 40)]
    # Text that repeats itself can be read from another place, with nothing damaged: such a byte says the same.
    flipped = [one for one in flipped if unpacked(one) != unpacked(whole)]
    assert len(flipped) > 30
    for damaged in (whole[:-20], *flipped):
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match=r"baseline-0.5b\.json\.gz cannot be decompressed"):
            facts.load(tmp_path, [row])


def _changed(row, key, value):
    found = json.loads(json.dumps(fabricate(row), default=lambda x: x.tolist()))
    inside = found
    *parents, last = key.split("/")
    for parent in parents:
        inside = inside[parent]
    inside.update({last: value}) if value is not ... else inside.pop(last)
    return found


@pytest.mark.parametrize(("key", "value", "said"), [
    (None, [1], "holds a list; expected an object"), (None, "{", "is not readable JSON"),
    ("format", 2, "format is 2; expected one of 1"), ("training_hash", ..., "training_hash is missing"),
    ("training_hash", 5, "training_hash is 5; expected a text"), ("training", ..., "training is missing"),
    ("training", [], "training is a list; expected an object"), ("status", "new", "status is 'new'; expected one of"),
    ("training/tokens_seen", "many", "training.tokens_seen is 'many'"), ("environment", None, "environment is null"),
    ("evaluations", [], "evaluations is a list"), ("evaluations/piqa", None, "evaluations.piqa is null"),
    ("evaluations/piqa/hash", ..., "evaluations.piqa.hash is missing"),
    ("evaluations/piqa/result", "x", "evaluations.piqa.result is 'x'"),
    ("evaluations/piqa/result/acc_bits", 5, "result of piqa: acc_bits is 5; expected a text of 0 and 1"),
    ("evaluations/piqa/result/acc_bits", "101", "result of piqa: acc_bits has 3 entries; expected 10, which is n"),
    ("evaluations/piqa/result/acc_bits", "1012101010", "acc_bits is '1012101010'; expected a text of 0 and 1"),
    ("evaluations/perplexity/result/window_tokens", [100], "window_tokens of perplexity has 1 entries; expected 20"),
    ("evaluations/needle/result/lengths/2048/by_depth", [], "by_depth is a list; expected a list of one or more"),
    ("evaluations/perplexity/result/window_nll", [], "result of perplexity: window_nll is a list; expected"),
    ("evaluations/needle/result/lengths/2048/by_depth", None, "lengths.2048.by_depth is null; expected a list")])
def test_a_row_that_is_no_row_is_named_by_file_and_key(key, value, said, tmp_path):
    row = choose(("baseline-0.5b",))[0]
    content = value if key is None else _changed(row, key, value)
    (tmp_path / f"{row.name}.json").write_text(content if value == "{" else json.dumps(content))
    for read in (lambda: facts.load(tmp_path, [row]), lambda: runner.is_done(row, tmp_path)):
        with pytest.raises(UserError, match=rf"baseline-0\.5b\.json.*{said}.*Move the file away, and the row is run"):
            read()


@pytest.mark.parametrize(("content", "said"), [
    ([], "holds a list"), ({}, "main is missing"), ({"main": {}}, "main is an object; expected a list"),
    ({"main": [{"table": None}]}, r"main\[0\].size is missing"),
    ({"main": [{"size": "0.5b", "table": {"reported_by": "x", "rows": 5}}]}, r"main\[0\].table.rows is 5"),
    ({"main": [{"size": "0.5b", "table": {"reported_by": "x", "rows": [{"run": "a"}]}}]}, "regime is missing")])
def test_numbers_of_no_study_are_refused(content, said, tmp_path, capsys):
    (tmp_path / "replication.json").write_text(json.dumps(content))
    assert rebuild([str(tmp_path / "replication.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(said, error) and error.count("\n") == 1


def test_the_studys_own_numbers_are_read():
    assert "| baseline-0.5b | baseline |" in report.main_tables(ROOT / "eval" / "results" / "replication.json")


def test_effects_wait_for_every_cell(folder):
    rows = choose(groups=("damage",))
    found = facts.load(folder, [*rows, *choose(("baseline-0.5b",))])
    assert report._damage(rows, found)
    del found[rows[3].name]
    assert report._damage(rows, found) == {} == report._residual(rows, found)
    assert damage.RUNS == 16


def test_controls_are_joined_to_their_rows_and_every_axis_has_a_name(folder):
    made = report.collect(folder)
    for name, figure in report._figures(made).items():
        for axis in figure.axes:
            assert not axis.axison or axis.get_xlabel() or axis.get_ylabel(), f"{name}: an axis without a name"
        assert figure.get_figwidth() == plots.WIDTH, "legible where it is shown 800 pixels wide"
    rows = [row for row in made["rows"] if row["group"] == "frontier" and row.get("sparsity") is not None]
    figure = plots.frontier(rows)
    joined = [line for line in figure.axes[0].lines if line.get_alpha() == 0.5]
    assert len(joined) == sum(bool((row["audit"] or {}).get("ratio")) for row in rows) > 0
    for line, row in zip(joined, rows, strict=True):
        low, high = line.get_ydata()
        assert low <= row["perplexity_ratio"]["ratio"] <= high and high == max(
            row["audit"]["ratio"][control] for control in plots.CONTROLS)
