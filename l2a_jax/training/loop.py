"""The training loop: step, report one step behind, evaluate, save, stop when asked, refuse numbers that are not finite.

The host reads the metrics of step n - 1 after it has sent off step n, so the device never waits for a log file. A
checkpoint is written only when the records up to its step are on disk: a resumed run finds every step exactly once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from l2a_jax.data.batch import Batch, TrainingData
from l2a_jax.files import plain
from l2a_jax.training.checkpoint import BEST, LATEST
from l2a_jax.training.metrics import Progress, peak_memory_gb
from l2a_jax.training.step import TrainState


class NonFinite(RuntimeError):
    """A loss or gradient that is not finite: `step` (1-based) and its loss; `state` is from before that step."""

    def __init__(self, step: int, loss: float, state: TrainState):
        super().__init__(f"step {step}: the loss or its gradient is not finite (loss {loss})")
        self.step, self.loss, self.state = step, loss, state


class Stopped(Exception):
    """The run was asked to stop (SIGINT or SIGTERM) and has saved; `step` updates are done."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped after step {step}")
        self.step, self.signal_number = step, signal_number


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request that the loop honours between steps; a second one kills."""

    def __enter__(self):
        self.signal_number = None
        self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Schedule:
    """When to do what, in steps. `accumulate` micro-batches make a step."""

    steps: int
    accumulate: int
    save_every: int
    eval_every: int


@runtime_checkable
class Records(Protocol):
    """Where the records go, one a step in order: `metrics.MetricsLog`, or a list in memory."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Saves(Protocol):
    """Where states go: `checkpoint.Checkpoints`, or nowhere."""

    def save(self, kind: str, state: TrainState, metadata: dict[str, Any]) -> None: ...


def stacked_batch(data: TrainingData, step: int, accumulate: int) -> Batch:
    """The micro-batches of a step (0-based) as one Batch of [A, B, T]: the data position is the step alone."""
    return jax.tree.map(lambda *parts: np.stack(parts), *(data.batch(step * accumulate + a)
                                                          for a in range(accumulate)))


def fit(
    state: TrainState,
    run_step: Callable[[TrainState, Batch], tuple[TrainState, dict]],
    data: TrainingData,
    schedule: Schedule,
    *,
    log: Records,
    checkpoints: Saves,
    evaluate: Callable[[TrainState], dict[str, Any]],
    metadata: dict[str, Any],
    best: float = float("inf"),
) -> TrainState:
    """Train from `state.step` to `schedule.steps` and return the last state, saved.

    `evaluate` returns held-out metrics, among them `held_out_loss`, by which the best checkpoint is kept (`best`: the
    lowest so far). Raises NonFinite or Stopped; the newest complete checkpoint is whole in either case.
    """
    start = int(state.step)
    progress = Progress(schedule.steps, start)
    pending = None
    saved = None
    clock = time.perf_counter()

    def flush(held_out: dict[str, Any]) -> None:
        """Wait for the pending step, check it, and write its record."""
        nonlocal pending, clock
        if pending is None:
            return
        step, metrics = pending
        pending = None
        record = plain(jax.device_get(metrics))
        now = time.perf_counter()
        healthy = record.pop("healthy")
        if not healthy:
            raise NonFinite(step, float(record["loss"]), state)
        record["tokens_per_second"] = record["tokens"] / (now - clock)
        clock = now
        record = {"step": step, **record, "peak_memory_gb": peak_memory_gb(), **plain(held_out)}
        log.write(record)
        progress.update(record)

    def save(kind: str) -> None:
        checkpoints.save(kind, state, {**metadata, "data_position": int(state.step) * schedule.accumulate,
                                       "best": best})

    try:
        with StopRequest() as stop:
            for done in range(start, schedule.steps):
                batch = stacked_batch(data, done, schedule.accumulate)
                state, metrics = run_step(state, batch)
                flush({})
                step = done + 1
                pending = (step, metrics)
                last = step == schedule.steps
                stopping = stop.signal_number is not None
                if step % schedule.eval_every == 0 or last:
                    if bool(metrics["healthy"]):
                        began = time.perf_counter()
                        held_out = evaluate(state)
                        clock += time.perf_counter() - began  # evaluation is not training speed
                    else:
                        held_out = {}
                    flush(held_out)
                    if held_out.get("held_out_loss", float("inf")) < best:
                        best = float(held_out["held_out_loss"])
                        save(BEST)
                if step % schedule.save_every == 0 or last or stopping:
                    flush({})
                    save(LATEST)
                    saved = step
                    clock = time.perf_counter()
                if stopping and not last:
                    raise Stopped(saved, stop.signal_number)
    finally:
        progress.close()
        log.close()
    return state
