"""Asking a run to stop: by which signals, when it is honoured, and what a second and a third one do."""

import os
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.data.recall import RecallCorpus
from l2a_jax.training.checkpoints import BEST, LATEST
from l2a_jax.training.loop import Schedule, Stopped, StopRequest, fit
from l2a_jax.training.step import TrainState

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class Kept:
    """Records and checkpoints in memory."""

    def __init__(self):
        self.records, self.saved = [], []

    def write(self, record):
        self.records.append(record)

    def save(self, kind, state, metadata):
        self.saved.append((kind, int(state.step), metadata["best"]))


def train(kept, steps=10, held_out=1.0, at=lambda step: None, **schedule):
    """`fit` of nothing: `at(step)` happens within the step."""

    def step(state, batch):
        at(int(state.step) + 1)
        return state._replace(step=state.step + 1), {
            "loss": np.float32(1.0), "grad_norm": np.float32(1.0), "tokens": np.int32(4), "healthy": np.bool_(True)}

    state = TrainState(jnp.int32(0), {}, (), jnp.ones((), bool))
    plan = Schedule(steps, 1, **{"save_every": 100, "eval_every": 5, **schedule})
    losses = iter(held_out) if isinstance(held_out, list) else None
    return fit(state, step, RecallCorpus(128, 1), plan, record=kept.write, save=kept.save,
               evaluate=lambda state: {"held_out_loss": held_out if losses is None else next(losses)})


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_that_ends_a_session_saves_first(number):
    kept, before = Kept(), [signal.getsignal(one) for one in SIGNALS]
    with pytest.raises(Stopped) as stopped:
        train(kept, at=lambda step: send(number) if step == 3 else None)
    assert (stopped.value.step, stopped.value.signal_number) == (3, number)
    assert kept.saved == [(LATEST, 3, float("inf"))] and [r["step"] for r in kept.records] == [1, 2, 3]
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_under_nohup_a_lost_connection_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        kept = Kept()
        train(kept, at=lambda step: send(signal.SIGHUP) if step == 3 else None)
        assert len(kept.records) == 10
    finally:
        signal.signal(signal.SIGHUP, before)


def wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_second_one_is_answered_and_a_third_ends_the_process(monkeypatch, capfd):
    ended, said = [], []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopRequest() as stop:
        for count, words in ((1, "stopping once"), (2, "still stopping; once more ends the process")):
            send(signal.SIGINT)
            wait_for(lambda words=words: (said.append(capfd.readouterr().err), words in "".join(said))[1])
            assert stop.signal_number == signal.SIGINT and not ended, count
        send(signal.SIGTERM)
        wait_for(lambda: ended)
    assert ended == [128 + signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_before_there_is_a_step_a_request_is_honoured_at_once_or_at_the_next_check(number):
    with StopRequest(at_once=True) as stop:
        with pytest.raises(KeyboardInterrupt):
            send(number)
            time.sleep(1)
        assert stop.signal_number == number
    with StopRequest() as stop:
        stop.check()
        send(number)
        with pytest.raises(Stopped) as stopped:
            stop.check()
    assert stopped.value.step is None and stopped.value.signal_number == number


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), float("-inf")])
def test_a_held_out_loss_that_is_not_finite_is_said_and_recorded_and_the_run_goes_on(value, caplog):
    kept = Kept()
    train(kept, held_out=[2.0, value, 1.5], steps=15)
    assert f"step 10: the held-out loss is not finite ({float(value)})" in caplog.text
    assert str(kept.records[9]["held_out_loss"]) == str(float(value))
    assert kept.saved == [(BEST, 5, 2.0), (BEST, 15, 1.5), (LATEST, 15, 1.5)]
