"""Several runs' rivals in one figure: what each way of spending global attention keeps, reads and costs, over how much
of it is local.

Every run gives the curve of its own router; the other choices are those of the first run, so that it stands beside its
own rivals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2a_jax import fields
from l2a_jax.errors import UserError, shown
from l2a_jax.evaluation import intervals
from l2a_jax.files import check_writable, read_json
from l2a_jax.research import tables
from l2a_jax.research.rivals.options import FrontierOptions
from l2a_jax.research.rivals.report import LOOKS, NAMES
from l2a_jax.shapes import each, nullable, require, share

NAME = "frontier.png"
SHAPE = {"source": str, "context": int, "window": int, "sinks": int, "text": {"name": str, "hash": str},
         "lengths": [int], "rows": [{
             "name": str, "density": share, "own": bool, "kept": nullable(float),
             "kept_95": nullable(intervals.INTERVAL), "prefill_ms?": float,
             "ruler?": each({"local": share, "scores": [float]})}]}
"""What is read of a `rivals.json`."""
SAME = ("context", "window", "sinks", "text", "lengths", "ruler_items", "answers")
"""What two of them must share, so that a number means the same in both."""
ROUTERS = (("#0072B2", "o", "solid"), ("#56B4E9", "P", "dashed"), ("#332288", "h", "dashdot"),
           ("#88CCEE", "8", "dotted"))
"""Of the routers, one after another: blues, each with a marker and a stroke of its own."""


def compare(options: FrontierOptions) -> Path:
    """Draw the figure; returns its file. UserError where a file is no rivals.json, or is about something else than the
    first."""
    fields.check(options)
    if options.names and len(options.names) != len(options.compare):
        raise UserError(f"--names gives {len(options.names)} names for {len(options.compare)} files of --compare; "
                        "expected one for each")
    if len(options.compare) > len(ROUTERS):
        raise UserError(f"--compare names {len(options.compare)} files; expected at most {len(ROUTERS)}, which can be "
                        "told apart")
    results = [read_json(path) for path in options.compare]
    for path, result in zip(options.compare, results, strict=True):
        require(result, SHAPE, str(path))
        for key in SAME:
            mine, first = (_compared(one, key) for one in (result, results[0]))
            if mine != first:
                raise UserError(f"{path}: {key} is {shown(mine)}, and that of {options.compare[0]} is {shown(first)}; "
                                "numbers of different ones do not belong in one figure")
    check_writable(options.out, "--out")
    names = options.names or [f"router of {Path(result['source']).name}" for result in results]
    draw(results, names, options.out / NAME)
    return options.out / NAME


def _compared(result: dict[str, Any], key: str) -> Any:
    return result["text"]["hash"] if key == "text" else result.get(key)


def draw(results: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """Worth kept in a panel of the whole width, below it RULER and prefill, where they were measured."""
    plt = tables.pyplot()
    first = results[0]
    series = [(name, [row for row in result["rows"] if row["name"] == "learned"], look)
              for name, result, look in zip(names, results, ROUTERS, strict=False)]
    series += [(NAMES[name], [row for row in first["rows"] if row["name"] == name], (*look, "solid"))
               for name, look in LOOKS.items() if name != "learned"]
    figure = plt.figure(figsize=(7.27, 7.6))
    grid = figure.add_gridspec(2, 2, height_ratios=(1.15, 1))
    below = "decisions that are local, %"
    worth = "share kept of the worth of\nglobal attention (outside 0\nto 1 on a smaller scale)"
    panels = [(grid[0, :], _kept, below, worth),
              (grid[1, 0], _ruler, f"{below}, of its prompts", f"RULER at {_lengths(first)}, mean score, %"),
              (grid[1, 1], _prefill, below, f"prefill of {first['context']:,} tokens, ms")]
    handles: dict[str, Any] = {}
    axes = [figure.add_subplot(place) for place, *_ in panels]
    axes[0].set_yscale("function", functions=(_pressed, _released))
    axes[0].set_yticks([-0.5, 0, 0.25, 0.5, 0.75, 1, 2, 3])
    axes[0].axhline(1, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
    for axis, (_, point, under, up) in zip(axes, panels, strict=True):
        for name, rows, look in series:
            handles |= _series(axis, name, rows, point, look)
        axis.set_xlabel(under, fontsize=9)
        axis.set_ylabel(up, fontsize=9)
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.3)
        if not axis.has_data():
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", fontsize=9)
    figure.legend(handles.values(), handles, fontsize=9, ncols=3, loc="lower center", frameon=False)
    figure.suptitle(f"{first['text']['name']}, windows of {first['context']:,} tokens; a local token sees "
                    f"{first['window']:,} and {first['sinks']} sinks\nlines: 95 % intervals over windows, and over "
                    "prompts; ringed: the router's own density", fontsize=9)
    figure.tight_layout(rect=(0, 0.03 + 0.025 * -(-len(handles) // 3), 1, 1))
    tables.write_figure(figure, path)


def _pressed(y: Any) -> Any:
    """Between 0 and 1 as it is, beyond a quarter of that, so that an oracle leaves the others their room."""
    inside = np.clip(y, 0, 1)
    return inside + (y - inside) / 4


def _released(y: Any) -> Any:
    inside = np.clip(y, 0, 1)
    return inside + (y - inside) * 4


def _lengths(result: dict[str, Any]) -> str:
    return " and ".join(f"{length:,}" for length in result["lengths"]) or "no length"


def _kept(row: dict[str, Any]) -> tuple[float, float | None, Any]:
    return 1 - row["density"], row["kept"], row["kept_95"]


def _ruler(row: dict[str, Any]) -> tuple[float, float | None, Any]:
    if not row.get("ruler"):
        return 0.0, None, None
    of_tasks = row["ruler"].values()
    scores = [100 * score for one in of_tasks for score in one["scores"]]
    return sum(one["local"] for one in of_tasks) / len(of_tasks), *intervals.paired_items(scores, [0.0] * len(scores))


def _prefill(row: dict[str, Any]) -> tuple[float, float | None, Any]:
    return 1 - row["density"], row.get("prefill_ms"), None


def _series(axis: Any, name: str, rows: Sequence[dict[str, Any]], point: Any, look: tuple[str, str, str]
            ) -> dict[str, Any]:
    """One choice at every density that was measured; what the legend shows of it."""
    colour, marker, stroke = look
    points = [(100 * local, up, interval, row["own"]) for row in rows for local, up, interval in [point(row)]
              if up is not None]
    if not points:
        return {}
    points.sort(key=lambda one: one[0])
    x, y, bounds, own = zip(*points, strict=True)
    line, = axis.plot(x, y, color=colour, marker=marker, linestyle=stroke, markersize=5, linewidth=1.3)
    for place, interval in zip(x, bounds, strict=True):
        if interval is not None:
            axis.vlines(place, *interval, color=colour, linewidth=0.9, alpha=0.6)
    if rows[0]["name"] == "learned":
        ringed = [(a, b) for a, b, is_own in zip(x, y, own, strict=True) if is_own]
        axis.scatter(*zip(*ringed, strict=True), s=90, facecolors="none", edgecolors=colour, linewidths=1.2)
    return {name: line}
