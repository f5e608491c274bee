"""Training steps over several devices beside one: tokens/s, what of a straight line is reached, memory a device.

Over `data` every device has as many rows as the one has alone; over `context` a row is divided. One device stands there
twice where a step is short, without a mesh and as a mesh of one: the difference is what dealing costs where there is
nothing to deal. Random weights and tokens; `drift` is the largest difference of a loss from that of one device over the
same rows and steps, relative, in bfloat16, where sums in another order round otherwise.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from l2a_jax.research import tables
from l2a_jax.research.speed.timing import median_ms
from l2a_jax.research.speed.training_steps import Step, StepCase
from l2a_jax.sharding.axes import Axes

log = logging.getLogger("l2a_jax.speed")
COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Line:
    """Cases that differ in their mesh alone. `axis`: the one that grows; `rows` are those of one device."""

    regime: str
    axis: str
    rows: int
    length: int
    model: str = "qwen2.5-0.5b"
    window: int = 512
    remat: str = "elementwise"
    unroll: bool = True
    routed: float = 0.2
    steps: int = 12
    repeats: int = 5
    counts: tuple[int, ...] = COUNTS

    @property
    def name(self) -> str:
        """Model, regime, axis and size."""
        return f"{self.model} {self.regime} over {self.axis}, {self.rows} x {self.length:,}"

    def case(self, axes: Axes | None) -> StepCase:
        """The step on a mesh; rows grow with its axis `data`."""
        rows = self.rows * (1 if axes is None else axes.data)
        return StepCase(self.regime, self.model, rows, self.length, self.window, self.remat, self.routed, self.unroll,
                        axes=axes)


def lines() -> list[Line]:
    """Short rows over `data`, long ones over `context`."""
    small = [Line(regime, "data", 4, 2_048) for regime in ("router_only", "l2a_ft", "full_ft")]
    long = {"remat": "layer", "unroll": False, "window": 1_024, "steps": 3}
    # A step takes a quarter of a minute on one device, and what dealing it out to itself costs the shorter rows tell.
    longest = {**long, "steps": 2, "repeats": 2, "counts": COUNTS[1:]}
    return [*small, Line("router_strict", "context", 1, 32_768, **long),
            Line("router_strict", "context", 1, 131_072, **longest),
            Line("l2a_ft", "context", 1, 32_768, **long),
            Line("l2a_ft", "data", 2, 2_048, "qwen2.5-1.5b", remat="layer", unroll=False),
            Line("router_strict", "context", 1, 131_072, "qwen2.5-1.5b", **longest)]


def meshes(line: Line) -> list[Axes | None]:
    """No mesh, and those that the devices at hand allow."""
    return [None, *(Axes(**{line.axis: count}) for count in line.counts if count <= len(jax.devices()))]


def measure(case: StepCase, steps: int, repeats: int) -> dict:
    """Milliseconds a step (the median of `repeats`), the losses of its first `steps` steps, and bytes a device by the
    compiler's own figures."""
    step = Step(case)
    losses = [float(step.run()["loss"]) for _ in range(steps)]
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"{case.name}: losses {losses}")
    each = 4 if case.length < 32_768 else 1  # a long row is seconds: its step is not one of many in flight
    ms = median_ms(step.run, lambda metrics: float(metrics["loss"]), repeats=repeats, each=each)
    return {"ms": ms, "tokens_per_second": case.batch * case.length / ms * 1e3, "memory_gb": step.bytes / 1e9,
            "compile_seconds": step.compile_seconds, "losses": losses}


def compared(rows: list[dict]) -> list[dict]:
    """Each row beside that of one device without a mesh: the share of as many times its speed as there are devices, and
    the drift where both had the same rows. None where that one could not be measured."""
    alone = next((row for row in rows if row["mesh"] is None), None)
    if alone is None:
        return [{**row, "of_linear": None, "drift": None} for row in rows]
    return [{**row, "of_linear": row["tokens_per_second"] / (alone["tokens_per_second"] * row["devices"]),
             "drift": None if row["rows"] != alone["rows"] else max(
                 abs(a / b - 1) for a, b in zip(row["losses"], alone["losses"], strict=True))} for row in rows]


def markdown(result: dict) -> str:
    """The lines as one table."""
    def told(value, spelling):
        return "-" if value is None else format(value, spelling)

    rows = [[name, row["mesh"] or "none", f"{row['ms']:.1f}", f"{row['tokens_per_second'] / 1e3:.1f}K",
             told(row["of_linear"], ".2f"), f"{row['memory_gb']:.2f}", told(row["drift"], ".0e")]
            for name, found in result["lines"].items() for row in found]
    return "\n".join([
        "# Training steps over several devices", "",
        f"{tables.said(result)} Medians, bfloat16; random weights and tokens, one document a row, AdamW with float32 "
        "masters. *Of linear*: tokens/s over those of one device without a mesh times the devices. Memory is the "
        "compiled step's, on each device. *Drift*: the largest relative difference of a loss from one device's.", "",
        *tables.grid(["step", "mesh", "ms", "tokens/s", "of linear", "GB a device", "drift"], rows),
        *(f"- not measured, {name}: {why}" for name, why in result["failed"].items())]).rstrip() + "\n"


def main(only: str, out: Path | None) -> None:
    """Measure the lines in whose name `only` is found; scaling.json and scaling.md after every case."""
    result: dict = {**tables.heading(), "lines": {}, "failed": {}}
    for line in tables.chosen(lines(), only):
        found: list[dict] = []
        for axes in meshes(line):
            case = line.case(axes)
            try:
                row = measure(case, line.steps, line.repeats)
            except jax.errors.JaxRuntimeError as error:
                result["failed"][case.name] = tables.reason(error)
                continue
            found.append({"mesh": None if axes is None else str(axes), "devices": 1 if axes is None else axes.devices,
                          "rows": case.batch, **row})
            result["lines"][line.name] = compared(found)
            log.info("%s", json.dumps({"case": case.name, "ms": row["ms"], "memory_gb": row["memory_gb"]}))
            tables.write(out, "scaling", result, markdown(result))
    print(markdown(result), flush=True)
