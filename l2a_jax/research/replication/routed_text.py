"""What routing learned, on a text: which tokens are routed, which layers stay open, and a picture of both.

A token's share is the share of layers (pruned ones left out) that route it. Classes of tokens are of three kinds:

    form         what the token is: each token is in exactly one
    position     where in its window it stands
    repetition   whether the token, or the pair of it and the token before, stood before in the same window; and if so,
                 whether its last occurrence is within `reach` tokens (local attention sees it) or beyond
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from l2a_jax.errors import UserError
from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.evaluation.token_kinds import forms, repetitions

POSITIONS = (0, 1, 4, 64, 256, 1_024, 4_096, 16_384)


def positions(shape: tuple[int, int]) -> dict[str, Bool[np.ndarray, "B T"]]:
    """Where each bucket of positions stands."""
    places, edges = np.broadcast_to(np.arange(shape[1]), shape), [*(p for p in POSITIONS if p < shape[1]), shape[1]]
    names = {low: f"position {low}" if high == low + 1 else f"positions {low} to {high - 1}"
             for low, high in itertools.pairwise(edges)}
    return {names[low]: (places >= low) & (places < high) for low, high in itertools.pairwise(edges)}


def routed_share(decisions: Bool[np.ndarray, "L B T"], pruned: Sequence[int] = ()) -> Float64[np.ndarray, "B T"]:
    """Share of the layers that can route which do."""
    able = np.setdiff1d(np.arange(len(decisions)), np.asarray(pruned, int))
    if not len(able):
        raise UserError("every layer is pruned: nothing can be routed")
    return decisions[able].mean(axis=0, dtype=np.float64)


def what_is_routed(windows: Windows, decisions: Bool[np.ndarray, "L B T"], decode: Callable[[Sequence[int]], str], *,
                   reach: int, pruned: Sequence[int] = ()) -> dict[str, Any]:
    """{"classes", "layers"}: how much each class of tokens is routed, and each layer routes.

    A class has its count of tokens, the mean `share` of layers that route it with a 95 % interval over windows, the
    `ratio` to the mean over all tokens, and `of_all_routed`, its part of all routed decisions. A layer has the share
    of tokens it routes, and the class of each kind with the most routed tokens relative to the layer's own rate.
    `reach`: keys that local attention sees (window).
    """
    share, real = routed_share(decisions, pruned), windows.real
    everything = float(share[real].mean())
    kinds = {"form": forms(windows.tokens, decode), "position": positions(windows.tokens.shape),
             "repetition": repetitions(windows.tokens, reach)}
    members = [(kind, name, where & real) for kind, found in kinds.items() for name, where in found.items()]
    classes: dict[str, dict[str, Any]] = {}
    for kind, name, where in members:
        tokens = where.sum(axis=1)
        kept = tokens > 0
        if kept.any():
            mean, error = intervals.token_mean(np.where(where, share, 0).sum(axis=1)[kept], tokens[kept])
            classes[name] = {
                "kind": kind, "tokens": int(tokens.sum()), "of_all_tokens": float(tokens.sum() / real.sum()),
                "share": mean, "share_95": list(intervals.around(mean, error)),
                "ratio": mean / everything if everything else None,
                "of_all_routed": float(share[where].sum() / share[real].sum()) if everything else None}
    common = [(kind, name, where) for kind, name, where in members if where.sum() >= 20]
    layers = [{"layer": index, "share": float(decided[real].mean()), "pruned": index in pruned,
               "most_routed": _most_routed(decided, common) if decided[real].any() else {}}
              for index, decided in enumerate(decisions)]
    return {"share": everything, "tokens": int(real.sum()), "reach": reach, "classes": classes, "layers": layers,
            "text": windows.about, "interval": "normal over windows"}


def _most_routed(decided: Bool[np.ndarray, "B T"], members) -> dict[str, dict[str, Any]]:
    """By kind: the class of which a layer routes the greatest share."""
    top: dict[str, dict[str, Any]] = {}
    for kind, name, where in members:
        share = float(decided[where].mean())
        if kind not in top or share > top[kind]["share"]:
            top[kind] = {"class": name, "share": share}
    return top


def format_routed(report: Mapping[str, Any]) -> str:
    """Both tables as text: classes by their ratio, layers by how open they are."""
    lines = [f"{report['tokens']:,} tokens, routed in {report['share']:.1%} of layers on average",
             f"{'class':<24} {'tokens':>9} {'share':>8} {'95 %':>17} {'ratio':>7} {'of all routed':>14}"]
    for kind in ("form", "repetition", "position"):
        own = {name: row for name, row in report["classes"].items() if row["kind"] == kind}
        ordered = own.items() if kind == "position" else sorted(own.items(), key=lambda item: -item[1]["share"])
        for name, row in ordered:
            low, high = row["share_95"]
            ratio, part = row["ratio"] or 0.0, row["of_all_routed"] or 0.0
            lines.append(f"{name:<24} {row['tokens']:>9,} {row['share']:>8.1%} [{low:>6.1%}, {high:>6.1%}] "
                         f"{ratio:>7.2f} {part:>14.1%}")
    lines += [f"{'layer':<8} {'routed':>8}  most routed"] if report["layers"] else []
    for row in sorted(report["layers"], key=lambda row: -row["share"]):
        top = ", ".join(f"{entry['class']} {entry['share']:.0%}" for entry in row["most_routed"].values())
        lines.append(f"{row['layer']:<8} {row['share']:>8.1%}  {'pruned' if row['pruned'] else top}")
    return "\n".join(lines)
