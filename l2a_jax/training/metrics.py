"""What a run tells: one JSON object a step in `metrics.jsonl`, a progress line or bar, and the curves at the end."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import sys
import time
from typing import Any

import jax
import numpy as np

from l2a_jax.files import plain


def read_metrics(path: pathlib.Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records up to `last_step`; a last line that a killed process left unfinished is dropped."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if last_step is None or record["step"] <= last_step:
                records.append(record)
    return records


class MetricsLog:
    """`metrics.jsonl`, one object a step, each step once: records after `start` (the checkpoint's) are rewritten."""

    def __init__(self, path: pathlib.Path, start: int):
        kept = read_metrics(path, start)
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, path)
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(plain(record)) + "\n")
        self._file.flush()

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
    """Loss, routing and gradient norm over steps, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    routed = bool(records) and "sparsity_per_layer" in records[0]
    figure, axes = plt.subplots(1, 3 if routed else 2, figsize=(15 if routed else 10, 4), constrained_layout=True)
    steps = [record["step"] for record in records]
    axes[0].plot(steps, [record["loss"] for record in records], lw=1, label="training")
    held = [(r["step"], r["held_out_loss"]) for r in records if "held_out_loss" in r]
    if held:
        axes[0].plot(*zip(*held, strict=True), "o-", ms=3, label="held out")
    axes[0].set(title="loss (nats per token)", xlabel="step")
    axes[0].legend()
    axes[1].semilogy(steps, [record["grad_norm"] for record in records], lw=1)
    axes[1].set(title="gradient norm of what is trained", xlabel="step")
    if routed:
        layers = np.array([record["sparsity_per_layer"] for record in records]).T
        for index, layer in enumerate(layers):
            axes[2].plot(steps, layer, lw=0.8, color=plt.cm.viridis(index / max(len(layers) - 1, 1)))
        axes[2].plot(steps, layers.mean(axis=0), lw=2, color="black", label="mean")
        axes[2].set(title="share of tokens not routed, by layer (dark: first)", xlabel="step", ylim=(-0.02, 1.02))
        axes[2].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
