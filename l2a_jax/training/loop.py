"""The training loop: step, report one step behind, evaluate, save, stop when asked, refuse numbers that are not finite.

The host reads the metrics of step n - 1 after it has sent off step n, so the device never waits for a log file. A
checkpoint is written only when the records up to its step are on disk: a resumed run finds every step exactly once.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from l2a_jax import device
from l2a_jax.data.batch import Batch, TrainingData
from l2a_jax.data.curriculum import Curriculum
from l2a_jax.files import native
from l2a_jax.progress import progress
from l2a_jax.sharding import processes
from l2a_jax.training.checkpoints import BEST, LATEST
from l2a_jax.training.metrics import told
from l2a_jax.training.step import TrainState

log = logging.getLogger("l2a_jax")


class NonFinite(RuntimeError):
    """A loss or gradient that is not finite: `step` (1-based) and its loss; `state` is from before that step.

    `where` is for whoever looks (`diagnose`) to say.
    """

    where: str

    def __init__(self, step: int, loss: float, state: TrainState):
        super().__init__(f"step {step}: the loss or its gradient is not finite (loss {loss})")
        self.step, self.loss, self.state = step, loss, state


class Stopped(Exception):
    """The run was asked to stop and has saved; `step` updates are done (None: training had not begun)."""

    def __init__(self, step: int | None, signal_number: int):
        super().__init__("stopped before the first step" if step is None else f"stopped after step {step}")
        self.step, self.signal_number = step, signal_number


class StopRequest:
    """Turns SIGINT (Ctrl-C), SIGTERM and SIGHUP (a lost connection) into a request that is honoured between steps.

    A second one is answered by saying that the first is being honoured; a third ends the process at once. Python's own
    handlers wait for whatever runs in C++, a compilation above all, so a thread listens, answers, and ends. Under
    `nohup`, which ignores SIGHUP, it stays ignored. While `at_once` is set, when there is no step to finish, a request
    is a KeyboardInterrupt.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, at_once: bool = False):
        self.at_once = at_once
        self.signal_number: int | None = None

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._ask) for number in self._NUMBERS
                          if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write)
        self._listener = threading.Thread(target=self._listen, args=(self._read,), daemon=True)
        self._listener.start()
        return self

    def check(self) -> None:
        """Raises Stopped where a stop was asked for: for the time before the first step, when nothing is to save."""
        if self.signal_number is not None:
            raise Stopped(None, self.signal_number)

    def _ask(self, number, frame):
        if self.signal_number is None:
            self.signal_number = number
        if self.at_once:
            raise KeyboardInterrupt

    def _listen(self, read: int) -> None:
        asked = 0
        while number := os.read(read, 1)[0]:
            if number not in self._previous:
                continue
            asked += 1
            if asked == 3:
                return os._exit(128 + number)
            said = {1: "stopping once the step, save or compilation that runs now is done",
                    2: "still stopping; once more ends the process at once, and what is not saved is lost"}
            with contextlib.suppress(OSError):  # a terminal that is gone
                print(said[asked], file=sys.stderr, flush=True)

    def __exit__(self, *exception):
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")
        self._listener.join()
        os.close(self._read)
        os.close(self._write)


@dataclass(frozen=True)
class Schedule:
    """When to do what, in steps. `accumulate` micro-batches make a step."""

    steps: int
    accumulate: int
    save_every: int
    eval_every: int


def stacked_batch(data: TrainingData, step: int, accumulate: int) -> Batch:
    """The micro-batches of a step (0-based) as one Batch of [A, B, T]: the data position is the step alone. A stage of
    a curriculum has a number of its own."""
    if isinstance(data, Curriculum):
        stage = data.at(step)
        data, accumulate = stage.data, stage.accumulate
    return jax.tree.map(lambda *parts: np.stack(parts), *(data.batch(step * accumulate + a)
                                                          for a in range(accumulate)))


def fit(
    state: TrainState,
    run_step: Callable[[TrainState, Batch], tuple[TrainState, dict]],
    data: TrainingData,
    schedule: Schedule,
    *,
    record: Callable[[dict[str, Any]], None],
    save: Callable[[str, TrainState, dict[str, Any]], None],
    evaluate: Callable[[TrainState], dict[str, Any]],
    best: float = float("inf"),
    stop: StopRequest | None = None,
) -> TrainState:
    """Train from `state.step` to `schedule.steps` and return the last state, saved.

    `record` takes what each step reports, in order; `save` takes a state, its kind and what is kept beside it.
    `evaluate` returns held-out metrics, among them `held_out_loss`, by which the best checkpoint is kept (`best`: the
    lowest so far); one that is not finite is said and recorded, and is never the best. `stop`: a request that is in
    force already (None: one of its own). Raises NonFinite or Stopped; the newest complete checkpoint is whole in
    either case.
    """
    start = int(state.step)
    pending = None
    clock = time.perf_counter()

    def flush(held_out: dict[str, Any]) -> None:
        """Wait for the pending step, check it, and write its record."""
        nonlocal pending, clock
        if pending is None:
            return
        step, metrics = pending
        pending = None
        found = native(jax.device_get(metrics))
        now = time.perf_counter()
        if not found.pop("healthy"):
            raise NonFinite(step, float(found["loss"]), state)
        found = {"step": step, **found, "tokens_per_second": found["tokens"] / (now - clock),
                 "peak_memory_gb": device.peak_memory_gb(), **native(held_out)}
        clock = now
        record(found)
        report(step, told(found, schedule.steps))

    def keep(kind: str) -> None:
        save(kind, state, {"data_position": int(state.step) * schedule.accumulate, "best": best})

    with (contextlib.nullcontext(stop) if stop is not None else StopRequest() as stop,
          progress("training", schedule.steps, start=start) as report):
        for step in range(start + 1, schedule.steps + 1):
            state, metrics = run_step(state, stacked_batch(data, step - 1, schedule.accumulate))
            flush({})
            pending = (step, metrics)
            last = step == schedule.steps
            stopping = processes.stopping(step, stop.signal_number)
            if step % schedule.eval_every == 0 or last:
                held_out = {}
                if bool(metrics["healthy"]):
                    began = time.perf_counter()
                    held_out = evaluate(state)
                    clock += time.perf_counter() - began  # evaluation is not training speed
                flush(held_out)
                loss = float(held_out.get("held_out_loss", math.inf))
                if "held_out_loss" in held_out and not math.isfinite(loss):
                    log.warning("step %d: the held-out loss is not finite (%s); training goes on, and this is not the "
                                "best checkpoint", step, loss)
                elif loss < best:
                    best = loss
                    keep(BEST)
            if step % schedule.save_every == 0 or last or stopping is not None:
                flush({})
                keep(LATEST)
                clock = time.perf_counter()
            if stopping is not None and not last:
                raise Stopped(step, stopping)
    return state
