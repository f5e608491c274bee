"""Every number of `eval/results/router/README.md`, computed from the evaluations, in its order."""

import functools
import operator
import pathlib

import pytest

from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.results import read_results
from tests.evaluation.test_long_results import reach_of, ruler_of
from tests.research.replication.test_findings import check

ROUTER = pathlib.Path(__file__).parents[2] / "eval/results/router"
SHORT, LONG = 8_192, 32_768
RECIPES = ("penalty", "target", "ask", "ask-distill", "ask-32k", "ask-hidden", "lengths", "lengths-mixed",
           "lengths-mixed-signals", "lengths-signals", "answers", "answers-mixed")
SEEDS = ("final-0", "final-1", "final-2")


def pooled(seeds, plain, length):
    """RULER in percent: of the plain model, as learned and under the rule, all over the same prompts, the seeds' mean
    of each; and the points by which the rule is behind the plain model, with the interval."""
    known = {cell["task"]: cell for cell in plain["tasks"]["ruler"]["cells"] if cell["length"] == length}
    scores = {"plain": [], "learned": [], "question": []}
    for task, cell in sorted(known.items()):
        for control in ("learned", "question"):
            found = [next(one for one in run["tasks"]["ruler"]["cells"]
                          if (one["task"], one["length"], one["control"]) == (task, length, control)) for run in seeds]
            assert len({one["prompts"] for one in found}) == 1 and {one["n"] for one in found} == {8}
            scores[control] += [sum(one) / len(seeds) for one in zip(*(one["scores"] for one in found), strict=True)]
        scores["plain"] += cell["scores"][:8]
    value, (low, high) = intervals.paired_items(scores["plain"], scores["question"])
    means = [100 * sum(one) / len(one) for one in scores.values()]
    return [*means, [100 * one for one in (value, low, high)]]


@pytest.fixture(scope="module")
def runs():
    return {name: read_results(ROUTER / name / "eval.json") for name in ("plain", *RECIPES)}


def ruler(found):
    return ruler_of(found, (SHORT, LONG), 8)


def difference(mine, base, length):
    """Points by which RULER is higher, with the interval, over the same prompts."""
    cells = [{cell["task"]: cell for cell in run["tasks"]["ruler"]["cells"]
              if cell["length"] == length and cell["control"] in ("plain", "learned")} for run in (mine, base)]
    assert all(cells[0][task]["prompts"] == cells[1][task]["prompts"] for task in cells[0])
    scores = [[one for task in sorted(found) for one in found[task]["scores"]] for found in cells]
    value, (low, high) = intervals.paired_items(*scores)
    return [100 * one for one in (value, low, high)]


def behind(mine, base, length):
    value, low, high = difference(mine, base, length)
    return [-value, -high, -low]


def test_the_page_says_what_was_measured(runs):
    text = (ROUTER / "README.md").read_text().partition("## Three seeds")[0]
    head, _, points = text.partition("- **Asking** mends")
    introduction, _, table = head.partition("| plain |")
    check(introduction.replace("WikiText-2", ""), 1_024, 4, 12, LONG, 8, 11, LONG, SHORT, LONG)

    expected = [1, *ruler(runs["plain"])]
    extra = {"penalty": [0.3], "ask-32k": [LONG], "ask-hidden": [64]}
    for name in RECIPES:
        asked = {"penalty": [], "lengths": [90], "lengths-mixed": [90], "lengths-mixed-signals": [90]}.get(name, [93])
        expected += [*extra.get(name, []), *asked, *reach_of(runs[name]), *ruler(runs[name])]
    check(table, *expected, SHORT, LONG, 1e-3)

    tracking = [next(100 * cell["score"] for cell in runs[name]["tasks"]["ruler"]["cells"]
                     if (cell["task"], cell["length"]) == ("vt", LONG)) for name in ("plain", "target", "ask")]
    local = {name: reach_of(run)[0] for name, run in runs.items() if name != "plain"}
    kept = [runs[name]["tasks"]["reach"]["rows"]["learned"] for name in ("lengths", "lengths-mixed")]
    lost = {name: behind(runs[name], runs["plain"], LONG) for name in RECIPES}
    nearest = min(lost.values())
    assert nearest[0] > 10 and "none is within 10 points" in (ROUTER.parent / "README.md").read_text()
    check(points, LONG, *tracking, *difference(runs["ask"], runs["target"], LONG), SHORT, 93, local["ask"], LONG, LONG,
          local["ask-32k"], kept[0]["kept"], *kept[0]["kept_95"], kept[1]["kept"], *kept[1]["kept_95"],
          local["lengths"] - local["lengths-mixed"], *difference(runs["lengths-mixed"], runs["lengths"], LONG), LONG,
          *behind(runs["lengths-mixed-signals"], runs["lengths-mixed"], SHORT), SHORT, 90, 2, LONG, *nearest, 88, 64,
          1.4, 21_504, 22_176)


def test_the_page_says_what_three_seeds_reached():
    text = (ROUTER / "README.md").read_text().partition("## Three seeds of the last")[2]
    seeds, plain = [read_results(ROUTER / name / "eval.json") for name in SEEDS], read_results(
        ROUTER.parent / "long/plain/eval.json")
    assert [run["run"]["seed"] for run in seeds] == [0, 1, 2]
    settings = [run["tasks"]["ruler"] for run in (*seeds, plain)]
    assert all((one["seed"], one["made_of"]) == (settings[-1]["seed"], settings[-1]["made_of"]) for one in settings)
    told = {length: pooled(seeds, plain, length) for length in (4_096, SHORT, 16_384, LONG)}
    first, _, rest = text.partition("| 0 |")
    assert "88 prompts" in first  # 8 of each of 11 tasks, which `pooled` asks for
    each = [[number, *reach_of(run)] for number, run in enumerate(seeds)]
    rows = [[length, *row[:3], *row[3]] for length, row in told.items()]
    table, _, points = ("| 0 |" + rest).partition("- **It misses")
    check(table, *functools.reduce(operator.iadd, each, []), *functools.reduce(operator.iadd, rows, []))
    assert all(run[2] < 0.97 for run in each)
    assert {length for length, row in told.items() if row[3][0] <= 2} == {4_096, 16_384}
    check(points.partition("*Limit")[0], 0.97, 2, 4_096, 16_384, told[SHORT][2] - told[SHORT][1], SHORT)


def test_the_recipes_are_those_of_the_table(runs):
    parameters = {name: runs[name]["run"]["trained_parameters"] for name in RECIPES}
    assert parameters.pop("ask-hidden") > 65_000 >= max(parameters.values())
    assert {parameters[name] for name in ("lengths-signals", "lengths-mixed-signals")} == {22_176}
    assert all(abs(runs[name]["run"]["tokens_seen"] / 12e6 - 1) < 0.01 for name in RECIPES)
