"""ROW.json as a file: what it must hold, and its reader. What is not of this shape is refused, never half used."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

from l2a_jax.errors import UserError
from l2a_jax.evaluation.intervals import INTERVAL
from l2a_jax.files import from_plain, parse_json, read_json
from l2a_jax.shapes import at_least, each, nullable, one_of, require, require_length, share, some

FORMAT = 1


def _bits(value: Any) -> str | None:
    return None if isinstance(value, str) and value and set(value) <= {"0", "1"} else "a text of 0 and 1"


_ENVIRONMENT = {"date": str, "device": str, "versions": each(str)}
_WINDOWS = {"perplexity": float, "tokens": at_least(1), "window_nll": some(float), "window_tokens": some(at_least(0)),
            "sparsity?": share, "sparsity_per_layer?": [share],
            "text": {"hash": str, "name": str, "context": int, "stride": int}}
_NEEDLE = {"exact_match": share, "exact_match_95": INTERVAL, "n": at_least(1), "correct": at_least(0)}
_BENCHMARK = {"acc": share, "acc_95": INTERVAL, "n": at_least(1), "source": str, "acc_bits": _bits,
              "acc_norm?": share, "acc_norm_bits?": _bits}
RESULTS: dict[str, Any] = {
    "perplexity": {**_WINDOWS, "perplexity_95": INTERVAL}, "contexts": each(_WINDOWS),
    "audit": {"gap": float, "gap_95": INTERVAL, "seeds": int, "rows": each({"perplexity": float, "worse": float,
                                                                           "worse_95": INTERVAL})},
    "needle": {**_NEEDLE, "lengths": each({**_NEEDLE, "by_depth": some(share), "log_probability": float,
                                           "controls?": each({"exact_match": share}), "sparsity?": share})},
    "reach": {"rows": each({"beyond": float, "kept?": float, "kept_95?": INTERVAL})},
    "ruler": {"overall": some({"length": at_least(1), "control": str, "score": share, "score_95": INTERVAL})},
    "all_routed": {"contexts": each({"perplexity": float, "routing_costs": float, "routing_costs_95": INTERVAL}),
                   "needle?": each(share), "benchmarks": each({"acc": share, "routing_gains": float})},
    "symptoms": {"symptoms": each(nullable(bool))},
    "under": {"rows": each({"nll": float, "worse": float}), "own": float},
    "collapse": {"verdict": str}, "residual": {"relative_l2": some(float)},
    **dict.fromkeys(("hellaswag", "piqa", "arc_challenge"), _BENCHMARK),
}
"""By task: what facts and tables read. The results of other tasks and instruments are objects of their own."""
_NUMBERS = ("trained_parameters", "tokens_seen", "tokens_per_trained_parameter", "loss_last_5_percent", "held_out_loss",
            "tokens_per_second_median", "sparsity_last_step", "steps", "steps_planned")
ROW = {"format": one_of(FORMAT), "name": str, "training_hash": str, "status": one_of("partial", "done", "failed"),
       "environment": _ENVIRONMENT, "error?": str, "seconds?": each(float),
       "training": {**{f"{name}?": float for name in _NUMBERS}, "source_hash?": str, "non_finite?": dict,
                    "memory?": each(nullable(float)), "seconds?": each(float), "curve?": [dict]},
       "evaluations": each({"hash": str, "seconds": float, "result": dict, "environment?": _ENVIRONMENT})}


def read_row(path: Path) -> dict[str, Any] | None:
    """A row's file, or what `gzip` made of it, with numbers that are not finite as numbers; None if neither.

    UserError naming the file and the key where it is not the file of a row.
    """
    packed = path.with_name(f"{path.name}.gz")
    if not path.exists():
        path = packed
    if not path.exists():
        return None
    try:
        found = from_plain(parse_json(_unpack(path), str(path)) if path == packed else read_json(path))
        require(found, ROW, str(path))
        for task, entry in found["evaluations"].items():
            if "not_finite" not in entry["result"]:
                _check_result(task, entry["result"], f"{path}: result of {task}")
    except UserError as error:
        raise UserError(f"{error}. Move the file away, and the row is run again") from error
    return found


def _check_result(task: str, result: dict[str, Any], where: str) -> None:
    require(result, RESULTS.get(task, dict), where)
    for name, windows in (result if task == "contexts" else {task: result}).items():
        if task in ("perplexity", "contexts"):
            require_length(windows["window_tokens"], len(windows["window_nll"]), f"{where}: window_tokens of {name}",
                           "as window_nll")
    if RESULTS.get(task) is _BENCHMARK:
        for bits in ("acc_bits", "acc_norm_bits"):
            require_length(result.get(bits) or result["acc_bits"], result["n"], f"{where}: {bits}", "which is n")


def _unpack(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be decompressed: {error}") from error
