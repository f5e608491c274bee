"""Every number of "Long contexts" in `eval/results/README.md`, computed from the evaluations, in its order."""

import json
import pathlib
import re

import numpy as np
import pytest

from l2a_jax.evaluation.results import read_results
from l2a_jax.evaluation.table import make_table
from tests.research.replication.recomputed import check

LONG = pathlib.Path(__file__).parents[2] / "eval/results/long"
LENGTHS = (4_096, 8_192, 16_384, 32_768)


@pytest.fixture(scope="module")
def section():
    text = (LONG.parent / "README.md").read_text()
    return re.search(r"## Long contexts\n(.*?)\n## ", text, flags=re.S)[1]


@pytest.fixture(scope="module")
def runs():
    return {name: read_results(LONG / name / "eval.json") for name in ("plain", "far", "strict")}


def ruler_of(found, lengths=LENGTHS, items=25):
    """RULER's mean in percent at each length, each over as many prompts of all tasks."""
    cells = {row["length"]: row for row in found["tasks"]["ruler"]["overall"] if row["control"] in ("plain", "learned")}
    assert [cells[length]["n"] for length in lengths] == [11 * items] * len(lengths)
    return [100 * cells[length]["score"] for length in lengths]


def reach_of(found):
    """What the learned decisions have: percent local, and the share kept."""
    learned = found["tasks"]["reach"]["rows"]["learned"]
    return [100 * (1 - learned["density"]), learned["kept"]]


def test_the_page_says_what_was_measured(section, runs):
    tasks = {name: run["tasks"] for name, run in runs.items()}
    reach = {name: tasks[name]["reach"]["rows"]["learned"] for name in ("far", "strict")}
    table, *points = re.split(r"^- ", section.partition("**What training changes**")[0], flags=re.M)
    larger = read_results(LONG / "plain-1.5b/eval.json")

    def told(found):
        return [*ruler_of(found), 100 * found["tasks"]["gsm8k"]["scores"]["exact_match,strict-match"]["value"]]

    expected = [1_024, 4, 12, 32_768, 11, 25, 32_768, *LENGTHS, 1, *told(runs["plain"])]
    for name, penalty in (("far", 0.5), ("strict", 0.3)):
        expected += [penalty, *reach_of(runs[name]), *told(runs[name])]
    check(table.replace("GSM8K", ""), *expected, 1, *told(larger))

    rows = {row["run"]: row for row in make_table(list(runs.items()), ("plain", runs["plain"]))["rows"]}
    lost = {name: [100 * one for one in _difference(tasks[name]["ruler"], tasks["plain"]["ruler"])]
            for name in ("far", "strict")}
    check(points[0], reach["strict"]["kept"], *reach["strict"]["kept_95"], *lost["strict"], 32_768, *lost["far"])
    gsm8k = rows["far"]["gsm8k"]["difference"]
    check(points[1].replace("GSM8K", ""), 100 * gsm8k["value"], *(100 * one for one in gsm8k["interval"]))
    controls = {row["control"]: row for row in
                read_results(LONG / "far-controls/eval.json")["tasks"]["ruler"]["overall"]}
    assert {row["length"] for row in controls.values()} == {8_192} and {row["n"] for row in controls.values()} == {110}
    check(points[2], 8_192, 10, *(100 * controls[name]["score"] for name in (
        "learned", "all", "static", "random", "shuffled", "none")))

    found = (json.loads((LONG.parent / path / "rivals.json").read_text()) for path in ("router/final-0", "long/strict"))
    rivals, second = ({(round(100 * (1 - row["target"])), row["name"]): row for row in one["rows"] if not row["own"]}
                      for one in found)
    base = np.mean([cell["scores"][:5] for cell in tasks["plain"]["ruler"]["cells"] if cell["length"] == 8_192])
    expected = [8_192, 100 * base]
    for local in (80, 90, 95, 98):
        expected.append(local)
        for name in ("learned", "heads", "searched", "ranked", "random"):
            row = rivals[local, name]
            assert abs(100 * (1 - row["density"]) - local) < 1.5
            expected += [row["kept"], 100 * row["ruler_mean"]]
    behind, ahead = ([100 * one for one in (row["ruler_behind"], *row["ruler_behind_95"])]
                     for row in (rivals[90, "heads"], second[90, "heads"]))
    check(points[3], *expected, 90, *behind, *(-one for one in (ahead[0], ahead[2], ahead[1])), 5, 4, 8_192)


def _difference(mine, base):
    """(points lost, the interval's bounds) at the longest length, over the same prompts."""
    from l2a_jax.evaluation import intervals

    def scores(entry):
        cells = {cell["task"]: cell for cell in entry["cells"] if cell["length"] == LENGTHS[-1]}
        return [score for task in sorted(cells) for score in cells[task]["scores"]]

    difference, (low, high) = intervals.paired_items(scores(mine), scores(base))
    return -difference, -high, -low
