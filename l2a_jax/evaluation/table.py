"""The main results table: one row a run, under it what the study reported, as markdown and as JSON.

Every measured number carries its 95 % interval and its sample count. With a baseline, differences are paired: over the
same windows for perplexity, over the same items for the benchmarks, which tells far smaller differences from chance.
"""

from __future__ import annotations

import itertools
import math
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np

from l2a_jax import commands
from l2a_jax.data.counts import format_count
from l2a_jax.errors import UserError
from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.results import FILE, read_results
from l2a_jax.files import check_file, write_json, write_text
from l2a_jax.shapes import some

_INTERVAL = [float, 2]
_DIFFERENCE = {"value": float, "interval": _INTERVAL}
_CELL = {"value": float, "interval": _INTERVAL, "n": int, "acc_norm?": float, "difference?": _DIFFERENCE}
BENCHMARKS = {"hellaswag": "HellaSwag", "piqa": "PIQA", "arc_challenge": "ARC-C"}
"""Columns show acc, which the study's numbers resemble (it does not say), and acc_norm after a stroke."""
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
TABLE = {"baseline?": str, "reported_by": str, "rows": [{
    "run": str, "regime": str, "route?": str, "notes": [str], "sparsity?": float, "verdict?": str,
    **{f"{name}?": float for name in ("trained_parameters", "tokens_seen", "tokens_per_trained_parameter")},
    "perplexity?": {"value": float, "interval": _INTERVAL, "tokens": int,
                    "difference?": {"ratio": float, "ratio_95": _INTERVAL}},
    **{f"{task}?": _CELL for task in BENCHMARKS}, "needle?": {**_CELL, "lengths": some(int)},
    "audit?": {"gap": float, "gap_95": _INTERVAL},
    "reported?": {"regime": str, "data?": str, "trained?": str, "perplexity": float, "needle": str,
                  **{f"{task}?": float for task in BENCHMARKS}}}]}
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
    """{"rows": [...], "baseline", "source"}: every number of the table, None where a task was not run."""
    rows = [_row(name, found, baseline) for name, found in runs]
    return {"rows": rows, "baseline": None if baseline is None else baseline[0], "reported_by": SOURCE}


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


def _rows(table: dict[str, Any]) -> list[list[str]]:
    """The heads of the columns, and the cells of every run and of the study's row that it belongs to."""
    head = ["run", "regime", "trained", "tokens", "tokens/param", "perplexity",
            *(f"{label} acc / norm" for label in BENCHMARKS.values()), "needle", "local", "audit gap",
            "verdict"]
    rows = [head]
    for row in table["rows"]:
        rows.append(_cells(row, table["baseline"] is not None))
        if row["reported"] is not None:
            rows.append(_reported_cells(row["reported"]))
    return rows


def _notes(table: dict[str, Any]) -> list[str]:
    notes = ["Brackets: 95 % intervals (perplexity over windows, benchmarks over items, needle by Wilson). *audit "
             "gap*: nats a token by which random routing at the learned rates is worse than the learned decisions, "
             "paired over windows; near 0 the choice of tokens does not matter."]
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


def _row(name, found, baseline):
    run, tasks = found.get("run") or {}, found["tasks"]
    row: dict[str, Any] = {
        "run": name, "source": found["source"], "source_hash": found["source_hash"], "size": found.get("size"),
        "regime": found["regime"], "route": found.get("route"), "data": run.get("data"),
        "trained_parameters": run.get("trained_parameters"), "tokens_seen": run.get("tokens_seen"),
        "tokens_per_trained_parameter": run.get("tokens_per_trained_parameter"), "notes": [],
    }
    other = None if baseline is None or baseline[1] is found else baseline[1]["tasks"]
    row["perplexity"] = _perplexity(tasks.get("perplexity"), None if other is None else other.get("perplexity"), row)
    for task in BENCHMARKS:
        row[task] = _benchmark(task, tasks.get(task), None if other is None else other.get(task), row)
    row["needle"] = _needle(tasks.get("needle"))
    row["sparsity"] = tasks.get("perplexity", {}).get("sparsity")
    audit = tasks.get("audit")
    row["audit"] = None if audit is None else {
        "gap": audit["gap"], "gap_95": audit["gap_95"], "seeds": audit["seeds"],
        "perplexity": {kind: entry["perplexity"] for kind, entry in audit["rows"].items()}}
    row["verdict"] = tasks.get("collapse", {}).get("verdict")
    study = match(row["size"], row["regime"]) if row["route"] == "learned" else None
    row["reported"] = None if study is None else study._asdict()
    return row


