"""What `eval.json` must hold: the fields that `eval/table.py` and the summary read, task by task."""

from __future__ import annotations

from typing import Any

from l2a_jax.shapes import at_least, each, nullable, one_of, require, require_length, share, some

INTERVAL = [float, 2]
_TEXT = {"name": str, "rule": str, "hash": str, "context": int, "stride": int}
_AUDIT_ROW = {"perplexity": float, "density": share, "worse": float, "worse_95": INTERVAL, "perplexity_sd?": float,
              "recall_accuracy?": share}
_WRITTEN = {**{f"{name}?": float for name in ("distinct_1", "distinct_2", "distinct_4", "unigram_entropy",
                                              "ends_in_loop")}, "longest_loop": int}

BENCHMARK = {"n": at_least(1), "num_fewshot": int, "acc": share, "correct": some(one_of(0, 1)), "acc_norm?": share,
             "correct_norm?": some(one_of(0, 1)), "acc_stderr?": float, "acc_norm_stderr?": float}
TASKS: dict[str, Any] = {
    "perplexity": {"perplexity": float, "perplexity_95": INTERVAL, "tokens": at_least(1), "text": _TEXT,
                   "window_nll": some(float), "window_tokens": some(at_least(0)), "sparsity?": share,
                   "sparsity_per_layer?": [share], "recall_accuracy?": share},
    "audit": {"gap": float, "gap_95": INTERVAL, "seeds": int, "rows": each(_AUDIT_ROW)},
    "collapse": {"verdict": str, "rule": str, "findings": [str], "not_measured": [str],
                 "generation": nullable({"greedy": _WRITTEN, "sampled": _WRITTEN})},
    "pruning": {"pruned_layers": [int], "cache_tokens": int, "cache_bytes_before": at_least(1),
                "cache_bytes_after": int, "cache_saved": int, "perplexity_before": float, "perplexity_after": float,
                "cost": float, "cost_95": INTERVAL},
    "needle": {"lengths": some(at_least(1)), "depths": some(share), "exact_match": [[share]], "ranked_first": [[share]],
               "distractors": at_least(1), "needles": int, "per_cell": int,
               "overall": {"n": at_least(1), "exact_match": share, "exact_match_stderr": float, "ranked_first": share,
                           "mean_rank": float}},
}
_RUN = {f"{name}?": float for name in ("trained_parameters", "tokens_seen", "tokens_per_trained_parameter")}
RESULTS = {"source": str, "source_hash": str, "size?": str, "regime": str, "route?": str, "run?": _RUN,
           "tasks": each(dict)}


def check(found: Any, where: str) -> None:
    """UserError naming `where` (the file) and the key on what the readers of results could not read.

    A task that is not there was not run; one that is there has to be whole.
    """
    require(found, RESULTS, where)
    for name, entry in found["tasks"].items():
        require(entry, TASKS.get(name, BENCHMARK), f"{where}: task {name}")
        place = f"{where}: task {name}"
        if name == "perplexity":
            require_length(entry["window_tokens"], len(entry["window_nll"]), f"{place}: window_tokens", "as window_nll")
        elif name == "needle":
            for grid in ("exact_match", "ranked_first"):
                require_length(entry[grid], len(entry["depths"]), f"{place}: {grid}", "as depths")
        elif name not in TASKS:
            for bits in ("correct", "correct_norm"):
                require_length(entry.get(bits) or entry["correct"], entry["n"], f"{place}: {bits}", "which is n")
