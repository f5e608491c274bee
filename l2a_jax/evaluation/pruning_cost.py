"""Layers that lose global attention after training: which, what the cache saves, and what perplexity pays."""

from __future__ import annotations

import logging
from typing import Any

import jax
from jax.sharding import Mesh

from l2a_jax.config import position_limit
from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.perplexity import BATCH_TOKENS, Windows, result, routing_rates, score_windows
from l2a_jax.evaluation.registry import Work
from l2a_jax.inference.cache import cache_bytes
from l2a_jax.inference.pruning import check_prunable, prune_by_sparsity, pruned
from l2a_jax.shapes import at_least
from l2a_jax.sources import Pretrained

log = logging.getLogger("l2a_jax.eval")
CACHE_TOKENS = 32_768
SHAPE = {"pruned_layers": [int], "cache_tokens": int, "cache_bytes_before": at_least(1), "cache_bytes_after": int,
         "cache_saved": int, "perplexity_before": float, "perplexity_after": float, "cost": float,
         "cost_95": intervals.INTERVAL}


def by_sparsity(model: Pretrained, calibration: Windows, threshold: float, *, backend: str = "auto",
                batch_tokens: int = BATCH_TOKENS, mesh: Mesh | None = None) -> Pretrained:
    """The model with every layer pruned whose measured sparsity on the calibration text exceeds `threshold`."""
    check_prunable(model.l2a_config, "threshold")
    scores = score_windows(model, calibration, backend=backend, batch_tokens=batch_tokens, mesh=mesh,
                           label="calibration")
    sparsity = 1 - routing_rates(scores.decisions, calibration.real)
    model = pruned(model, prune_by_sparsity(sparsity.tolist(), threshold))
    log.info("pruned, with sparsity above %g on %s: %s", threshold, calibration.about["name"],
             ", ".join(map(str, model.l2a_config.pruned_layers)) or "no layer")
    return model


def report(before: Pretrained, after: Pretrained, windows: Windows, *, backend: str = "auto",
           batch_tokens: int = BATCH_TOKENS, mesh: Mesh | None = None) -> dict[str, Any]:
    """What pruning saves (bytes of cache of one row at full length) and costs (perplexity, paired over windows)."""
    passes = {"backend": backend, "batch_tokens": batch_tokens, "mesh": mesh}
    first, second = (score_windows(model, windows, **passes, label=label)
                     for model, label in ((before, "before pruning"), (after, "after pruning")))
    cost, interval = intervals.paired_windows(second.nll, first.nll, second.tokens)
    length = min(CACHE_TOKENS, position_limit(after.config, after.l2a_config))
    dtype = jax.tree.leaves(after.params["embed"])[0].dtype
    sizes = [cache_bytes(model.config, model.l2a_config, 1, length, dtype) for model in (before, after)]
    return {"pruned_layers": after.l2a_config.pruned_layers, "layers": after.config.num_layers,
            "newly_pruned": sorted({*after.l2a_config.pruned_layers} - {*before.l2a_config.pruned_layers}),
            "cache_tokens": length, "cache_bytes_before": sizes[0], "cache_bytes_after": sizes[1],
            "cache_saved": sizes[0] - sizes[1],
            "perplexity_before": result(first, windows)["perplexity"],
            "perplexity_after": result(second, windows)["perplexity"],
            "cost": cost, "cost_95": interval, "text": windows.about,
            "interval": "normal over windows, paired; nats per token"}


def task(work: Work) -> dict[str, Any]:
    return report(work.unpruned, work.model, work.windows, **work.passes)


def told(report: dict[str, Any]) -> str:
    """The report as a line."""
    low, high = report["cost_95"]
    share = report["cache_saved"] / report["cache_bytes_before"]
    layers = ", ".join(map(str, report["pruned_layers"])) or "none"
    return (f"pruned layers {layers}: cache of {report['cache_tokens']:,} tokens "
            f"{report['cache_bytes_before']:,} -> {report['cache_bytes_after']:,} bytes ({share:.0%} saved); "
            f"perplexity {report['perplexity_before']:.3f} -> {report['perplexity_after']:.3f} "
            f"({report['cost']:+.4f} nats a token [{low:+.4f}, {high:+.4f}])")
