"""What a run tells: one JSON object a step in `metrics.jsonl`, a progress line or bar, and the curves at the end."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import pathlib
import resource
import sys
import time
from typing import Any

import jax
import numpy as np

from l2a_jax.errors import UserError, needs
from l2a_jax.files import from_plain, plain, whole, write_text
from l2a_jax.shapes import at_least, misfit, number

log = logging.getLogger("l2a_jax")


def read_metrics(path: pathlib.Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records up to `last_step`, by step; numbers that were not finite are floats again.

    A last line that a killed process left unfinished is dropped; other lines that are no records are left out with a
    warning that counts them. No file, no records. UserError where there is one that cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    records, bad = {}, []
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _record(line)
        if record is not None:
            records[record["step"]] = record
        elif place < len(lines):
            bad.append(place)
    if bad:
        log.warning("%s: %d of %d lines are no records and are left out (%s%s); expected an object with a step and its "
                    "loss a line", path, len(bad), len(lines) - (not lines[-1]), "line " if len(bad) == 1 else "lines ",
                    ", ".join(map(str, bad[:5])) + (" ..." if len(bad) > 5 else ""))
    return [records[step] for step in sorted(records) if last_step is None or step <= last_step]


RECORD = {
    "step": at_least(0), "loss": number, "sparsity_per_layer?": [number],
    **{f"{name}?": number for name in ("tokens", "tokens_per_second", "sparsity", "held_out_loss")},
}


def _record(line: bytes) -> dict[str, Any] | None:
    """The record that a line spells; None where it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return from_plain(record) if misfit(record, RECORD) is None else None


def missing_steps(records: list[dict[str, Any]], last_step: int) -> str | None:
    """Which of the steps 1 to `last_step` have no record, in words; None where all have one."""
    missing = sorted(set(range(1, last_step + 1)) - {record["step"] for record in records})
    if not missing:
        return None
    return (f"{len(missing)} of {last_step} steps have no record (the first is step {missing[0]}, the last "
            f"{missing[-1]})")


class MetricsLog:
    """`metrics.jsonl`, one object a step, each step once: records after `start` (the checkpoint's) are written anew.

    UserError where the system refuses; the lines written before stay whole.
    """

    def __init__(self, path: pathlib.Path, start: int):
        self.kept = read_metrics(path, start)
        write_text(path, "".join(json.dumps(plain(record)) + "\n" for record in self.kept))
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        line = (json.dumps(plain(record)) + "\n").encode()
        before = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            raise UserError(f"{self._path} cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        self._file.close()


def peak_memory_gb() -> float:
    """Peak memory of this process in GB: the accelerator's where there is one, else the resident set."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then, so that a log file stays readable."""

    def __init__(self, total: int, start: int, seconds_between_lines: float = 10.0):
        self._total, self._every, self._said = total, seconds_between_lines, 0.0
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
                            console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=start)

    def update(self, record: dict[str, Any]) -> None:
        text = f"loss {record['loss']:.4f}"
        if "sparsity" in record:
            text += f"  sparsity {record['sparsity']:.1%}"
        text += f"  {record['tokens_per_second']:,.0f} tokens/s"
        if "held_out_loss" in record:
            text += f"  held-out {record['held_out_loss']:.4f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=text)
        elif time.monotonic() - self._said >= self._every or record["step"] == self._total:
            self._said = time.monotonic()
            print(f"step {record['step']}/{self._total}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def draw_curves(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Loss, routing and gradient norm over steps, as one picture. UserError where it cannot be written."""
    needs("matplotlib", "eval", "a picture of the curves").use("Agg")
    import matplotlib.pyplot as plt

    routed = [record for record in records if record.get("sparsity_per_layer")]
    figure, axes = plt.subplots(1, 3 if routed else 2, figsize=(15 if routed else 10, 4), constrained_layout=True)

    def points(name):
        return zip(*[(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))] or [((), ())],
                   strict=True)

    axes[0].plot(*points("loss"), lw=1, label="training")
    if any("held_out_loss" in record for record in records):
        axes[0].plot(*points("held_out_loss"), "o-", ms=3, label="held out")
    axes[0].set(title="loss (nats per token)", xlabel="step")
    if records:
        axes[0].legend()
    axes[1].semilogy(*points("grad_norm"), lw=1)
    axes[1].set(title="gradient norm of what is trained", xlabel="step")
    if routed:
        steps = [record["step"] for record in routed]
        layers = np.array([record["sparsity_per_layer"] for record in routed]).T
        for index, layer in enumerate(layers):
            axes[2].plot(steps, layer, lw=0.8, color=plt.cm.viridis(index / max(len(layers) - 1, 1)))
        axes[2].plot(steps, layers.mean(axis=0), lw=2, color="black", label="mean")
        axes[2].set(title="share of tokens not routed, by layer (dark: first)", xlabel="step", ylim=(-0.02, 1.02))
        axes[2].legend()
    try:
        with whole(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    finally:
        plt.close(figure)
