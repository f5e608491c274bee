"""What a lower threshold buys after training: a router trained under a penalty, asked to route more than it was.

Routing p >= threshold is a number of inference alone, so one trained router gives a curve of sparsity against
perplexity and needle, without another run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from l2a_jax.errors import UserError
from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.needle import NeedleOptions
from l2a_jax.evaluation.perplexity import Scores, Windows, routing_rates, score_windows
from l2a_jax.evaluation.subject import check_routed
from l2a_jax.research.replication import needles
from l2a_jax.sources import Pretrained


def threshold_sweep(model: Pretrained, windows: Windows, learned: Scores, prepared: Mapping[int, Windows],
                    options: NeedleOptions, *, thresholds: Sequence[float] = (0.3, 0.1), **passes: Any
                    ) -> dict[str, Any]:
    """Rows of {threshold, sparsity, worse (nats a token than at the model's own threshold) and worse_95, needle:
    {length: exact match}}, the model's own first. `learned`: its pass over the windows; `prepared`: see `needles`.

    UserError on a plain model and on thresholds outside (0, 1)."""
    layer = model.l2a_config
    check_routed(layer, "thresholds")
    if wrong := [value for value in thresholds if not 0 < value < 1]:
        raise UserError(f"a threshold is {wrong[0]}; expected a probability between 0 and 1")
    rows = []
    for value in (layer.threshold, *thresholds):
        mine = model._replace(l2a_config=dataclasses.replace(layer, threshold=value))
        scores = learned if value == layer.threshold else score_windows(mine, windows, label=f"threshold {value:g}",
                                                                        **passes)
        worse, interval = intervals.paired_windows(scores.nll, learned.nll, learned.tokens)
        found = needles.score(mine, dict(prepared), options, **passes)["lengths"]
        rows.append({"threshold": value, "sparsity": float(1 - routing_rates(scores.decisions, windows.real).mean()),
                     "worse": worse, "worse_95": list(interval),
                     "needle": {length: entry["exact_match"] for length, entry in found.items()}})
    return {"rows": rows, "windows": len(windows.tokens)}


def format_thresholds(report: Mapping[str, Any]) -> str:
    """Plain text."""
    lengths = list(report["rows"][0]["needle"])
    lines = [f"{'threshold':<9} {'local':>10}   {'worse, nats [95 %]':<27}"
             + "".join(f"{'needle ' + length:>14}" for length in lengths)]
    for row in report["rows"]:
        low, high = row["worse_95"]
        change = f"{row['worse']:+.4f} [{low:+.4f}, {high:+.4f}]"
        lines.append(f"{row['threshold']:<9g} {row['sparsity']:>10.1%}   {change:<27}"
                     + "".join(f"{row['needle'][length]:>14.0%}" for length in lengths))
    return "\n".join(lines)
