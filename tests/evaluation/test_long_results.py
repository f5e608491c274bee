"""Every number of "Long contexts" in `eval/results/README.md`, computed from the evaluations, in its order."""

import json
import pathlib
import re

import pytest

from l2a_jax.evaluation.results import read_results
from l2a_jax.evaluation.table import make_table
from tests.research.replication.test_findings import check

LONG = pathlib.Path(__file__).parents[2] / "eval/results/long"
LENGTHS = (4_096, 8_192, 16_384, 32_768)


@pytest.fixture(scope="module")
def section():
    text = (LONG.parent / "README.md").read_text()
    return re.search(r"## Long contexts\n(.*?)\n## ", text, flags=re.S)[1]


@pytest.fixture(scope="module")
def runs():
    return {name: read_results(LONG / name / "eval.json") for name in ("plain", "far", "strict")}


def test_the_page_says_what_was_measured(section, runs):
    tasks = {name: run["tasks"] for name, run in runs.items()}
    reach = {name: tasks[name]["reach"]["rows"]["learned"] for name in ("far", "strict")}
    table, *points = re.split(r"^- ", section, flags=re.M)
    expected = [1_024, 4, 12, 32_768, 11, 25]
    told = {}
    for name, found in tasks.items():
        ruler = {row["length"]: row for row in found["ruler"]["overall"] if row["control"] in ("plain", "learned")}
        told[name] = [100 * ruler[length]["score"] for length in LENGTHS]
        assert [ruler[length]["n"] for length in LENGTHS] == [11 * 25] * 4
        told[name].append(100 * found["gsm8k"]["scores"]["exact_match,strict-match"]["value"])
    expected += [32_768, *LENGTHS]
    expected += [1, *told["plain"]]
    for name, penalty in (("far", 0.5), ("strict", 0.3)):
        expected += [penalty, 100 * (1 - reach[name]["density"]), reach[name]["kept"], *told[name]]
    check(table.replace("GSM8K", ""), *expected)

    rows = {row["run"]: row for row in make_table(list(runs.items()), ("plain", runs["plain"]))["rows"]}
    lost = {name: [100 * one for one in _difference(tasks[name]["ruler"], tasks["plain"]["ruler"])]
            for name in ("far", "strict")}
    check(points[0], reach["strict"]["kept"], *reach["strict"]["kept_95"], *lost["strict"], 32_768, *lost["far"])
    gsm8k = rows["far"]["gsm8k"]["difference"]
    check(points[1].replace("GSM8K", ""), 100 * gsm8k["value"], *(100 * one for one in gsm8k["interval"]))
    rivals = {row["name"]: row for row in json.loads((LONG / "far/rivals.json").read_text())["rows"]}
    layers = sorted(100 * rivals[name]["ruler_mean"] for name in ("ranked", "searched", "alternating"))
    low, high = rivals["heads"]["ruler_behind_95"]
    assert low < 0 < high
    check(points[2], 32_768, 8_192, 5, *(rivals[name]["kept"] for name in (
        "learned", "heads", "ranked", "searched", "random", "alternating")), 100 * rivals["heads"]["ruler_mean"],
        100 * rivals["learned"]["ruler_mean"], layers[0], layers[-1], 4, 8_192,
        -100 * rivals["heads"]["ruler_behind"], 0)


def _difference(mine, base):
    """(points lost, the interval's bounds) at the longest length, over the same prompts."""
    from l2a_jax.evaluation import intervals

    def scores(entry):
        cells = {cell["task"]: cell for cell in entry["cells"] if cell["length"] == LENGTHS[-1]}
        return [score for task in sorted(cells) for score in cells[task]["scores"]]

    difference, (low, high) = intervals.paired_items(scores(mine), scores(base))
    return -difference, -high, -low
