"""What a folder of ROW.json says: each row's numbers, and its paired differences from its baseline with 95 % intervals.

A number that was not measured is None. Nothing is compared that is not over the same windows or items.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2a_jax.evaluation import intervals
from l2a_jax.research.replication.row import BENCHMARKS, Row
from l2a_jax.research.replication.row_file import read_row

ASKED_LATER = ("all_routed", "reach", "ruler", "symptoms", "under")
"""What only the rows of later arms are asked: there in the facts of those alone."""


def load(folder: Path, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The files of those `rows` that have one and whose training is the declared one, by name."""
    found = {row.name: read_row(folder / f"{row.name}.json") for row in rows}
    return {row.name: found[row.name] for row in rows
            if found[row.name] is not None and found[row.name]["training_hash"] == row.training_hash}


def result(found: dict[str, Any] | None, task: str) -> dict[str, Any] | None:
    """A task's result; None where the row or the task was not run, or its numbers are not finite."""
    entry = None if found is None else found["evaluations"].get(task)
    return None if entry is None or "not_finite" in entry["result"] else entry["result"]


def perplexity_ratio(found: dict | None, base: dict | None, task: str = "perplexity",
                     context: str | None = None) -> dict[str, Any] | None:
    """exp of the paired difference in nats a token; > 1 is worse than the baseline."""
    mine, other = (result(one, task) for one in (found, base))
    if context is not None:
        mine, other = (None if one is None else one.get(context) for one in (mine, other))
    if mine is None or other is None or mine["text"]["hash"] != other["text"]["hash"] or (
            list(mine["window_tokens"]) != list(other["window_tokens"])):
        return None
    nats, (low, high) = intervals.paired_windows(*(np.asarray(one["window_nll"]) for one in (mine, other)),
                                                 np.asarray(mine["window_tokens"]))
    return {"nats": nats, "nats_95": [low, high], "ratio": intervals.exp(nats),
            "ratio_95": [intervals.exp(low), intervals.exp(high)]}


def benchmark_difference(found: dict | None, base: dict | None, task: str,
                         metric: str = "acc") -> dict[str, Any] | None:
    """Difference in points over the items that both have answered: the first so many of one file."""
    mine, other = (result(one, task) for one in (found, base))
    if mine is None or other is None or mine["source"] != other["source"]:
        return None
    count = min(mine["n"], other["n"])
    bits = [np.array(list(one[f"{metric}_bits"][:count]), dtype=int) for one in (mine, other)]
    value, (low, high) = intervals.paired_items(*(one.tolist() for one in bits))
    return {"points": 100 * value, "points_95": [100 * low, 100 * high], "n": count,
            "baseline": float(bits[1].mean()), "differ": int((bits[0] != bits[1]).sum())}


def facts(found: dict[str, Any] | None, row: Row, base: dict[str, Any] | None) -> dict[str, Any]:
    """One row's line: what was trained, what was measured, and the differences."""
    out: dict[str, Any] = {"name": row.name, "group": row.group, "size": row.size, "regime": row.regime,
                           "question": row.question, "status": _status(found, row), "baseline": row.baseline,
                           "settings": dict(row.given), "data": _mixture(row), "factors": dict(row.factors)}
    if found is None:
        return out
    training = found["training"]
    perplexity, audit, needle, collapse = (result(found, task) or {} for task in (
        "perplexity", "audit", "needle", "collapse"))
    ratio = perplexity_ratio(found, base)
    keys = ("trained_parameters", "tokens_seen", "tokens_per_trained_parameter", "loss_last_5_percent",
            "held_out_loss", "non_finite", "tokens_per_second_median", "sparsity_last_step", "steps", "steps_planned",
            "memory", "data_used")
    out |= {key: training.get(key) for key in keys}
    return out | {
        "device": found["environment"]["device"], "date": found["environment"]["date"],
        "versions": found["environment"]["versions"], "seconds": found.get("seconds"),
        "elsewhere": {task: entry["environment"]["device"] for task, entry in found["evaluations"].items()
                      if "environment" in entry},
        "source_hash": training.get("source_hash"),
        **{key: perplexity.get(key) for key in ("perplexity", "perplexity_95", "sparsity", "sparsity_per_layer")},
        "perplexity_ratio": ratio, "contexts": _contexts(found, base), "audit": _audit(audit, ratio),
        "needle": _needle(needle, result(base, "needle")), "verdict": collapse.get("verdict"),
        "benchmarks": {task: _benchmark(found, base, task) for task in BENCHMARKS},
        **{task: one for task in ASKED_LATER if (one := result(found, task)) is not None},
        "absorption": result(found, "absorption"), "task_controls": result(found, "task_controls"),
    }


