"""The study and absorption in `eval/results/README.md`: every number computed from what is stored, in its order."""

import json
import math
import re

import pytest

from l2a_jax.evaluation import intervals, table
from tests.research.replication.recomputed import (
    ALLOWED,
    RESULTS,
    accounted,
    check,
    limits,
    percent,
    ratio,
    reached,
    were_run,
)

SEEDS = ("", "-s1", "-s2")
AIM = "repair-t8192-w1024-p0.5-f0.3-e1"


@pytest.fixture(scope="module")
def made():
    return json.loads((RESULTS / "replication.json").read_text())


@pytest.fixture(scope="module")
def rows(made):
    return {row["name"]: row for row in made["rows"] if "device" in row}


@pytest.fixture(scope="module")
def parts():
    """The study's paragraphs by their bold beginnings, and the section on absorption."""
    text = (RESULTS / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    study = re.search(r"## The study on real weights\n(.*?)\n## ", text, flags=re.S)[1]
    pieces = re.split(r"^(?:- )?\*\*(.*?)\*\*", study, flags=re.M)
    return {"": pieces[0], **dict(zip(pieces[1::2], pieces[2::2], strict=True)),
            "absorption": re.search(r"## Routing absorption.*?\n(.*?)\n## ", text, flags=re.S)[1]}


def without_names(text):
    return text.replace("WikiText-2", "").replace("WikiText-103", "")


def test_what_was_run(parts, made, rows):
    base = [rows[f"baseline-{size}"]["perplexity"] for size in ("0.5b", "1.5b")]
    check(without_names(re.sub("H200|Qwen2.5", "", parts[""])), *were_run(made), 4, *base, 256, 12, 4, 8, 2_048)


def test_verdicts(parts, rows):
    pair = [rows[name] for name in ("l2a_ft-diverse-0.5b", "l2a_ft-12M-s1")]
    assert {round(100 * row["sparsity"]) for row in pair} == {88, 89}
    gap, both, _, sinks = accounted(rows, "none", 1)
    told = [rows[f"l2a_ft-repair-s{seed}"]["absorption"] for seed in (0, 1)]
    fast, layers = rows["l2a_ft-1.3M-lr0.0003"], [rows[f"damage-{cell}-none-w256-l1"] for cell in ("par-k4", "seq-k4")]
    layers.append(rows["damage-seq-k4-none-w256-l1-s1"])
    left = [rows[f"l2a_ft-repair-s{seed}"]["audit"]["worse"]["static"] for seed in (0, 1)]
    fixed = {round(rows[f"repair-w256-p0.3-s{seed}"]["audit"]["worse"]["static"], 3) for seed in (0, 1, 2)}
    trained = {kind: rows[f"l2a_ft-{kind}-s2"]["under"]["rows"] for kind in ("frozen", "static")}
    own = {kind: found[kind]["nll"] - found["learned"]["nll"] for kind, found in trained.items()}
    assert "at 3e-4:" in parts["Verdicts"] and fast["settings"]["lr"] == 3e-4
    check(parts["Verdicts"].replace("3e-4", ""), pair[0]["tokens_per_trained_parameter"],
          *(row["loss_last_5_percent"] for row in pair), 100 * min(row["sparsity"] for row in pair),
          *map(ratio, pair), fast["tokens_seen"] / 1e6, 100 * fast["sparsity"], ratio(fast), percent(fast), both, gap,
          4, sinks, *map(percent, layers),
          *(one[when]["random_worse"] for one in told for when in ("after", "before")), own["frozen"], *left, *fixed,
          own["static"])


def test_reported_and_measured(parts, rows):
    def reported(size, regime):
        theirs, base = (table.match(f"qwen2.5-{size}", one) for one in (regime, "baseline"))
        return theirs, base

    expected = []
    sizes = ("0.5b", "1.5b")
    for regime in ("router_only", "l2a_ft", "full_ft"):
        for size in sizes:
            theirs, base = reported(size, regime)
            expected += [theirs.perplexity / base.perplexity] if theirs else []
            expected.append(ratio(rows[f"{regime}-diverse-{size}"]))
        for task in ALLOWED if regime == "router_only" else ():
            for size in sizes:
                theirs, base = reported(size, regime)
                points = rows[f"router_only-diverse-{size}"]["benchmarks"][task]["difference"]["points"]
                expected += [100 * (getattr(theirs, task) - getattr(base, task)), points]
    (theirs, base), row = reported("0.5b", "router_only"), rows["router_only-diverse-0.5b"]
    share, lost, told = base.hellaswag, 100 * (theirs.piqa - base.piqa), row["benchmarks"]["piqa"]["difference"]
    assert told["points_95"][0] < lost < 0 < told["points_95"][1]
    check(parts["Reported and measured"], *expected, lost, ratio(row), expected[0], 500,
          196 * math.sqrt(share * (1 - share) / 500), *(row["benchmarks"][task]["n"] for task in ALLOWED))


def test_what_routing_costs(parts, rows):
    alone = ratio(rows["norms_only-s0"])
    below = [100 * row["sparsity"] for row in rows.values() if row["group"] == "frontier" and row["size"] == "0.5b"
             and row["perplexity_ratio"] and ratio(row) < alone]
    assert rows["repair-w256-p0.3-s0"]["audit"]["ratio"]["all"] > alone
    expected = [1, alone, min(below), max(below)]
    for name in ("repair-w256-p0.3-s0", AIM, "repair-w256-p0.1-1.5b", "repair-w256-p0.3-1.5b", "repair-w256-p1-1.5b"):
        row = rows[name]
        expected += [row["settings"]["window"], row["settings"]["penalty"], 100 * row["sparsity"]]
        expected += [row["audit"]["ratio"][control] for control in ("learned", "all", "random", "static", "none")]
    check(parts["The repair: what routing costs"], *expected)


def test_the_needle(parts, rows):
    large, seeds = rows["repair-w256-p1-1.5b"], [rows[AIM + seed] for seed in SEEDS]

    def of(row, length, control):
        return 100 * row["needle"]["lengths"][length]["controls"][control]

    assert all(row["needle"]["lengths"][length]["n"] == 40 for row, length in (
        (large, "2048"), *((row, length) for row in seeds for length in ("8192", "32768"))))
    expected = [40, 20, 256, 1, 2_048, percent(large, "2048"), *(of(large, "2048", name) for name in (
        "static", "random", "none")), 1_024, 0.5]
    for length in ("8192", "32768"):
        assert {percent(row, length) for row in seeds} == {100}
        static = [of(row, length, "static") for row in seeds]
        rest = [{of(row, length, name) for row in seeds} for name in ("random", "none")]
        assert all(len(one) == 1 for one in rest)
        expected += [int(length), 100, min(static), max(static), *(one.pop() for one in rest)]
    (whole, _), (_, most) = (intervals.share(round(found * 40 / 100), 40) for found in (100, max(static)))
    assert whole < most, "their intervals overlap"
    expected += [40, 100, max(static)]
    for length in ("8192", "32768"):
        asked = [row["needle"]["lengths"][length] for row in rows.values()
                 if row["group"] == "frontier" and row["needle"] and length in row["needle"]["lengths"]]
        expected += [sum(one["controls"]["static"] > one["exact_match"] for one in asked), len(asked), int(length)]
    check(parts["The needle, and which tokens are routed"], *expected)


def test_the_aim(parts, rows, made):
    aims = [reached(row) for row in rows.values() if row["group"] == "frontier"]
    asked = [aim for aim in aims if None not in aim.values()]
    assert limits(rows, made)[5] == 1
    check(parts["The aim"], sum(all(aim.values()) for aim in asked), len(asked), 1_024, 1.0)


def test_a_window_of_256(parts, rows):
    seeds = [rows[f"repair-w256-p0.3-s{seed}"] for seed in range(3)]
    best = rows["repair-t8192-w256-p0.5-f0.3-e0.2"]
    assert percent(best, "2048") == percent(best, "8192") == 100
    quiet = {name: rows[f"repair-w256-p{name}-s0"]["sparsity"] for name in ("0.3", "0.5")}
    more = [100 * (quiet[name] - rows[f"repair-w256-p{name}-f0.3-s0"]["sparsity"]) for name in ("0.3", "0.5")]
    check(parts["A window of 256"], *(percent(row, "2048") for row in seeds), 2_048, 2_048, 8_192,
          percent(best, "32768"), 32_768, 100 * best["sparsity"],
          *(100 * one["sparsity"] for one in best["contexts"].values()), best["contexts"]["32768"]["ratio"],
          min(more), max(more))


def test_pruning(parts, rows, made):
    name = "repair-w256-p0.4-s0"
    found = made["instruments"]["prunable"][name]["cumulative"]
    ten = found[10]
    check(parts["Pruning."], 10, len(rows[name]["sparsity_per_layer"]), ten["cost"], 32_768,
          found[0]["cache_bytes"] / 1e6, ten["cache_bytes"] / 1e6, rows[name]["audit"]["worse"]["none"], 1_024,
          rows[AIM + "-s1"]["audit"]["worse"]["none"], 17)


def test_what_was_not_run(parts, made):
    assert [row["size"] for row in made["rows"] if "device" not in row] == ["3b"]
    check(parts["Not run"], 12)


def test_absorption(parts):
    def cells(experiment, place=0):
        found = json.loads((RESULTS / f"absorption/absorption_{experiment}.json").read_text())
        return found["tables"][place]["rows"], found

    soft, about = cells("soft_gate")
    assert about["notes"][0].startswith("learned - frozen random: 0.0855")

    def mean(row, column="perplexity"):
        return row[column]["mean"]

    def said(row, column):
        return float(re.match(r"[\d.]+", row[column]["reported"])[0])

    learned, random = soft["soft_learned"], soft["soft_random"]
    distilled = cells("distill")[0]["soft_learned (co-adapted)"]
    masks = cells("stochastic")[0]
    swapped = cells("swap")[0]["soft_learned"]
    closed = cells("distill", 1)[0]["dense"]["k = 64"]["mean"]
    gaps = cells("mechanism", 2)[0]
    frozen, adapting = (gaps[f"{share}% of the layers"]["random - learned, nats"]["mean"] for share in (0, 100))
    assert frozen > 0
    check(without_names(parts["absorption"]), 0.0855, mean(learned), mean(random), said(learned, "perplexity"),
          said(random, "perplexity"), 31, 18, 3, 3_000, 8, 50_000, 16, 0.1,
          mean(distilled, "distilled gate") / mean(distilled, "native"),
          said(distilled, "distilled gate") / said(learned, "perplexity"),
          mean(masks["stochastic"], "dense") / mean(masks["dense"], "dense"),
          said(masks["stochastic"], "dense") / said(masks["dense"], "dense"),
          math.log(mean(swapped, "random, as drawn") / mean(swapped, "own")), 100 * closed, 64, 1_500, -adapting)
