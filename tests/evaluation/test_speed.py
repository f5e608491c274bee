"""What the speed tables are made of, without a clock: medians over rounds, and peers that fail in some of them."""

from __future__ import annotations

from l2a_jax.evaluation import speed
from l2a_jax.evaluation.speed_cases import SpeedCase


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
