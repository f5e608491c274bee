"""From a folder of ROW.json to `replication.md`, `replication.json` and the figures: nothing that no run produced.

Every table is of declared rows: one without a file says "not run" and why, and every row's commands stand at the end.
Only the arms that wait for a machine (`arms`) are left out until they have a file.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2a_jax.errors import UserError
from l2a_jax.evaluation import table
from l2a_jax.files import check_file, from_plain, read_json, whole, write_json, write_text
from l2a_jax.research.replication import arms, damage, plots
from l2a_jax.research.replication.facts import as_results, facts, load, perplexity_ratio, result
from l2a_jax.research.replication.page import group_of, markdown, ratio_rows
from l2a_jax.research.replication.row import Row
from l2a_jax.research.replication.rows import all_rows
from l2a_jax.research.tables import write_figure
from l2a_jax.shapes import require

INSTRUMENTS = ("autopsy", "flips", "picture", "routed", "prunable", "thresholds")
"""Whose results stand in the report whole."""


def collect(folder: Path, rows: Sequence[Row] | None = None) -> dict[str, Any]:
    """All numbers of the report: a line of facts a row, its commands, the main table by size (what `table.markdown`
    shows), the effects of the damage experiment, distances of the residual stream, and what instruments found."""
    declared = all_rows() if rows is None else rows
    found = load(folder, declared)
    rows = [row for row in declared if row.group not in arms.GROUPS or row.name in found]
    out: dict[str, Any] = {"rows": [facts(found.get(row.name), row, found.get(row.baseline)) for row in rows],
                           "commands": {row.name: row.commands() for row in rows}, "reported_by": table.SOURCE}
    out["main"] = [_main_table(size, [row for row in rows if row.group == "main" and row.size == size], found)
                   for size in dict.fromkeys(row.size for row in rows if row.group == "main")]
    cells = [row for row in rows if row.group == "damage"]
    out["damage"] = _damage(cells, found)
    out["residual"] = _residual(cells, found)
    out["together"] = _together([row for row in rows if row.group in ("damage", "together")], found)
    out["instruments"] = {name: {row.name: one for row in rows
                                 if (one := result(found.get(row.name), name)) is not None} for name in INSTRUMENTS}
    return out


def write(folder: Path, out: Path, rows: Sequence[Row] | None = None) -> list[Path]:
    """Write the report; returns the files. UserError where no row was run or nothing can be written."""
    for name in ("replication.md", "replication.json"):
        check_file(out / name, "--report")
    made = collect(folder, rows)
    if not any("device" in row for row in made["rows"]):
        raise UserError(f"{folder} holds no file of a declared row; run train/study.py --out {folder} first")
    out.mkdir(parents=True, exist_ok=True)
    figures = {}
    for name, figure in _figures(made).items():
        if figure is not None:
            figures[name] = f"replication_{name}.png"
            write_figure(figure, out / figures[name])
    outdated = {f"{name}_picture.png" for name in made["instruments"]["picture"]
                if "first" not in made["instruments"]["picture"][name]}  # begins before any decision matters
    for picture in [path for path in sorted(folder.glob("*_picture.png")) if path.name not in outdated][:1]:
        if not picture.is_relative_to(out):
            with whole(out / picture.name) as partial:
                shutil.copyfile(picture, partial)
            picture = out / picture.name
        figures["picture"] = picture.relative_to(out).as_posix()
    made["figures"] = figures
    paths = [out / "replication.md", out / "replication.json"]
    write_json(paths[1], made)
    write_text(paths[0], markdown(made, figures))
    return [*paths, *(out / name for name in figures.values())]


def main_tables(path: Path) -> str:
    """The main table of every size that was run, as markdown, from the numbers of a `replication.json`.

    UserError where the file is not one."""
    made = from_plain(read_json(path))
    require(made, {"main": [{"size": str, "table?": table.TABLE}]}, f"{path} is not a study's replication.json")
    return "\n".join(f"## {entry['size']}\n\n{table.markdown(entry['table'])}" for entry in made["main"]
                     if entry["table"] is not None)


def _figures(made) -> dict[str, Any]:
    rows = made["rows"]
    repair = group_of(rows, "frontier")
    return {"frontier": plots.frontier(repair), "layers": plots.layers(repair),
            "collapse": plots.collapse(ratio_rows(rows)),
            "combinations": plots.combinations(made["together"]["crossed"], damage.FACTORS["window"]),
            "residual": plots.residual(made["residual"])}


def _main_table(size, rows, found) -> dict[str, Any]:
    runs = [(row.name, as_results(found[row.name], row)) for row in rows if row.name in found]
    base = next((run for run in runs if run[1]["regime"] == "baseline"), None)
    return {"size": size, "table": table.make_table(runs, base) if runs else None,
            "not_run": [row.name for row in rows if row.name not in found]}


def _damage(rows, found) -> dict[str, Any]:
    """Least squares on nats above the baseline and on the needle's empirical logit, where all cells were run."""
    cells, ratios, needles = _cells(rows, found)
    if not rows or len(cells) < len(rows):
        return {}
    responses = {
        "nats a token above the baseline": [one and one["nats"] for one in ratios],
        "needle, logit of exact match": [one and damage.empirical_logit(one["correct"], one["n"]) for one in needles],
        "needle, log-probability of the answer": [
            one and float(np.mean([entry["log_probability"] for entry in one["lengths"].values()])) for one in needles]}
    return {name: damage.analyse(cells, values) for name, values in responses.items()
            if all(value is not None and np.isfinite(value) for value in values)}


def _cells(rows, found) -> tuple[list[dict[str, str]], list[Any], list[Any]]:
    """Of the cells that were run: their levels, perplexity ratios and needles, None where one was not measured."""
    have = [row for row in rows if row.name in found]
    return ([dict(row.factors) for row in have],
            [perplexity_ratio(found[row.name], found.get(row.baseline)) for row in have],
            [result(found[row.name], "needle") for row in have])


def _together(rows, found) -> dict[str, Any]:
    """The cells of both stages without a model: the crossed table, and single factors with all else equal."""
    cells, ratios, needles = _cells(rows, found)
    values = [ratio and {**{key: ratio[key] for key in ("nats", "ratio", "ratio_95")},
                         "needle": one and one["exact_match"]}
              for ratio, one in zip(ratios, needles, strict=True)]
    some = [(cell, value["nats"]) for cell, value in zip(cells, values, strict=True)
            if value is not None and np.isfinite(value["nats"])]
    return {"crossed": damage.crossed(cells, values), "pairs": damage.pairs(*zip(*some, strict=True)) if some else {}}


def _residual(rows, found) -> dict[str, dict[str, list[float]]]:
    """By factor and level: the mean over its cells of the distance at every depth."""
    curves = [(dict(row.factors), result(found.get(row.name), "residual")) for row in rows]
    curves = [(cell, one["relative_l2"]) for cell, one in curves if one is not None]
    if not curves or len(curves) < len(rows):
        return {}
    return {factor: {str(level): np.mean([curve for cell, curve in curves if cell[factor] == str(level)],
                                         axis=0).tolist() for level in levels}
            for factor, levels in damage.FACTORS.items()}