def _perplexity(entry, other, row):
    if entry is None:
        return None
    cell = {"value": entry["perplexity"], "interval": entry["perplexity_95"], "tokens": entry["tokens"],
            "text": entry["text"]["name"], "context": entry["text"]["context"], "stride": entry["text"]["stride"],
            "difference": None}
    if other is not None and entry["text"]["hash"] == other["text"]["hash"] and (
            entry["window_tokens"] == other["window_tokens"]):
        nll, base, tokens = (np.asarray(x) for x in (entry["window_nll"], other["window_nll"], entry["window_tokens"]))
        nats, (low, high) = intervals.paired_windows(nll, base, tokens)
        cell["difference"] = {"nats": nats, "interval": [low, high], "ratio": intervals.exp(nats),
                              "ratio_95": [intervals.exp(low), intervals.exp(high)]}
    elif other is not None:
        row["notes"].append("perplexity is of other windows than the baseline's: no paired difference")
    return cell


def _benchmark(task, entry, other, row):
    if entry is None:
        return None
    correct = entry["correct"]
    cell = {"value": entry["acc"], "interval": list(intervals.share(sum(correct), len(correct))), "n": entry["n"],
            "num_fewshot": entry["num_fewshot"], "acc_norm": entry.get("acc_norm"), "acc_norm_interval": None,
            "difference": None, "difference_norm": None}
    if entry.get("correct_norm"):
        cell["acc_norm_interval"] = list(intervals.share(sum(entry["correct_norm"]), len(entry["correct_norm"])))
    if other is None:
        return cell
    same = all(entry.get(key) == other.get(key) for key in ("n", "num_fewshot", "source", "version", "limit"))
    if same:
        for kind, name in (("correct", "difference"), ("correct_norm", "difference_norm")):
            if entry.get(kind) and other.get(kind):
                difference, interval = intervals.paired_items(entry[kind], other[kind])
                cell[name] = {"value": difference, "interval": list(interval)}
    else:
        row["notes"].append(f"{task} is of other items or shots than the baseline's: no paired difference")
    return cell


def _needle(entry):
    if entry is None:
        return None
    value, count = entry["overall"]["exact_match"], entry["overall"]["n"]
    return {"value": value, "interval": list(intervals.share(value * count, count)), "n": count,
            "ranked_first": entry["overall"]["ranked_first"], "lengths": entry["lengths"]}


def _cells(row, versus):
    def number(cell, shown, scale, digits):
        if cell is None:
            return "-"
        low, high = (scale * bound for bound in cell["interval"])
        return f"{scale * cell['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}] ({shown})"

    def count(value):
        if value is None:
            return "-"
        return str(value) if not math.isfinite(value) else format_count(int(value)) if value else "0"

    perplexity = row["perplexity"]
    cells = [row["run"], row["regime"] + ("" if row["route"] in ("learned", None) else f", {row['route']} routed"),
             count(row["trained_parameters"]), count(row["tokens_seen"]),
             "-" if row["tokens_per_trained_parameter"] is None else f"{row['tokens_per_trained_parameter']:.3g}"]
    shown = number(perplexity, "" if perplexity is None else f"{format_count(perplexity['tokens'])} tokens", 1, 2)
    if versus and perplexity and perplexity["difference"]:
        low, high = perplexity["difference"]["ratio_95"]
        shown += f"<br>Δ x{perplexity['difference']['ratio']:.3f} [{low:.3f}, {high:.3f}]"
    cells.append(shown)
    for task in BENCHMARKS:
        cell = row[task]
        shown = number(cell, "" if cell is None else f"n={cell['n']}", 100, 1)
        if cell and cell["acc_norm"] is not None:
            shown += f" / {100 * cell['acc_norm']:.1f}"
        if versus and cell and cell["difference"]:
            low, high = (100 * bound for bound in cell["difference"]["interval"])
            shown += f"<br>Δ acc {100 * cell['difference']['value']:+.1f} [{low:+.1f}, {high:+.1f}]"
        cells.append(shown)
    needle = row["needle"]
    cells.append(number(needle, "" if needle is None else f"n={needle['n']}, to {max(needle['lengths'])}", 100, 0))
    cells.append("-" if row["sparsity"] is None else f"{row['sparsity']:.1%}")
    audit = row["audit"]
    low, high = (0, 0) if audit is None else audit["gap_95"]
    cells.append("-" if audit is None else f"{audit['gap']:+.3f} [{low:+.3f}, {high:+.3f}]")
    return [*cells, row["verdict"] or "-"]


def _reported_cells(study):
    scores = ["-" if study[task] is None else f"*{100 * study[task]:.1f}*" for task in BENCHMARKS]
    data = f", {study['data']}" if study["data"] else ""
    return [f"*reported{data}*", f"*{study['regime']}*", f"*{study['trained'] or '-'}*", "", "",
            f"*{study['perplexity']:.2f}*", *scores, f"*{study['needle']}*", "", "", ""]
