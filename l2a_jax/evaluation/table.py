"""The main results table: one row a run, under it what the study reported, as markdown and as JSON.

Every measured number carries its 95 % interval and its sample count. With a baseline, differences are paired: over the
same windows for perplexity, over the same items for the benchmarks, which tells far smaller differences from chance.
"""

from __future__ import annotations

import itertools
import math
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from l2a_jax import commands
from l2a_jax.data.counts import format_count
from l2a_jax.errors import UserError
from l2a_jax.evaluation import registry
from l2a_jax.evaluation.columns import Column
from l2a_jax.evaluation.results import FILE, read_results
from l2a_jax.files import check_file, write_json, write_text

SOURCE = "T. Hertel, Testing Conditional Attention Routing at Consumer Scale, 21 April 2026"
"""What stands beside our numbers. Its text, checkpoints, window and penalty were not published, so a difference in
perplexity may be one of texts; nearly all of its task scores are multiples of 0.002, about 500 items each."""
Reported = namedtuple("Reported", "size regime data trained perplexity hellaswag piqa arc_challenge needle")
"""A row of the study. Scores are shares of 1, `needle` as it was printed; None: not reported."""
REPORTED = (
    Reported("qwen2.5-0.5b", "baseline", None, None, 11.52, 0.391, 0.700, 0.289, "60-80%"),
    Reported("qwen2.5-0.5b", "router", "diverse", "65K", 22.38, 0.354, 0.688, 0.234, "0-20%"),
    Reported("qwen2.5-0.5b", "l2a_ft", "diverse", "88M", 60.83, 0.368, 0.674, 0.236, "0%"),
    Reported("qwen2.5-0.5b", "full_ft", "diverse", "538M", 39.21, 0.362, 0.668, 0.232, "0%"),
    Reported("qwen2.5-1.5b", "baseline", None, None, 8.47, 0.492, 0.750, 0.358, "80%"),
    Reported("qwen2.5-1.5b", "router", "diverse", "130K", 13.91, 0.382, 0.718, 0.284, "0%"),
    Reported("qwen2.5-1.5b", "l2a_ft", "diverse", "308M", 21.21, None, None, None, "collapsed"),
    Reported("qwen2.5-3b", "router", "WikiText", "65K", 8.00, 0.452, 0.766, 0.354, "80%"),
)
REGIMES = {"baseline": "baseline", "router_strict": "router", "router_only": "router", "l2a_ft": "l2a_ft",
           "l2a_paper": "l2a_ft", "full_ft": "full_ft"}
"""Our regimes as the study's; others have no row there."""
def columns(names: Iterable[str]) -> list[tuple[str, Column]]:
    """(task, column) of every task that has one, these `names` among them, in the order of the table."""
    found = [(name, column) for name in dict.fromkeys((*registry.TASKS, *names))
             for column in getattr(registry.module(name), "columns", lambda name: ())(name)]
    return sorted(found, key=lambda one: one[1].about)


_RUN = {f"{name}?": float for name in ("trained_parameters", "tokens_seen", "tokens_per_trained_parameter")}
TABLE = {"baseline?": str, "reported_by": str, "tasks?": [str], "rows": [{
    "run": str, "regime": str, "route?": str, "notes": [str], **_RUN,
    **{f"{column.key}?": column.shape for _, column in columns(())},
    "reported?": {"regime": str, "data?": str, "trained?": str, "perplexity": float, "needle": str,
                  **{f"{task}?": float for task in Reported._fields[5:-1]}}}]}
"""What `markdown` needs of a table that was read from a file: what `make_table` made, each key there or null."""


def match(size: str | None, regime: str) -> Reported | None:
    """The study's row for a model size and a regime of ours, where it has one."""
    return next((row for row in REPORTED if row.size == size and row.regime == REGIMES.get(regime)), None)


def load(source: str | Path) -> tuple[str, dict[str, Any]]:
    """(name, results) of a folder with an `eval.json`, or of such a file. UserError where there is none."""
    path = Path(source).expanduser()
    file = path / FILE if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{source} has no {FILE}; run {commands.spelled('eval/run.py')} on it first")
    name = file.parent.name + ("" if file.name == FILE else f" ({file.stem.removeprefix('eval-')})")
    return name, read_results(file)


def make_table(runs: list[tuple[str, dict[str, Any]]], baseline: tuple[str, dict[str, Any]] | None = None) -> dict:
    """{"rows": [...], "baseline", "reported_by"}: every number of the table, None where a task was not run. `tasks`
    are those of lm-eval's in it that the registry does not name."""
    run = dict.fromkeys(name for _, found in runs for name in found["tasks"])
    shown = [(task, column) for task, column in columns(run) if column.always or task in run]
    others = [name for name in run if name not in registry.TASKS]
    return {"rows": [_row(name, found, baseline, shown) for name, found in runs],
            "baseline": None if baseline is None else baseline[0], "reported_by": SOURCE,
            **({"tasks": others} if others else {})}