def _contexts(found, base) -> dict[str, dict[str, Any]]:
    """Of a routed row, by window length: the perplexity ratio and what was not routed, where the baseline has both."""
    mine = {context: one for context, one in (result(found, "contexts") or {}).items() if "sparsity" in one}
    ratios = {context: perplexity_ratio(found, base, "contexts", context) for context in mine}
    return {context: {**ratio, "sparsity": mine[context]["sparsity"]} for context, ratio in ratios.items() if ratio}


def _audit(audit, ratio) -> dict[str, Any] | None:
    """Controls as perplexity ratios to the baseline: the learned row's ratio times how much worse each control is."""
    if not audit:
        return None
    out: dict[str, Any] = {"gap": audit["gap"], "gap_95": audit["gap_95"], **{
        key: {name: entry[key] for name, entry in audit["rows"].items()} for key in ("worse", "worse_95")}}
    if ratio is not None:
        out["ratio"] = {name: intervals.exp(ratio["nats"] + entry["worse"]) for name, entry in audit["rows"].items()}
    return out


def _needle(needle, base) -> dict[str, Any] | None:
    if not needle:
        return None
    numbers = ("exact_match", "exact_match_95", "n", "correct", "by_depth", "log_probability")
    lengths = {}
    for length, entry in needle["lengths"].items():
        line = {**{key: entry[key] for key in numbers}, "sparsity": entry.get("sparsity"),
                "controls": {name: one["exact_match"] for name, one in entry.get("controls", {}).items()}}
        other = None if base is None else base["lengths"].get(length)
        if other is not None and other["n"] == entry["n"] and len(other["by_depth"]) == len(entry["by_depth"]):
            line |= {"baseline": other["exact_match"], "baseline_by_depth": other["by_depth"]}
        lengths[length] = line
    compared = [entry for entry in lengths.values() if "baseline" in entry]
    at_least = all(mine >= other - 1e-9 for entry in compared
                   for mine, other in zip(entry["by_depth"], entry["baseline_by_depth"], strict=True))
    return {"exact_match": needle["exact_match"], "exact_match_95": needle["exact_match_95"], "n": needle["n"],
            "correct": needle["correct"], "lengths": lengths, "at_least_baseline": at_least if compared else None}


def _benchmark(found, base, task) -> dict[str, Any] | None:
    mine = result(found, task)
    if mine is None:
        return None
    return {"acc": mine["acc"], "acc_95": mine["acc_95"], "acc_norm": mine.get("acc_norm"), "n": mine["n"],
            "difference": benchmark_difference(found, base, task),
            "difference_norm": benchmark_difference(found, base, task, "acc_norm") if "acc_norm" in mine else None}


def _status(found, row) -> str:
    if found is None:
        return "not run" if row.not_run is None else f"not run: {row.not_run}"
    return f"failed: {found['error']}" if found["status"] == "failed" else found["status"]


def _mixture(row: Row) -> str:
    return ", ".join(entry.partition("=")[0] for entry in row.data)


def as_results(found: dict[str, Any], row: Row) -> dict[str, Any]:
    """A row in the form of `eval.json`, as `evaluation.table` reads it."""
    training, tasks = found["training"], {}
    for task in ("perplexity", "audit", "collapse"):
        if (entry := result(found, task)) is not None:
            tasks[task] = entry
    for task in BENCHMARKS:
        if (entry := result(found, task)) is not None:
            tasks[task] = {"acc": entry["acc"], "n": entry["n"], "num_fewshot": 0, "source": entry["source"],
                           "acc_norm": entry.get("acc_norm"), "correct": [int(bit) for bit in entry["acc_bits"]],
                           **({"correct_norm": [int(bit) for bit in entry["acc_norm_bits"]]}
                              if "acc_norm_bits" in entry else {})}
    if (entry := result(found, "needle")) is not None:
        tasks["needle"] = {"overall": {"exact_match": entry["exact_match"], "n": entry["n"], "ranked_first": None},
                           "lengths": [int(length) for length in entry["lengths"]]}
    reported = row.regime == "baseline" or _mixture(row) == "diverse"
    return {"source": row.name, "source_hash": training.get("source_hash"), "regime": row.regime, "route": "learned",
            "size": f"qwen2.5-{row.size}" if reported else None, "tasks": tasks,
            "run": None if row.regime == "baseline" else {
                "data": [_mixture(row)], **{key: training.get(key) for key in (
                    "trained_parameters", "tokens_seen", "tokens_per_trained_parameter")}}}
