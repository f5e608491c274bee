"""The routing audit: is it *which* tokens are routed that matters, or only how many?

A learned router can look useful while any choice of as many tokens would serve (Routing Absorption, arXiv 2603.02227).
So the same windows are scored again under the decisions of `controls`, which know nothing of the text.

First the learned decisions are forced back: a difference beyond rounding means that forcing is not what the router
does, and no control could be trusted.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from l2a_jax.errors import UserError
from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.columns import ROUTING, Column
from l2a_jax.evaluation.controls import controls, static_rates
from l2a_jax.evaluation.perplexity import BATCH_TOKENS, Scores, Windows, routing_rates, score_windows
from l2a_jax.evaluation.registry import Work
from l2a_jax.evaluation.subject import INSTEAD, check_routed
from l2a_jax.shapes import each, share
from l2a_jax.sources import Pretrained

SHAPE = {"gap": float, "gap_95": intervals.INTERVAL, "seeds": int, "rows": each({
    "perplexity": float, "density": share, "worse": float, "worse_95": intervals.INTERVAL, "perplexity_sd?": float,
    "recall_accuracy?": share})}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
"""Nats per token by which a window may differ when its own decisions are forced: rounding of the compute dtype."""


def audit(
    model: Pretrained,
    windows: Windows,
    learned: Scores,
    *,
    seeds: int = 3,
    backend: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """The table of controls over `windows`, where `learned` is the router's own pass over them.

    A row says perplexity, density (share routed), and how much worse than learned in nats per token, with the paired
    95 % interval over windows; rows of several seeds add their mean and standard deviation over seeds, and their
    interval is of the seeds' mean. Raises UserError for a plain model, or where the learned row is not reproduced.
    """
    check_routed(learned.decisions, "audit", INSTEAD)
    if seeds < 1:
        raise UserError(f"--audit-seeds is {seeds}; expected at least 1")
    rates = routing_rates(learned.decisions, windows.real)

    def score(decisions, label):
        return score_windows(model, windows, decisions, backend=backend, batch_tokens=batch_tokens, mesh=mesh,
                             label=f"audit, {label}")

    again = score(learned.decisions, "the learned decisions forced")
    error = _reproduced(learned, again, str(jax.tree.leaves(model.params["embed"])[0].dtype))
    scores: dict[str, list[Scores]] = {"learned": [learned]}
    for name, label, decisions in controls(learned.decisions, windows.real, model.l2a_config.pruned_layers, seeds):
        scores.setdefault(name, []).append(score(decisions, label))
    rows = {name: _row(several, learned, windows) for name, several in scores.items()}
    rows["static"]["layer_rates"] = static_rates(rates, rates.sum())
    return {"rows": rows, "gap": rows["random"]["worse"], "gap_95": rows["random"]["worse_95"],
            "gap_perplexity": rows["random"]["perplexity"] - rows["learned"]["perplexity"],
            "rates_per_layer": rates, "seeds": seeds, "reproduced_within": error, "text": windows.about,
            "interval": "normal over windows, paired with the learned row; nats per token"}


def task(work: Work) -> dict[str, Any]:
    return audit(work.model, work.windows, work.score(), seeds=work.options.audit_seeds, **work.passes)


def columns(name: str) -> tuple[Column, ...]:
    return (Column("audit", "audit gap", ROUTING, {"gap": float, "gap_95": intervals.INTERVAL}, _cell,
                   lambda cell, versus: "{:+.3f} [{:+.3f}, {:+.3f}]".format(cell["gap"], *cell["gap_95"]), always=True,
                   note="nats a token by which random routing at the learned rates is worse than the learned "
                        "decisions, paired over windows; near 0 the choice of tokens does not matter."),)


def _cell(entry: dict[str, Any], other: Any, say: Any) -> dict[str, Any]:
    return {"gap": entry["gap"], "gap_95": entry["gap_95"], "seeds": entry["seeds"],
            "perplexity": {kind: row["perplexity"] for kind, row in entry["rows"].items()}}


def told(report: dict[str, Any]) -> str:
    """The audit as a text table."""
    marked = any(row.get("recall_accuracy") is not None for row in report["rows"].values())
    lines = ["routing audit:",
             f"{'routing':<10} {'perplexity':>11} {'sd (seeds)':>11} {'routed':>8} {'worse by, nats/token [95 %]':>32}"
             + (f" {'recall':>8}" if marked else "")]
    for name, row in report["rows"].items():
        spread = f"{row['perplexity_sd']:.3f}" if row.get("perplexity_sd") is not None else "-"
        low, high = row["worse_95"]
        worse = "-" if name == "learned" else f"{row['worse']:+.4f} [{low:+.4f}, {high:+.4f}]"
        recall = "-" if row.get("recall_accuracy") is None else f"{row['recall_accuracy']:.1%}"
        lines.append(f"{name:<10} {row['perplexity']:>11.3f} {spread:>11} {row['density']:>8.1%} {worse:>32}"
                     + (f" {recall:>8}" if marked else ""))
    return "\n".join(lines)


def _row(scores: list[Scores], learned: Scores, windows: Windows) -> dict[str, Any]:
    perplexities = [intervals.exp(one.nll.sum() / one.tokens.sum()) for one in scores]
    mean_nll = np.mean([one.nll for one in scores], axis=0)
    worse, interval = intervals.paired_windows(mean_nll, learned.nll, learned.tokens)
    row = {"perplexity": float(np.mean(perplexities)), "nll": float(mean_nll.sum() / learned.tokens.sum()),
           "density": float(np.mean([routing_rates(one.decisions, windows.real).mean() for one in scores])),
           "worse": worse, "worse_95": interval, "window_nll": np.round(mean_nll, 4)}
    if scores[0].marked_accuracy is not None:
        row["recall_accuracy"] = float(np.mean([one.marked_accuracy for one in scores]))
    if len(scores) > 1:
        row |= {"perplexity_by_seed": perplexities, "perplexity_sd": float(np.std(perplexities, ddof=1))}
    return row


def _reproduced(learned: Scores, again: Scores, dtype: str) -> float:
    """The largest difference of a window's mean loss, in nats; UserError beyond rounding."""
    if not np.array_equal(learned.decisions, again.decisions):
        raise UserError("audit: forcing the learned decisions gave other decisions; this is a bug, please report it")
    error = float(np.max(np.abs(learned.nll - again.nll) / np.maximum(learned.tokens, 1)))
    if not error <= TOLERANCE.get(dtype, TOLERANCE["bfloat16"]):
        raise UserError(f"audit: forcing the learned decisions back changed a window's loss by {error:.2g} nats per "
                        f"token, more than rounding in {dtype} explains ({TOLERANCE.get(dtype)}): the controls could "
                        "not be trusted, so there is no audit")
    return error