def markdown(table: dict[str, Any]) -> str:
    """The table for a page; the study's row stands in italics under the run that it belongs to."""
    head, *rows = _rows(table)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", *_notes(table)]) + "\n"


def plain(table: dict[str, Any], width: int | None = None) -> str:
    """The table for a terminal: what no run has is left out; a column a run where a line a run would be wider than
    `width` characters."""
    rows = [[cell.replace("*", "").replace("<br>", "\n") for cell in row] for row in _rows(table)]
    columns = [column for column in zip(*rows, strict=True) if set(column[1:]) - {"-", ""}]
    lines = _aligned(list(zip(*columns, strict=True)))
    if width is not None and max(map(len, lines)) > width:
        lines = _aligned(columns)
    return "\n".join([*lines, "", *_notes(table)]).replace("*", "") + "\n"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Cells, of a line or more each, below one another."""
    cells = [[cell.split("\n") for cell in row] for row in rows]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*cells, strict=True)]
    return ["  ".join(line.ljust(width) for line, width in zip(lines, widths, strict=True)).rstrip()
            for row in cells for lines in itertools.zip_longest(*row, fillvalue="")]


def _shown(table: dict[str, Any]) -> list[Column]:
    """The columns that a page has."""
    return [column for _, column in columns(table.get("tasks", ()))
            if column.always or any(row.get(column.key) is not None for row in table["rows"])]


def _rows(table: dict[str, Any]) -> list[list[str]]:
    """The heads of the columns, and the cells of every run and of the study's row that it belongs to."""
    shown = _shown(table)
    rows = [["run", "regime", "trained", "tokens", "tokens/param", *(column.head for column in shown)]]
    for row in table["rows"]:
        rows.append(_cells(row, shown, table["baseline"] is not None))
        if row["reported"] is not None:
            rows.append(_reported_cells(row["reported"], shown))
    return rows


def _notes(table: dict[str, Any]) -> list[str]:
    notes = [" ".join(("Brackets: 95 % intervals (perplexity over windows, benchmarks over items, needle by Wilson).",
                       *(f"*{column.head}*: {column.note}" for column in _shown(table) if column.note)))]
    if table["baseline"] is not None:
        notes.append(f"Δ: difference from {table['baseline']}, paired over the same windows or items.")
    if any(row["reported"] for row in table["rows"]):
        notes.append(f"*Reported* rows: {table['reported_by']}; other texts and checkpoints, so compare ratios first.")
    return notes + [f"- {row['run']}: {note}" for row in table["rows"] for note in row["notes"]]


def write(table: dict[str, Any], out: Path) -> tuple[Path, Path]:
    """Write `out`.md and `out`.json (a folder: table.md and table.json in it). UserError where that cannot be."""
    stem = out.with_suffix("") if out.suffix in (".md", ".json") else out / "table"
    paths = stem.with_name(stem.name + ".md"), stem.with_name(stem.name + ".json")
    for path in paths:
        check_file(path, "--out")
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_text(paths[0], markdown(table))
    write_json(paths[1], table)
    return paths


def _row(name: str, found: dict[str, Any], baseline: tuple[str, dict[str, Any]] | None,
         shown: list[tuple[str, Column]]) -> dict[str, Any]:
    run, tasks = found.get("run") or {}, found["tasks"]
    row: dict[str, Any] = {
        "run": name, "source": found["source"], "source_hash": found["source_hash"], "size": found.get("size"),
        "regime": found["regime"], "route": found.get("route"), "data": run.get("data"),
        "trained_parameters": run.get("trained_parameters"), "tokens_seen": run.get("tokens_seen"),
        "tokens_per_trained_parameter": run.get("tokens_per_trained_parameter"), "notes": [],
    }
    others = {} if baseline is None or baseline[1] is found else baseline[1]["tasks"]
    for task, column in shown:
        row[column.key] = None if task not in tasks else column.cell(tasks[task], others.get(task), row["notes"].append)
    study = match(row["size"], row["regime"]) if row["route"] == "learned" else None
    row["reported"] = None if study is None else study._asdict()
    return row


def _cells(row: dict[str, Any], shown: list[Column], versus: bool) -> list[str]:
    def count(value):
        if value is None:
            return "-"
        return str(value) if not math.isfinite(value) else format_count(int(value)) if value else "0"

    share = row["tokens_per_trained_parameter"]
    return [row["run"], row["regime"] + ("" if row["route"] in ("learned", None) else f", {row['route']} routed"),
            count(row["trained_parameters"]), count(row["tokens_seen"]), "-" if share is None else f"{share:.3g}",
            *("-" if row.get(column.key) is None else column.text(row[column.key], versus) for column in shown)]


def _reported_cells(study: dict[str, Any], shown: list[Column]) -> list[str]:
    def spelled(column):
        if column.reported is None or column.key not in study:
            return ""
        return "-" if study[column.key] is None else f"*{column.reported(study[column.key])}*"

    data = f", {study['data']}" if study["data"] else ""
    return [f"*reported{data}*", f"*{study['regime']}*", f"*{study['trained'] or '-'}*", "", "", *map(spelled, shown)]
