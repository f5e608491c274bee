"""The results table: every cell from made-up results with known answers, the study's row beside, bad files refused."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation import table
from l2a_jax.shapes import require

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("eval_table", ROOT / "eval" / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def made_up(regime="router_strict", nll=3.0, correct=(1, 0, 1, 1), window_hash="same", **extra):
    noise = np.random.default_rng(0).normal(0, 5, 20)
    nats = 100 * nll + noise
    look = {name: {"decisions": 9, "sampled": 2, "mass": [0.5, 0.2, 0.2, 0.1]} for name in ("routed", "local")}
    return {
        "source": "a", "source_hash": "b", "size": "qwen2.5-0.5b", "regime": regime, "route": "learned",
        "run": {"trained_parameters": 21_504, "tokens_seen": 12_000_000, "tokens_per_trained_parameter": 558.0},
        "tasks": {
            "perplexity": {"perplexity": math.exp(nats.sum() / 2_000), "perplexity_95": [19.0, 21.0], "tokens": 2_000,
                           "text": {"name": "t", "rule": "text", "context": 100, "stride": 100, "hash": window_hash},
                           "window_nll": nats.tolist(), "window_tokens": [100] * 20, "sparsity": 0.87},
            "audit": {"gap": 0.15, "gap_95": [0.1, 0.2], "seeds": 3, "rows": {"learned": {
                "perplexity": 20.0, "density": 0.1, "worse": 0.0, "worse_95": [0.0, 0.0]}}},
            "hellaswag": {"acc": sum(correct) / len(correct), "acc_norm": 0.5, "correct": list(correct),
                          "correct_norm": [1, 0, 1, 0], "n": len(correct), "num_fewshot": 0, "version": 1,
                          "source": "x", "limit": None},
            "needle": {"overall": {"exact_match": 0.75, "exact_match_stderr": 0.1, "ranked_first": 0.9,
                                   "mean_rank": 1.5, "n": 60},
                       "lengths": [512, 2_048], "depths": [0.5], "exact_match": [[0.5, 1.0]],
                       "ranked_first": [[0.8, 1.0]], "distractors": 7, "needles": 1, "per_cell": 30},
            "looks": {"window": 4, "sinks": 1, "text": {"name": "t", "hash": "h", "context": 64}, "tokens": 90,
                      "routed": 0.1, "routed_95": [0.05, 0.15], "distances": [4, 8], "sample": 2, "seed": 0,
                      "layers": [{"layer": 0, "pruned": False, "routed": 0.1, "looks": look}], "most": [], "least": [],
                      "kinds": {"digit": {"tokens": 9, "of_all": 0.1, "routed": 0.3, "routed_95": [0.2, 0.4],
                                          "layers": [0.3]}}, "looks": look},
            "collapse": {"verdict": "healthy", "rule": "no rule of the table holds", "findings": [],
                         "not_measured": [], "generation": None}, **extra},
    }


def save(folder, name, found):
    (folder / name).mkdir()
    (folder / name / "eval.json").write_text(json.dumps(found))
    return str(folder / name)


def test_the_table_of_two_runs(main, tmp_path, capsys):
    runs = [save(tmp_path, "base", made_up("baseline", 2.9, (1, 1, 1, 1))), save(tmp_path, "routed", made_up())]
    assert main([*runs, "--baseline", runs[0], "--markdown", "--out", str(tmp_path / "out" / "main.md")]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "out" / "main.md").read_text() == shown
    base, routed = json.loads((tmp_path / "out" / "main.json").read_text())["rows"]
    assert "<br>Δ x1.105 [1.105, 1.105]" in shown  # the noise of the windows is shared, so it cancels
    assert routed["perplexity"]["difference"]["nats"] == pytest.approx(0.1)
    assert base["perplexity"]["difference"]["nats"] == 0
    assert routed["hellaswag"]["difference"]["value"] == -0.25 and routed["hellaswag"]["value"] == 0.75
    assert routed["hellaswag"]["interval"][0] < 0.75 < routed["hellaswag"]["interval"][1]
    assert routed["hellaswag"]["difference_norm"]["value"] == 0
    assert routed["piqa"] is None and routed["needle"]["value"] == 0.75 and routed["needle"]["n"] == 60
    assert "| *reported, diverse* | *router* | *65K* |" in shown and "*22.38*" in shown and "*11.52*" in shown
    line = next(line for line in shown.splitlines() if line.startswith("| routed"))
    for cell in ("router_strict", "21.5k", "12M", "558", "(2k tokens)", "75.0 [30.1, 95.4] (n=4) / 50.0", "87.0%",
                 "+0.150 [+0.100, +0.200]", "healthy"):
        assert cell in line, cell
    widths = {line.count("|") for line in shown.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_what_cannot_be_paired_is_said():
    other = made_up(window_hash="another", correct=(1, 0))
    rows = table.make_table([("run", made_up())], ("base", other))["rows"]
    assert rows[0]["perplexity"]["difference"] is None and rows[0]["hellaswag"]["difference"] is None
    assert len(rows[0]["notes"]) == 2
    assert "no paired difference" in table.markdown(table.make_table([("run", made_up())], ("base", other)))


def test_a_terminal_gets_plain_columns():
    """What was not run has none; too narrow a terminal gets a column a run."""
    base = "base", made_up("pretrain", 2.9)
    made = table.make_table([base, ("routed", made_up("pretrain"))], base)
    wide, narrow = table.plain(made), table.plain(made, 100)
    head, first, _, delta = wide.splitlines()[:4]  # the baseline has no difference from itself
    assert "PIQA" not in head and "|" not in wide and "<br>" not in wide and first.startswith("base ")
    assert head.index("perplexity") == delta.index("Δ x1.105")
    assert len(head) > 100 >= max(map(len, narrow.split("\n\n")[0].splitlines()))
    assert narrow.splitlines()[0].split()[:2] == ["run", "base"]


def test_tasks_that_were_not_run_are_dashes():
    empty = made_up() | {"tasks": {}, "run": None, "regime": "untrained layer", "route": "none"}
    shown = table.markdown(table.make_table([("run", empty)]))
    assert "| run | untrained layer, none routed | - | - | - | - |" in shown
    assert "reported" not in shown.split("\n\n")[0]


def test_tasks_of_lm_evals_and_reach_have_a_column_where_a_run_has_them():
    """Texts are compared item by item; a value that is no share of items stands as it is."""
    def scored(items, loss=1.5):
        return {"gsm8k": {"n": 4, "num_fewshot": 5, "source": "x", "version": 3, "limit": None, "scores": {
            "exact_match,strict-match": {"value": sum(items) / 4, "stderr": 0.2, "items": list(items)},
            "exact_match,flexible-extract": {"value": 0.75, "stderr": 0.2, "items": [1.0, 1.0, 1.0, 0.0]}}},
            "some_text": {"n": 4, "num_fewshot": 0, "scores": {"bits,none": {"value": loss, "stderr": 0.1}}},
            "reach": {"rows": {"learned": {"kept": 0.78, "kept_95": [0.7, 0.86]}}, "worth": 0.1, "window": 1_024,
                      "text": {"context": 32_768}}}

    made = table.make_table([("run", made_up(**scored((1.0, 0.0, 0.0, 0.0))))], ("base", made_up(**scored((1.0,) * 4))))
    shown = table.markdown(made)
    assert "| GSM8K strict / flexible | needle | some_text | local | audit gap | kept beyond | verdict |" in shown
    assert "25.0 [4.6, 69.9] (n=4) / 75.0<br>Δ -75.0 [-124.0, -26.0]" in shown
    assert "1.5 [1.3, 1.7] (n=4)" in shown and "0.780 [0.700, 0.860] (to 32,768)" in shown
    assert "*kept beyond*: the share of what global attention is worth" in shown
    again = json.loads(json.dumps(made))
    require(again, table.TABLE, "the table")
    assert table.markdown(again) == shown
    assert "GSM8K" not in table.markdown(table.make_table([("run", made_up())]))


def test_one_window_has_no_interval(main, tmp_path, capsys):
    """JSON has no NaN, so the file holds a word; the table says that there is no interval."""
    found = made_up()
    found["tasks"]["perplexity"] |= {"perplexity_95": ["nan", "nan"], "window_nll": [300.0], "window_tokens": [100]}
    found["tasks"]["audit"]["gap_95"] = ["nan", "nan"]
    folder = save(tmp_path, "one", found)
    assert main([folder, "--baseline", folder]) == 0
    assert "[nan, nan] (2k tokens)" in capsys.readouterr().out


def test_the_studys_rows():
    assert table.match("qwen2.5-0.5b", "l2a_paper").perplexity == 60.83
    assert table.match("qwen2.5-1.5b", "router_only").hellaswag == 0.382
    assert table.match("qwen2.5-3b", "baseline") is None and table.match("qwen2.5-0.5b", "pretrain") is None
    assert table.match(None, "baseline") is None


@pytest.mark.parametrize(("content", "message"), [(None, "has no eval.json"), ("{", "not readable JSON"),
                                                  ('{"a": 1}', "source is missing")])
def test_files_that_are_no_results(main, tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "eval.json").write_text(content)
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said
    with pytest.raises(UserError):
        table.load(tmp_path)
