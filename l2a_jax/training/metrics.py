"""What a run tells: one JSON object a step in `metrics.jsonl`, a line for people, and the curves at the end."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from l2a_jax.errors import needs
from l2a_jax.files import from_plain, plain, reading, whole, write_text, writing
from l2a_jax.shapes import at_least, misfit, number

log = logging.getLogger("l2a_jax")


def read_metrics(path: pathlib.Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records up to `last_step`, by step; numbers that were not finite are floats again.

    A last line that a killed process left unfinished is dropped; other lines that are no records are left out with a
    warning that counts them. No file, no records. UserError where there is one that cannot be read.
    """
    lines, records, bad = [], {}, []
    with reading(path), contextlib.suppress(FileNotFoundError):
        lines = path.read_bytes().split(b"\n")
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
        with writing(self._path):
            try:
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(before)
                raise

    def close(self) -> None:
        self._file.close()


def told(record: dict[str, Any], steps: int) -> str:
    """A record in one line: how far, and the numbers that a person watches."""
    local = f"  local {record['sparsity']:.1%}" if "sparsity" in record else ""
    held_out = f"  held-out {record['held_out_loss']:.4f}" if "held_out_loss" in record else ""
    fitted = "".join(f"  {name} {record[name]:.5f}" for name in ("kl", "saliency") if name in record)
    return (f"step {record['step']}/{steps}  loss {record['loss']:.4f}{fitted}{local}  "
            f"{record['tokens_per_second']:,.0f} tokens/s{held_out}")


def draw_curves(records: list[dict[str, Any]], path: pathlib.Path, title: str = "",
                rate: Callable[[Any], Any] | None = None) -> None:
    """What a run did, over its steps: loss, gradient norm, what stayed local in each layer, penalty and learning rate
    (`rate`: of a step counted from 0). UserError where the picture cannot be written."""
    needs("matplotlib", "eval", "a picture of the curves")
    from matplotlib import cm, colors, ticker
    from matplotlib.figure import Figure

    routed = [record for record in records if record.get("sparsity_per_layer")]
    figure = Figure(figsize=(10, 7), dpi=110, layout="constrained")
    (loss, norm), (local, dials) = figure.subplots(2, 2)
    figure.suptitle(title)

    def points(name: str) -> tuple[list[int], list[float]]:
        found = [(record["step"], record[name]) for record in records if isinstance(record.get(name), (int, float))]
        return [step for step, _ in found], [value for _, value in found]

    def show(axis: Any, values: list[float], log: bool = False) -> None:
        """The range of all but the least and greatest hundredth: one step, the first as a rule, does not set it."""
        values = np.array([value for value in values if np.isfinite(value) and (value > 0 or not log)])
        if len(values) > 20:
            low, high = np.quantile(values, [0.01, 0.99])
            room = 0.05 * (high - low)
            if high > low:
                axis.set_ylim(*((low / 1.2, high * 1.2) if log else (low - room, high + room)))

    loss.plot(*points("loss"), lw=0.8, label="training")
    if any("held_out_loss" in record for record in records):
        loss.plot(*points("held_out_loss"), "o-", ms=4, label="held out")
    loss.set(title="loss", ylabel="nats per token")
    loss.legend()
    show(loss, [*points("loss")[1], *points("held_out_loss")[1]])
    norm.semilogy(*points("grad_norm"), lw=0.8)
    norm.set(title="gradient of what is trained", ylabel="norm, before clipping")
    show(norm, points("grad_norm")[1], log=True)
    if routed:
        layers = np.array([record["sparsity_per_layer"] for record in routed], float).T
        shade = cm.ScalarMappable(colors.Normalize(0, max(len(layers) - 1, 1)), "viridis")
        for index, layer in enumerate(layers):
            local.plot([record["step"] for record in routed], 100 * layer, lw=0.7, color=shade.to_rgba(index))
        local.plot([record["step"] for record in routed], 100 * layers.mean(axis=0), lw=2, color="black", label="mean")
        local.set(title="decisions that are local, by layer", ylabel="% of tokens", ylim=(-2, 102))
        local.legend()
        figure.colorbar(shade, ax=local, label="layer", ticks=ticker.MaxNLocator(integer=True))
    else:
        local.set_axis_off()
    if rate is not None and records:
        steps = np.array([record["step"] for record in records])
        dials.plot(steps, rate(steps - 1), color="tab:blue", label="learning rate")
    dials.set(title="learning rate" + (" and weight of the penalty" if routed else ""), ylabel="learning rate")
    dials.ticklabel_format(axis="y", scilimits=(0, 0))
    if routed:
        weight = dials.twinx()
        weight.plot(*points("penalty_weight"), "--", color="tab:orange")
        weight.set_ylabel("λ, weight of the mean of p² (dashed)")
    for axis in (loss, norm, local, dials):
        axis.set_xlabel("step")
    with whole(path) as temporary:
        figure.savefig(temporary, format="png")
