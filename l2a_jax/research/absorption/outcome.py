"""What an experiment found, as JSON, as markdown tables (measured beside reported), and as a plot."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from l2a_jax.files import check_file
from l2a_jax.research import tables


def over_seeds(values: Any) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1), None of a single value."""
    values = np.asarray(values, float).reshape(-1)
    return float(values.mean()), float(values.std(ddof=1)) if values.size > 1 else None


@dataclass
class Cell:
    """One measured quantity over the seeds, and what was reported for it."""

    values: Any
    reported: str = ""
    digits: int = 2

    def text(self) -> str:
        """Mean and standard deviation over seeds; a vast mean in powers of ten."""
        mean, spread = over_seeds(self.values)
        style = f".{self.digits}f" if abs(mean) < 1e6 else ".3g"
        return f"{mean:{style}}" if spread is None else f"{mean:{style}} ± {spread:{style}}"

    def plain(self) -> dict[str, Any]:
        """As it stands in a file."""
        mean, spread = over_seeds(self.values)
        return {"mean": mean, "sd": spread, "seeds": np.asarray(self.values, float).reshape(-1),
                **({"reported": self.reported} if self.reported else {})}


@dataclass
class Table:
    """Rows of cells: {row: {column: Cell or text}}."""

    title: str
    rows: dict[str, dict[str, Cell | str]] = field(default_factory=dict)
    note: str = ""


@dataclass
class Panel:
    """A picture: series of (x, mean, deviation); x is text for bars and numbers for lines."""

    title: str
    ylabel: str
    xlabel: str = ""
    series: dict[str, list[tuple[Any, float, float]]] = field(default_factory=dict)
    log: bool = False

    def add(self, series: str, x: Any, values: Any) -> None:
        """Append a point from values over seeds."""
        mean, spread = over_seeds(values)
        self.series.setdefault(series, []).append((x, mean, spread or 0.0))


@dataclass
class Report:
    """An experiment's outcome."""

    name: str
    title: str
    tables: list[Table]
    panels: list[Panel]
    notes: list[str] = field(default_factory=list)


def bars(title: str, ylabel: str, table: Table, column: str, log: bool = False) -> Panel:
    """A column of a table as bars."""
    panel = Panel(title, ylabel, log=log)
    for row, cells in table.rows.items():
        if isinstance(cells.get(column), Cell):
            panel.add(column, row, cells[column].values)
    return panel


def markdown(report: Report, setting: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"# {report.title}", "", str(setting["text"]), ""]
    for table in report.tables:
        lines += [f"## {table.title}", "", *_lines(table), *([table.note, ""] if table.note else [])]
    lines += [f"- {note}" for note in report.notes]
    return "\n".join(lines).rstrip() + "\n"


def _lines(table: Table) -> list[str]:
    """A table in markdown, a column of reported figures beside each that has any."""
    columns = list(dict.fromkeys(column for cells in table.rows.values() for column in cells))
    reported = {column for cells in table.rows.values() for column, cell in cells.items()
                if isinstance(cell, Cell) and cell.reported}
    head, rows = [""], [[row] for row in table.rows]
    for column in columns:
        head += [column, *([f"{column}, reported"] if column in reported else [])]
        for entries, cells in zip(rows, table.rows.values(), strict=True):
            cell = cells.get(column, "")
            entries.append(cell.text() if isinstance(cell, Cell) else cell)
            if column in reported:
                entries.append(cell.reported if isinstance(cell, Cell) else "")
    return tables.grid(head, rows)


def draw(report: Report, path: pathlib.Path) -> None:
    """All panels, two in a row, with deviations: curves where x is a number, a point a line where it is a name."""
    plt, height = tables.pyplot(), -(-len(report.panels) // 2)
    names = max((len(points) for panel in report.panels for points in panel.series.values()), default=0)
    figure, axes = plt.subplots(height, min(2, len(report.panels)), figsize=(8, max(3.2, 0.4 * names + 1.2) * height),
                                squeeze=False, constrained_layout=True)
    for axis in axes.flat[len(report.panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, report.panels, strict=False):
        for index, (name, points) in enumerate(panel.series.items()):
            x, mean, spread = zip(*points, strict=True)
            if isinstance(x[0], str):
                axis.errorbar(mean, range(len(x)), xerr=spread, marker="o", ls="none", capsize=3, color=tables.BLUE)
                axis.set_yticks(range(len(x)), [label.removeprefix("... ").replace("_", " ") for label in x])
                axis.set(ylim=(len(x) - 0.5, -0.5), xlabel=panel.ylabel)
                axis.grid(axis="y", lw=0.3)
                if min(mean) <= 0 <= max(mean) or "nats" in panel.ylabel:
                    axis.axvline(0, color="grey", lw=0.8)
            else:
                axis.errorbar(x, mean, yerr=spread, marker="os^Dv"[index % 5], capsize=3,
                              label=name.replace("_", " "), color=tables.COLOURS[index % len(tables.COLOURS)])
                axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        named = all(isinstance(points[0][0], str) for points in panel.series.values())
        means = [mean for points in panel.series.values() for _, mean, _ in points]
        if panel.log and max(means) > 10 * min(means):  # within a decade a plain axis has the readable ticks
            (axis.set_xscale if named else axis.set_yscale)("log")
        if not named and len(panel.series) > 1:
            axis.legend(fontsize=9)
        axis.set_title(panel.title.removeprefix("... ").capitalize() if panel.title.startswith("... ")
                       else panel.title, fontsize=11, wrap=True)
    tables.write_figure(figure, path)


def write(report: Report, setting: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """`absorption_NAME.json`, `.md` and `.png` in `folder`."""
    stem = f"absorption_{report.name}"
    found = [{"title": table.title, "note": table.note, "rows": {row: {
        column: cell.plain() if isinstance(cell, Cell) else cell for column, cell in cells.items()}
        for row, cells in table.rows.items()}} for table in report.tables]
    tables.write(folder, stem, {"experiment": report.name, "title": report.title,
                                **{name: value for name, value in setting.items() if name != "text"},
                                "tables": found, "notes": report.notes}, markdown(report, setting))
    draw(report, folder / f"{stem}.png")
    return [folder / f"{stem}.{kind}" for kind in ("json", "md", "png")]


def check_place(name: str, folder: pathlib.Path) -> None:
    """UserError where a report of this name could not be written in `folder`: found out before anything is trained."""
    for kind in ("json", "md", "png"):
        check_file(folder / f"absorption_{name}.{kind}", "--out")


def perplexity(nll: Any) -> np.ndarray:
    """exp of nats per token, capped so that a ruined model still prints."""
    return np.exp(np.minimum(np.asarray(nll, float), 100.0))


def mean_text(values: Sequence[float]) -> str:
    """A short mean for notes."""
    return f"{float(np.mean(values)):.4g}"
