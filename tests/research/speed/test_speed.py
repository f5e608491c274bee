"""What the speed tables are made of, without a clock: medians over rounds, failing peers, and the choice of blocks."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from l2a_jax.attention.kernels import blocks
from l2a_jax.attention.kernels.backward_kv import parts_of
from l2a_jax.research.speed import attention_calls as speed
from l2a_jax.research.speed import block_sizes as speed_blocks
from l2a_jax.research.speed import scaling, training_steps
from l2a_jax.research.speed import shares as speed_shares
from l2a_jax.research.speed.cases import SpeedCase

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("flags", "said"), [
    (["--only", "["], "--only is '['; expected a regular expression"),
    (["--blocks", "--windows"], "--windows and --blocks are tables of their own"),
    (["--inference", "--training", "--large"], "--training and --large are tables of their own"),
    (["--profile", "l2a"], "--profile is 'l2a'; expected one of baseline"),
    (["--out", "/dev/null/x"], "--out /dev/null/x/speed.json cannot be written"), (["--out", ""], "--out is empty")])
def test_flags_that_cannot_be_are_refused_before_anything_is_measured(flags, said, capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    assert runpy.run_path(str(ROOT / "eval" / "speed.py"))["main"](flags) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_cases_are_timed_in_turn_and_a_failing_peer_costs_only_its_own_figures(monkeypatch):
    order = []

    class Prepared:
        def __init__(self, case):
            self.case, self.calls = case, 0

        def time(self):
            self.calls += 1
            order.append(self.case.name)
            times = {"l2a_jax": [1.0 * self.calls, 10.0 * self.calls], "cuDNN": [2.0, 3.0]}
            failing = self.case.window == 8 and self.calls == 2
            return ({"l2a_jax": times["l2a_jax"]}, {"cuDNN": "no plan"}) if failing else (times, {})

    monkeypatch.setattr(speed, "Prepared", Prepared)
    cases = [SpeedCase("local", 64, window=8), SpeedCase("full", 64)]
    windowed, full = speed.measure_in_turn(cases, rounds=3)
    assert order == [case.name for case in cases] * 3
    assert windowed["ms"] == {"l2a_jax": [2.0, 20.0]} and windowed["failed"] == {"cuDNN": "no plan"}
    assert full["ms"] == {"l2a_jax": [2.0, 20.0], "cuDNN": [2.0, 3.0]} and full["failed"] == {}


def test_operations_are_counted_for_visible_pairs():
    cases = {SpeedCase("full", 6): 21, SpeedCase("local", 6, window=2, batch=3): 3 * 11,
             SpeedCase("routed", 6, rate=0.5): 10.5, SpeedCase("mixed", 6, rate=0.5, window=2): 10.5 + 5.5}
    for case, pairs in cases.items():
        assert case.teraflops(False) == pytest.approx(4 * 14 * 64 * pairs / 1e12)
        assert case.teraflops(True) == pytest.approx(3.5 * case.teraflops(False))


def test_the_block_that_loses_least_over_all_cases_of_a_row_is_chosen(monkeypatch):
    cases = [SpeedCase("local", 64, window=8), SpeedCase("local", 64, window=9), SpeedCase("full", 64)]
    monkeypatch.setattr(speed_blocks, "CASES", cases)
    times = {cases[0].name: {"a": 1.0, "b": 1.2, "c": 3.0, "d": None}, cases[1].name: {"a": 30.0, "b": 12.0, "d": 10.0},
             cases[2].name: {"a": 2.0, "b": 2.5}}
    results = [{"case": case, "kernel": "forward", "block": block, **({"failed": "no"} if ms is None else {"ms": ms})}
               for case, found in times.items() for block, ms in found.items()]
    assert speed_blocks.choose(results) == {(64, "window"): {"forward": "b"}, (64, "whole"): {"forward": "a"}}


def test_the_table_holds_what_the_sweep_chose():
    path = Path(__file__).resolve().parents[3] / "eval" / "results" / "blocks.json"
    chosen = speed_blocks.choose(json.loads(path.read_text()))
    table = {(width, loop): {kernel: str(getattr(blocks.table("sm_90", width, 2, loop), kernel))
                             for kernel in speed_blocks.KERNELS} for width in (64, 128) for loop in blocks.LOOPS}
    assert chosen == table


def test_as_many_programs_share_keys_as_measured_well():
    """A rule of eight numbers: near the best on average, nowhere far from it."""
    path = Path(__file__).resolve().parents[3] / "eval" / "results" / "shares.json"
    cases = {case.name: case for case in speed_shares.CASES}
    losses = {}
    for row in json.loads(path.read_text()):
        spec = speed_blocks.spec_of(cases[row["case"]])
        block = blocks.table("sm_90", spec.width, 2, blocks.loop_of(spec)).backward_kv
        parts = parts_of(spec, block, cases[row["case"]].batch)
        losses[row["case"]] = row["ms"][speed_shares.PARTS.index(parts)] / min(row["ms"]) - 1
    assert len(losses) == 76
    assert max(losses.values()) < 0.2 and sum(losses.values()) / len(losses) < 0.02, losses


def test_scaling_is_told_beside_one_device_without_a_mesh():
    def row(mesh, devices, rows, speed, losses):
        return {"mesh": mesh, "devices": devices, "rows": rows, "ms": 1.0, "tokens_per_second": speed, "memory_gb": 2.0,
                "compile_seconds": 1.0, "losses": losses}

    found = scaling.compared([row(None, 1, 4, 1_000.0, [2.0, 4.0]), row("context=2", 2, 4, 1_500.0, [2.0, 4.1]),
                              row("data=4", 4, 16, 3_800.0, [1.0, 1.0])])
    assert [one["of_linear"] for one in found] == [1.0, 0.75, 0.95]
    assert found[0]["drift"] == 0 and found[1]["drift"] == pytest.approx(0.025) and found[2]["drift"] is None
    text = scaling.markdown({"lines": {"a step": found, "another": scaling.compared([row("data=2", 2, 8, 1.0, [1.0])])},
                             "failed": {"x": "no room"}, "date": "2026-11-28", "device": "a GPU", "versions": {},
                             "command": ["speed.py"]})
    assert "| a step | context=2 | 1.0 | 1.5K | 0.75 | 2.00 | 2e-02 |" in text
    assert "| another | data=2 | 1.0 | 0.0K | - | 2.00 | - |" in text and "- not measured, x: no room" in text


def test_lines_of_scaling_grow_along_their_axis():
    for line in scaling.lines():
        many = scaling.Axes(**{line.axis: 4})
        assert line.case(None).axes is None and line.case(None).batch == line.rows
        assert line.case(many).batch == line.rows * many.data and line.case(many).length % many.context == 0
        assert training_steps.config_of(line.case(None)).max_positions >= line.length
    names = [line.name for line in scaling.lines()]
    assert len(set(names)) == len(names)


def test_a_step_of_many_seconds_is_not_measured_on_a_mesh_of_one(monkeypatch):
    monkeypatch.setattr(scaling.jax, "devices", lambda: [None] * 4)
    counts = {line.length: [axes and axes.devices for axes in scaling.meshes(line)] for line in scaling.lines()}
    assert counts == {2_048: [None, 1, 2, 4], 32_768: [None, 1, 2, 4], 131_072: [None, 2, 4]}
