"""`eval/results/findings.md` is written by people: every number in it is computed here from the rows, in its order.

Beside each section stand the rules behind its words (agrees, lost, reached), so that they too are checked.
"""

import itertools
import json
import math
import re
import statistics

import pytest

from l2a_jax.evaluation import table
from l2a_jax.files import plain
from l2a_jax.research.replication import arms, damage, report
from l2a_jax.training.settings import Settings
from tests.research.replication.recomputed import (
    AGREES,
    ALLOWED,
    LENGTHS,
    LEVERS,
    LOST,
    NEUTRAL,
    PARAMETERS,
    RESULTS,
    SPARSE,
    accounted,
    best_evidence,
    check,
    frontier,
    is_pair,
    limits,
    norms_alone,
    percent,
    ratio,
    sparse_and_good,
    trained_under,
    were_run,
)


@pytest.fixture(scope="module")
def made():
    return report.collect(RESULTS / "rows")


@pytest.fixture(scope="module")
def rows(made):
    return {row["name"]: row for row in made["rows"] if "device" in row}


@pytest.fixture(scope="module")
def sections():
    parts = re.split(r"^## (.*)$", (RESULTS / "findings.md").read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_number_stored_is_that_of_the_rows(made):
    stored = json.loads((RESULTS / "replication.json").read_text())
    assert stored.keys() - made.keys() == {"figures"}
    again = json.loads(json.dumps(plain(made)))
    for name in again:
        assert_near(again[name], stored[name], name)


def assert_near(one, other, where):
    """Equal but for the last digits, which libraries of linear algebra differ in."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_near(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_near(*pair, f"{where}[{index}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9), where
    else:
        assert one == other, where


def test_every_section_is_checked_and_every_row_exists(sections, made):
    tests = {name for name in globals() if name.startswith("test_section_")}
    assert len(tests) == len(sections)
    names = {row["name"] for row in made["rows"]}
    text = (RESULTS / "findings.md").read_text()
    kinds = "norms_only|router_only|l2a_ft|full_ft|repair|damage|baseline|autopsy"
    assert set(re.findall(f"`((?:{kinds})-[^`]*)`", text)) <= names


def test_section_what_was_run(sections, rows, made):
    assert {(row["group"] in arms.GROUPS, row["date"][:10]) for row in rows.values()} == {
        (False, "2026-11-26"), (True, "2026-11-29")}
    assert {row["device"] for row in rows.values()} == {"1 x NVIDIA H200"}
    assert [(row["name"], row["elsewhere"]) for row in rows.values() if row["elsewhere"]] == [
        ("router_only-diverse-1.5b", {"arc_challenge": "1 x cpu"})]
    hashes = {row["size"]: row["source_hash"][:12] for row in rows.values() if row["source_hash"]}
    assert all(f"`{short}`" in sections["What was run"] for short in hashes.values())
    assert [row["name"] for row in rows.values() if row["status"] != "done"] == ["norms_only-s0"]
    assert not any(rows["norms_only-s0"]["benchmarks"].values())
    later = [row["settings"]["seed"] for row in rows.values() if row["group"] == "forced"]
    run, first, arms_run, declared = were_run(made)
    assert arms_run == len(later) + 1
    seeds = [value for seed in (2, 3, 4) for value in (later.count(seed), seed)]
    check(sections["What was run"], run, first, 26, 2026, 1, declared, arms_run, 29, *seeds, 4, 1, 95, 1)


def test_section_verdicts(sections, rows):
    pairs = [[rows[name] for name in names] for names in (
        ("l2a_ft-diverse-0.5b", "l2a_ft-12M-s1"), ("l2a_ft-1.3M-s0", "l2a_ft-1.3M-s1"),
        ("l2a_ft-0.44M-s0", "l2a_ft-0.44M-s1"))]
    for row in itertools.chain(*pairs):
        assert row["regime"] == "l2a_ft" and "lr" not in row["settings"] and not row["non_finite"]
        assert row["tokens_per_trained_parameter"] <= 0.14 and row["loss_last_5_percent"] > 0.5
        assert row["sparsity"] < 0.99 and ratio(row) <= 1.5
    assert all((row["needle"]["exact_match"] <= LOST) is (pair is not pairs[0]) for pair in pairs for row in pair)
    main = pairs[0]
    collapse = [0.14, 0.5, 99, 1.5, main[0]["tokens_per_trained_parameter"],
                *(row["loss_last_5_percent"] for row in main), *(100 * row["sparsity"] for row in main),
                *map(ratio, main), *map(percent, main),
                *(pair[0]["tokens_per_trained_parameter"] for pair in pairs[1:])]
    parts = [accounted(rows, *cell) for cell in (("none", 1), ("theta5", 1), ("none", 0.1))]
    assert min(min(part[1:]) for part in parts) >= 80
    plain, scaled, leaky = parts
    damage = [80, 256, plain[0], 4, plain[1], plain[2], 4, plain[3], 5, *scaled, 0.1, *leaky,
              rows["damage-seq-k0-none-w256-l1"]["tokens_seen"] / 1e6, 1, 100]
    told = []
    for seed in (0, 1):
        before, after = (rows[f"l2a_ft-repair-s{seed}"]["absorption"][when]["random_worse"]
                         for when in ("before", "after"))
        assert after >= 0.2 * before
        told.append((before, after, 100 * after / before))
    (before, after, share), (other, left, part) = told
    frozen = rows["l2a_ft-frozen-s2"]["under"]["rows"]
    own, coins = (frozen[kind]["nll"] - frozen["learned"]["nll"] for kind in ("frozen", "random"))
    assert coins >= 0.2 * other
    assert all(round(100 * one / before) == round(100 * one / other) for one in (own, coins)), "of either number before"
    check(without_rates(sections["Verdicts by rules fixed beforehand"]), *collapse, *damage, 20, before, after, share,
          other, left, part, own, 100 * own / before, coins, 100 * coins / before)


def without_rates(text):
    """Learning rates, such as 5e-5, are checked by themselves."""
    return re.sub(r"\b\d+e-\d+\b", "", text)


def test_section_not_reproduced(sections, rows):
    expected = []
    for size in ("0.5b", "1.5b"):
        base, theirs = (table.match(f"qwen2.5-{size}", regime) for regime in ("baseline", "router_only"))
        for task in ALLOWED:
            entry = rows[f"router_only-diverse-{size}"]["benchmarks"][task]
            expected += [entry["difference"]["points"], 100 * (getattr(theirs, task) - getattr(base, task))]
            low, high = entry["difference"]["points_95"]
            assert (low <= expected[-1] <= high) is ((size, task) in (("0.5b", "piqa"), ("1.5b", "arc_challenge")))
            assert (low <= 0 <= high) or (size, task) in (("1.5b", "hellaswag"), ("1.5b", "arc_challenge"))
    theirs = [table.match("qwen2.5-0.5b", regime).perplexity for regime in ("router_only", "baseline")]
    share = table.match("qwen2.5-0.5b", "baseline").hellaswag
    check(sections["What is not reproduced"], *expected, 500, 196 * math.sqrt(share * (1 - share) / 500),
          ratio(rows["router_only-diverse-0.5b"]), theirs[0] / theirs[1])


def test_section_against_what_was_reported(sections, rows):
    text = sections["Against what was reported"]
    expected = [256, AGREES]
    for name in ("router_only-diverse-0.5b", "l2a_ft-diverse-0.5b", "full_ft-diverse-0.5b", "router_only-diverse-1.5b",
                 "l2a_ft-diverse-1.5b"):
        row = rows[name]
        theirs, base = (table.match(f"qwen2.5-{row['size']}", regime) for regime in (row["regime"], "baseline"))
        relative = theirs.perplexity / base.perplexity
        line = next(line for line in text.splitlines()
                    if line.startswith(f"- `{row['regime']}`, {row['size'].upper()}"))
        agrees = max(ratio(row) / relative, relative / ratio(row)) <= AGREES
        assert (": agrees" in line) is agrees and (": disagrees" in line) is not agrees
        expected += [ratio(row), relative, percent(row), *map(float, re.findall(r"\d+", theirs.needle))]
        assert row["settings"]["window"] == 256
    check(text, *expected)


def test_section_scale_or_window(sections, rows):
    names = {size: {window: rows[f"router_only-{'' if window == 256 else f'w{window}-'}diverse-{size}"]
                    for window in (2_048, 1_024, 256)} for size in ("0.5b", "1.5b")}
    table = [value for window in (2_048, 1_024, 256) for value in (
        window, *(one for size in names for one in (ratio(names[size][window]), percent(names[size][window]))))]
    assert all(ratio(found[2_048]) <= NEUTRAL < ratio(found[256]) for found in names.values())
    check(sections["Scale, or a window as long as the context?"], 2_048, *table)


def test_section_collapse(sections, rows):
    low = [row for row in rows.values() if row["regime"] in ("l2a_ft", "full_ft") and row["group"] in (
        "main", "collapse") and (row["tokens_per_trained_parameter"] or 1) < 1]
    plain = [row for row in low if not {"lr", "master_dtype"} & row["settings"].keys()
             and row["settings"].get("penalty", 0) <= 1]
    finite = [row for row in plain if not row["non_finite"] and row["perplexity_ratio"]]
    tokens = [row["tokens_per_trained_parameter"] for row in plain]
    asked = [row for row in plain if row["needle"]]
    lost = [row for row in asked if row["needle"]["exact_match"] <= LOST]
    ratios = [edge([ratio(row) for row in finite if row["data"] == data]) for data in ("diverse", "wikitext")
              for edge in (min, max)]
    ill = {row["name"]: row for row in low if row["verdict"] not in (None, "healthy")}
    order = ["full_ft-wikitext-0.5b", "l2a_ft-1.3M-lr0.003", "l2a_ft-1.3M-penalty10"]
    assert sorted(ill) == sorted(order) and [ill[name]["verdict"] for name in order] == [
        "loss-perplexity mismatch", "constant output", "never routes"]
    fast, faster = (rows[f"l2a_ft-1.3M-lr{rate}"] for rate in ("0.0003", "0.003"))
    text = sections["Collapse below one token a trained parameter"]
    assert re.findall(r"\d+e-\d+", text) == ["5e-5", "3e-4", "3e-3"]
    assert [row["settings"]["lr"] for row in (fast, faster)] == [3e-4, 3e-3] and Settings(regime="l2a_ft").lr == 5e-5
    check(without_rates(text), len(plain), min(tokens), max(tokens), len(finite),
          *ratios, len(asked), len(lost), 100 * LOST, max(row["tokens_seen"] for row in lost) / 1e6,
          fast["tokens_seen"] / 1e6, 100 * fast["sparsity"], ratio(fast), percent(fast), ratio(faster), len(ill),
          *(ratio(ill[name]) for name in order))


def test_section_autopsy(sections, made):
    found = {name: {row["fault"]: {symptom for symptom, value in row["symptoms"].items() if value is True}
                    for row in entry["rows"]} for name, entry in made["instruments"]["autopsy"].items()}
    short, leak = found["autopsy"], found["autopsy-leak-4.4M"]["leak"]
    all_symptoms = set(made["instruments"]["autopsy"]["autopsy"]["rows"][0]["symptoms"])
    tried = {row["settings"]["name"] for row in made["instruments"]["autopsy"]["autopsy"]["rows"] if "settings" in row}
    most = max(map(len, short.values()))
    assert {fault for fault, shown in short.items() if len(shown) == most} == {
        "NaN weights, evaluated before", "NaN router", "NaN router, evaluated before"}
    assert all(all_symptoms - shown == {"finite, bad perplexity"} for shown in short.values() if len(shown) == most)
    assert [fault for fault, shown in short.items() if "finite, bad perplexity" in shown] == ["leak"]
    assert short["none"] == {"needle lost", "tasks above chance"}
    assert all_symptoms - leak == {"finite, bad perplexity"}
    loops = {row["fault"]: 8 * row["greedy_ends_in_loop"] for row in made["instruments"]["autopsy"]["autopsy"]["rows"]}
    assert {loops[fault] for fault, shown in short.items() if len(shown) == most} == {5.0}
    check(sections["Autopsy"], len(tried - {"none"}), most, len(all_symptoms), 5, 8, loops["NaN weights"], 8,
          loops["none"], 8, len(short["none"]), 4.4, len(leak),
          len(all_symptoms), 6)


def test_section_damage(sections, made, rows):
    expected = [len(damage.FACTORS)]
    for response in ("nats a token above the baseline", "needle, logit of exact match",
                     "needle, log-probability of the answer"):
        main = made["damage"][response]["main_effects"]
        name, term = max(main["terms"].items(), key=lambda item: item[1]["share"])
        level, entry = max(term["levels"].items(), key=lambda item: abs(item[1]["difference"]))
        assert (name, level, term["reference"]) == ("rope", "linear:5", "none")
        expected += [100 * term["share"], entry["difference"], *entry["interval"]]
    main = made["damage"]["nats a token above the baseline"]["main_effects"]
    assert main["pure_error"]["p"] < 0.05
    cells = [(name, window, value["ratio"]) for name, values in made["together"]["crossed"]
             for window, value in zip(damage.FACTORS["window"], values, strict=True) if value is not None]
    harmful = sorted((cell for cell in cells if cell[2] > NEUTRAL), key=lambda cell: -cell[2])
    assert [(name, window) for name, window, _ in harmful] == [
        ("sequential, 0 sinks", 256), ("sequential, 0 sinks", 1_024), ("sequential, 1 sinks", 256),
        ("sequential, 4 sinks", 256)]
    distinct = {(name.split(",")[0] if window == 2_048 else name, window, value) for name, window, value in cells}
    pair = [rows[f"damage-seq-k4-none-w256-l1{seed}"] for seed in ("", "-s1")]
    parallel = rows["damage-par-k4-none-w256-l1"]
    check(sections["What damages router-only"], *expected, main["residual_sd"], main["pure_error"]["sd"], len(cells),
          2_048, len(distinct), len(harmful), NEUTRAL, harmful[0][2], 256, harmful[1][2], 1_024, harmful[2][2], 1, 256,
          harmful[3][2], 4, 256, 256, 4, *map(percent, pair), 100 * pair[0]["sparsity"], percent(parallel),
          100 * parallel["sparsity"], pair[0]["audit"]["worse"]["all"], parallel["audit"]["worse"]["all"])


def test_section_noise(sections, rows):
    some = sorted((row for row in rows.values() if row["group"] == "noise" and row["perplexity_ratio"]),
                  key=lambda row: row["settings"]["flip"])
    quiet, loud = some[0], some[-1]
    assert loud["perplexity_ratio"]["ratio_95"][1] < quiet["perplexity_ratio"]["ratio_95"][0]
    check(sections["Noise in the decisions"], 100 * loud["settings"]["flip"], ratio(loud), ratio(quiet), percent(loud),
          percent(quiet), 100 * loud["sparsity"], 100 * quiet["sparsity"], 1)


def test_section_repair(sections, rows):
    some = [(row, aim) for row, aim in sparse_and_good(rows) if row["audit"] and "ratio" in row["audit"]]
    asked = [tasks for _, aim in some if None not in (tasks := [aim[task] for task in ALLOWED])]
    best = max((row for row, _ in some), key=lambda row: row["sparsity"])
    assert best["name"] == "repair-w1024-p1-s0"
    check(sections["The repair"], len(some), 100 * SPARSE, len(asked), sum(map(all, asked)), *ALLOWED.values(),
          100 * best["sparsity"], ratio(best), *(best["audit"]["ratio"][name] for name in ("none", "random", "static")),
          percent(best), *map(int, best["needle"]["lengths"]), 1, *norms_alone(rows),
          *best_evidence(rows["repair-w256-p1-1.5b"]))


def test_section_needle(sections, rows):
    whole = [row for row, aim in sparse_and_good(rows) if aim["needle"]]
    families = {row["name"].removesuffix("-s1").removesuffix("-s2") for row in whole}
    assert families == set(re.findall("`(.*?)`", sections["The needle"])) and {
        max(map(int, row["needle"]["lengths"])) for row in whole} == {32_768}
    expected = [len(whole), 32_768, 2, 2]
    some = [row for row in rows.values() if row["group"] == "frontier" and row["needle"]]
    for length in LENGTHS[1:]:
        asked = [(row, row["needle"]["lengths"][length]) for row in some if length in row["needle"]["lengths"]]
        beaten = [(row, one) for row, one in asked if one["controls"]["static"] > one["exact_match"]]
        expected += [len(beaten), len(asked), int(length)]
    expected += [edge(row["settings"]["window"] for row, _ in beaten) for edge in (min, max)]
    expected += [100 * edge(one["exact_match"] for _, one in beaten) for edge in (min, max)]
    expected += map(int, LENGTHS)
    for lever in LEVERS:
        for length in LENGTHS:
            points = sorted(percent(other, length) - percent(one, length) for one, other in itertools.permutations(
                some, 2) if is_pair(one, other, lever) and all(length in row["needle"]["lengths"]
                                                               for row in (one, other)))
            edges = [points[0], points[-1], statistics.median(points)] if len(points) > 1 else points
            expected += [*edges, len(points)]
    check(sections["The needle"], *expected)


def test_section_aim(sections, rows, made):
    some = [(row, {name for name, value in aim.items() if value is False}) for row, aim in frontier(rows)
            if None not in aim.values()]
    whole = [row for row, missed in some if not missed]
    short = [row["name"] for row, missed in some if missed == {"longer"}]
    nearly = [row for row, missed in some if missed == {"needle"} and sum(
        entry["n"] - entry["correct"] for entry in row["needle"]["lengths"].values()) == 1]
    text = sections["The aim of the repair"]
    assert [row["name"] for row in (*whole, *nearly)] == re.findall("`(.*?)`", text)
    assert "repair-t8192-w1024-p0.5-f0.3-e1-s2" in short
    table = [value for row in whole for value in (
        100 * row["sparsity"], ratio(row), *(one for context in LENGTHS[1:] for one in (
            100 * row["contexts"][context]["sparsity"], row["contexts"][context]["ratio"])))]
    check(text, PARAMETERS, 100 * SPARSE, *map(int, LENGTHS), len(some), len(whole), *map(int, LENGTHS), *table,
          len(short), 2_048, len(nearly), 1, 1_024, 2_048, *limits(rows, made))


def test_section_absorption(sections, rows):
    some = [rows[f"l2a_ft-repair-s{seed}"] for seed in (0, 1)]
    carried = [row["absorption"][when]["carried"] for row in some for when in ("before", "after")]
    assert all(after >= before / 2 for before, after in zip(carried[::2], carried[1::2], strict=True))
    worse = [row["audit"]["worse"] for row in some]
    twins = [rows[f"repair-w256-p0.3-s{seed}"]["audit"]["worse"]["static"] for seed in (0, 1)]
    left = [one["static"] for one in worse]
    check(sections["Absorption"], *carried, *(one["static"] / one["none"] for one in worse), *twins, *left,
          *(100 * (1 - one / other) for one, other in zip(left, twins, strict=True)), *trained_under(rows))


def test_section_claims(sections, made):
    text = sections["Every claim and its rows"]
    groups = {row["group"] for row in made["rows"]}
    assert groups - {"absorption"} <= set(re.findall("`(.*?)`", text)), "every row belongs to a claim"
    assert [row["name"] for row in made["rows"] if "device" not in row] == re.findall("Not run: `(.*?)`", text)
    check(text, 3, 4, 12)
