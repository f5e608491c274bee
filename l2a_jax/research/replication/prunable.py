"""Which layers can lose global attention for good: their sparsity, what each costs, and what the KV cache then is.

Sparsity is measured on a calibration text, costs on another one. Layers are pruned alone, and one after another in the
order of their sparsity: what a set costs is not the sum of what its layers cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from l2a_jax.errors import UserError
from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.perplexity import Scores, Windows, routing_rates, score_windows
from l2a_jax.evaluation.pruning_cost import CACHE_TOKENS
from l2a_jax.evaluation.subject import check_routed
from l2a_jax.inference.pruning import cache_saving, prune_by_sparsity, pruned
from l2a_jax.sources import Pretrained

THRESHOLDS = (0.9, 0.95, 0.98, 0.99, 0.995)


def prunable(model: Pretrained, calibration: Windows, windows: Windows, *, thresholds: Sequence[float] = THRESHOLDS,
             **passes: Any) -> dict[str, Any]:
    """Pruning by measured sparsity, of the layers above the lowest of `thresholds`; `passes` are options of
    `score_windows`.

    `layers`: every layer's sparsity, and `cost` (nats a token, with `cost_95` paired over windows) where it was pruned
    alone. `cumulative`: the sparsest layer, the two sparsest, ...: perplexity, cost, and bytes of the cache of one row
    of `CACHE_TOKENS`. `thresholds`: which layers lie above each, with that row's numbers.

    Raises UserError for a plain model, or a threshold that is no share.
    """
    if not thresholds:
        raise UserError("pruning needs at least one threshold of sparsity")
    found = score_windows(model, calibration, **passes, label="calibration")
    check_routed(found.decisions, "pruning")
    sparsity = 1 - routing_rates(found.decisions, calibration.real)
    already = set(model.l2a_config.pruned_layers)
    above = prune_by_sparsity(sparsity.tolist(), min(thresholds))
    candidates = sorted(set(above) - already, key=lambda layer: -sparsity[layer])
    before = score_windows(model, windows, **passes, label="nothing pruned")
    known: dict[frozenset[int], dict[str, Any]] = {frozenset(): _row(before, before, model)}

    def row_of(layers: Sequence[int]) -> dict[str, Any]:
        chosen = frozenset(layers)
        if chosen not in known:
            less = pruned(model, sorted(chosen))
            scores = score_windows(less, windows, **passes, label=f"pruned {sorted(chosen)}")
            known[chosen] = _row(scores, before, less)
        return known[chosen]

    rows = [{"layer": layer, "sparsity": float(value), "pruned": layer in already,
             **({name: row_of([layer])[name] for name in ("cost", "cost_95", "perplexity")} if layer in candidates
                else {})} for layer, value in enumerate(sparsity)]
    cumulative = [{"added": candidates[count - 1] if count else None, "pruned": sorted(candidates[:count]),
                   **row_of(candidates[:count])} for count in range(len(candidates) + 1)]
    chosen = {threshold: sorted(set(prune_by_sparsity(sparsity.tolist(), threshold)) - already)
              for threshold in thresholds}
    by_threshold = [{"threshold": threshold, "pruned": layers, **row_of(layers)}
                    for threshold, layers in chosen.items()]
    return {"layers": rows, "cumulative": cumulative, "thresholds": by_threshold, "cache_tokens": CACHE_TOKENS,
            "pruned_before": sorted(already), "calibration": calibration.about, "text": windows.about,
            "interval": "normal over windows, paired with nothing pruned; nats per token"}


def format_prunable(report: dict[str, Any]) -> str:
    """The three tables as text."""
    lines = [f"{'layer':<8} {'sparsity':>9} {'alone costs, nats':>18}"] if report["layers"] else []
    for row in report["layers"]:
        lines.append(f"{row['layer']:<8} {row['sparsity']:>9.2%} {_nats(row.get('cost')):>18}")
    lines.append(f"{'pruned, in order':<18} {'perplexity':>11} {'cost, nats [95 %]':>28} {'cache, MB':>10}")
    for name, rows in (("+", report["cumulative"]), (">", report["thresholds"])):
        for row in rows:
            label = f"> {row['threshold']:g}: {len(row['pruned'])}" if name == ">" else (
                "nothing" if row["added"] is None else f"+ {row['added']}")
            low, high = row["cost_95"]
            lines.append(f"{label:<18} {row['perplexity']:>11.3f} {row['cost']:>+10.4f} [{low:+.4f}, {high:+.4f}] "
                         f"{row['cache_bytes'] / 1e6:>10.1f}")
    return "\n".join(lines)


def _row(scores: Scores, before: Scores, model: Pretrained) -> dict[str, Any]:
    cost, interval = intervals.paired_windows(scores.nll, before.nll, before.tokens)
    size, whole = cache_saving(model, CACHE_TOKENS)
    return {"perplexity": intervals.exp(scores.nll.sum() / scores.tokens.sum()), "cost": cost,
            "cost_95": list(interval), "cache_bytes": int(size), "cache_bytes_unpruned": int(whole)}


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"
