"""What people wrote of several GPUs, in `eval/results/scaling.md`, `drift.md` and the page above them: every number is
computed here from the measurements, in its order."""

from __future__ import annotations

import json
import pathlib
import re

import numpy as np
import pytest

from l2a_jax.config import MODELS
from l2a_jax.models.params import abstract_params, by_path
from l2a_jax.research.speed import drift, on_paper, scaling
from l2a_jax.sharding.axes import Axes
from l2a_jax.training.regimes import count_parameters, partition, regime_mask
from l2a_jax.training.settings import layer_of, resolve
from l2a_jax.training.tables import FIRST_PRESET
from tests.research.replication.recomputed import check

RESULTS = pathlib.Path(__file__).resolve().parents[3] / "eval/results"
LONG = 131_072


def measured(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def parts(name):
    """What the measurement wrote, and the sections written by hand."""
    made, _, written = (RESULTS / f"{name}.md").read_text().partition("\nWritten by hand from here on; a test")
    found = re.split(r"^## (.*)$", written, flags=re.M)
    return made, dict(zip(found[1::2], found[2::2], strict=True))


@pytest.fixture(scope="module")
def lines():
    """The rows of each line by its regime, axis and model."""
    rows = measured("scaling")["lines"]
    return {(line.regime, line.axis, line.model.rpartition("-")[2]): (line, rows[line.name])
            for line in scaling.lines() if line.name in rows}


@pytest.fixture(scope="module")
def dealt(lines):
    """By regime over data: parameters, those of layers, bytes that come, leaves of a layer, and the rows."""
    found = {}
    for regime in ("router_only", "full_ft"):
        line, rows = lines[regime, "data", "0.5b"]
        layer = layer_of(resolve(regime, {"model": "none", "data": ("none",), "window": line.window},
                                 begins=FIRST_PRESET))
        params = abstract_params(MODELS[line.model], layer)
        case = on_paper.Case("", regime, Axes(data=2), 2 * line.rows)
        moved = on_paper.moved_bytes(MODELS[line.model], layer, case,
                                     partition(params, regime_mask(params, regime))[0], params, seq_len=line.length)
        layers = {"layers": params["layers"]}
        found[regime] = count_parameters(params), count_parameters(layers), moved, len(by_path(layers)), rows
    return found


def test_the_tables_are_those_that_were_measured():
    for name, module in (("scaling", scaling), ("drift", drift)):
        assert parts(name)[0] == module.markdown(measured(name))


def test_the_goals_and_what_two_devices_reach(lines):
    def of_linear(*key):
        return lines[key][1][-1]["of_linear"]

    large = lines["router_strict", "context", "1.5b"][1]
    page = (RESULTS / "README.md").read_text().partition("\n## Agreement and speed\n")[2]
    check(re.search(r"Two H200s(.*?)\(\[meshes\]", page, flags=re.S)[1], of_linear("router_only", "data", "0.5b"),
          of_linear("full_ft", "data", "0.5b"), of_linear("router_strict", "context", "0.5b"))
    assert all(row["devices"] <= 2 for _, rows in lines.values() for row in rows)
    check(parts("scaling")[1]["The goals"], 8, 0.85, 0.75, LONG, 6, of_linear("router_only", "data", "0.5b"),
          of_linear("full_ft", "data", "0.5b"), of_linear("router_strict", "context", "0.5b"),
          of_linear("router_strict", "context", "1.5b"), large[0]["ms"] / large[-1]["ms"], 4, 8, 32_768)


def test_what_comes_over_the_links_and_what_a_step_takes_longer(lines, dealt):
    rate = on_paper.Card().near
    cells, shares, ones, guesses = [], [], [], []
    for regime, (whole, layers, moved, _, rows) in dealt.items():
        none, one, two = (row["ms"] for row in rows)
        ends, ms, extra = (whole - layers) / 1e6, sum(moved) / rate * 1e3, two - none
        assert moved.weights == pytest.approx((2 * layers + whole - layers) * 2 / 2, rel=1e-3)
        gradients = moved.gradients / 1e6
        cells += [whole / 1e6, layers / 1e6, 2, layers / 1e6, ends, 2, 2, moved.weights / 1e6,
                  *((gradients,) if regime == "router_only" else (whole / 1e6, 4, 2, gradients)), ms, two, none, extra]
        shares.append(100 * ms / extra)
        ones.append(one - none)
        guesses.append(none / (none + extra * (7 / 8) / (1 / 2)))
    none, two = (dealt["router_only"][4][place]["ms"] for place in (0, -1))
    held = [row["memory_gb"] for row in dealt["router_only"][4][1:]]
    spared = dealt["router_only"][2].weights / rate * 1e3
    long = lines["router_strict", "context", "0.5b"][1][-1]["ms"]
    check(parts("scaling")[1]["Where the time over data goes"], *held, rate / 1e9, rate / 1e9, *cells, *shares,
          *ones, dealt["router_only"][3], dealt["full_ft"][3], spared, two - none, none / (two - spared), 1.0,
          dealt["router_only"][0] * 2 / 2 / 1e9, LONG, 100 * spared / long, 8, *guesses)
    assert guesses[1] < 0.85 and shares[0] < shares[1] < 50


def test_the_page_of_what_is_reckoned_says_how_far_off_it_was(lines, dealt):
    text = (RESULTS.parents[1] / "l2a_jax/SCALE.md").read_text()
    said = re.search(r"Two cards, which were\n(.*?)\n\n", text, flags=re.S)[1]
    off = [(rows[-1]["ms"] - rows[0]["ms"]) / (sum(moved) / on_paper.Card().near * 1e3)
           for _, _, moved, _, rows in dealt.values()]
    none, two = (lines["router_strict", "context", "0.5b"][1][place]["ms"] for place in (0, -1))
    check(said, *sorted(off), LONG, 100 * (2 * two / none - 1))


@pytest.fixture(scope="module")
def runs():
    return {row["run"]: row for row in measured("drift")["runs"]}


def test_differences_are_those_of_the_losses(runs):
    losses = {name: np.array(found) for name, found in measured("drift")["losses"].items()}
    for name, row in runs.items():
        signed = losses[name] - losses[row["base"]][: len(losses[name])]
        told = np.abs(signed)
        assert row["steps"] == len(signed) and row["largest_at"] == told.argmax() + 1
        assert [row[key] for key in ("mean", "largest", "last", "signed")] == pytest.approx(
            [told.mean(), told.max(), told[-20:].mean(), signed.mean()])
    killed, again, whole = (losses[name] for name in ("again-before", "again", "l2a_ft-0.5b-data2"))
    assert len(killed) == 133 and (killed == whole[:133]).all() and (again[:100] == whole[:100]).all()
    assert again[100] != whole[100]


def test_what_the_page_says_of_the_differences(runs):
    def mean(regime, how, size="0.5b"):
        return runs[f"{regime}-{size}-{how}"]["mean"]

    means = [mean(regime, how) for regime in ("router_only", "l2a_ft", "full_ft")
             for how in ("data2", "context2", "halves")]
    large = [mean("router_only", how, "1.5b") for how in ("data2", "halves")]
    assert max(a / b for a, b in [*zip(means[::3], means[2::3], strict=True), large]) < 1.1
    assert max(a / b for a, b in zip(means[1::3], means[2::3], strict=True)) < 1
    lower = [-runs[f"full_ft-0.5b-{how}"]["signed"] for how in ("data2", "halves", "context2")]
    before, again = runs["again-before"]["same"], runs["again"]["same"]
    assert before["steps"] == before["of"] == 133 and before["largest_later"] == 0
    text = parts("drift")[1]["What it says"]
    when, _, said = text.partition("the same step, whose")
    assert "2026-11-29, jax 0.11.2" in when
    page = (RESULTS / "README.md").read_text().partition("\n## Agreement and speed\n")[2]
    check(re.search(r"with losses on the mean(.*?)nats", page, flags=re.S)[1], max(means + large))
    check(said, *means, *large, *lower, before["steps"], again["steps"], 0.0, 1, again["steps"],
          again["largest_later"], 4)


def test_what_the_page_says_of_prefill():
    one, two = measured("speed_inference_meshes")["cases"]
    assert (one["context"], two["context"]) == (1, 2) and one["cache_bytes"] == two["cache_bytes"]
    check(parts("speed_inference_meshes")[1]["What it says"], LONG, one["ms"]["routed"] / two["ms"]["routed"], 12,
          one["ms"]["dense"] / two["ms"]["dense"])
