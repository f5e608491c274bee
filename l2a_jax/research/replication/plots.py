"""Figures of the study, each from the facts of rows that were run; None where there are no such rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from l2a_jax.research.tables import pyplot

Fact = dict[str, Any]
COLOURS = {"router_only": "tab:blue", "l2a_ft": "tab:orange", "full_ft": "tab:red", "router_strict": "tab:cyan"}
MARKS = {"0.5b": "o", "1.5b": "s", "3b": "D"}
CONTROLS = {"random": "x", "static": "+"}


def frontier(rows: Sequence[Fact]) -> Any:
    """Decisions routed against perplexity, needle and benchmarks, with the controls at the same rates."""
    rows = [row for row in rows if row.get("sparsity") is not None and row["perplexity_ratio"] is not None]
    if not rows:
        return None
    plt, lengths = pyplot(), _needle_lengths(rows)
    figure, axes = plt.subplots(1, 2 + len(lengths), figsize=(5 * (2 + len(lengths)), 4.6), constrained_layout=True)
    first, *needles, last = axes
    windows = sorted({row["settings"]["window"] for row in rows})
    shades = {window: plt.cm.plasma(i / len(windows)) for i, window in enumerate(windows)}
    for row in rows:
        shade = shades[row["settings"]["window"]]
        style = {"color": shade, "marker": MARKS[row["size"]], "ls": "none", "ms": 6,
                 "mfc": "none" if _helped(row) else shade}
        x, ratio = _routed(row["sparsity"]), row["perplexity_ratio"]
        low, high = ratio["ratio_95"]
        first.errorbar(x, ratio["ratio"], [[ratio["ratio"] - low], [high - ratio["ratio"]]], **style)
        _controls(first, x, (row["audit"] or {}).get("ratio") or {}, shade)
        for axis, length in zip(needles, lengths, strict=True):
            if row["needle"] is not None and length in row["needle"]["lengths"]:
                entry = row["needle"]["lengths"][length]
                there = _routed(entry["sparsity"])  # in those prompts
                axis.plot(there, 100 * entry["exact_match"], **style)
                _controls(axis, there, {name: 100 * value for name, value in entry["controls"].items()}, shade)
        _benchmarks(last, row, x, style, shade)
    first.axhline(1, color="grey", lw=0.8)
    first.set(title="perplexity / baseline's")
    for axis, length in zip(needles, lengths, strict=True):
        axis.set(title=f"needle found, %, in {int(length):,} tokens", ylim=(-3, 103))
    last.axhline(0, color="grey", lw=0.8)
    last.set(title="benchmarks, mean difference in points")
    for axis in axes:  # sparser to the right, where most of the rows are
        axis.set(xscale="log", xlabel="decisions routed, %")
        axis.invert_xaxis()
        axis.set_xticks((1, 2, 5, 10, 20, 50), labels=("1", "2", "5", "10", "20", "50"))
        axis.set_xticks((), minor=True)
    for window, shade in shades.items():
        first.plot([], [], color=shade, marker="o", ls="none", label=f"window {window}")
    names = {size: {"marker": MARKS[size]} for size in sorted({row["size"] for row in rows})}
    if any(map(_helped, rows)):
        names["trained with flips or echoes"] = {"marker": "o", "mfc": "none"}
    names |= {"random, same rates": {"marker": "x"}, "static layers, same density": {"marker": "+"}}
    for name, style in names.items():
        first.plot([], [], color="black", ls="none", label=name, **style)
    figure.legend(loc="outside lower center", ncols=10, fontsize=8)
    return figure


def _benchmarks(axis, row: Fact, x: float, style, shade) -> None:
    """The mean difference over the benchmarks, and how much worse the controls are."""
    differences = [entry["difference"] for entry in row["benchmarks"].values()
                   if entry is not None and entry["difference"] is not None]
    if not differences:
        return
    mean = sum(one["points"] for one in differences) / len(differences)
    spread = sum(((one["points_95"][1] - one["points_95"][0]) / 2) ** 2 for one in differences) ** 0.5
    axis.errorbar(x, mean, spread / len(differences), elinewidth=0.4, **style)
    asked = [one for one in (row["task_controls"] or {}).values() if not one.get("window_covers")]
    if asked:
        _controls(axis, x, {name: mean + sum(one[name]["points"] for one in asked) / len(asked) for name in CONTROLS},
                  shade)


def _routed(sparsity: float) -> float:
    """Percent of the decisions that are routed, for a logarithmic axis: none at all stands at 0.1."""
    return max(100 * (1 - sparsity), 0.1)


def _controls(axis, x: float, values: Mapping[str, float], shade) -> None:
    for name, mark in CONTROLS.items():
        if name in values:
            axis.plot(x, values[name], color=shade, marker=mark, ls="none")


def _needle_lengths(rows: Sequence[Fact]) -> list[str]:
    """The two longest contexts that the needle was looked for in by at least two rows."""
    lengths = Counter(length for row in rows if row["needle"] is not None for length in row["needle"]["lengths"])
    return sorted((length for length, count in lengths.items() if count > 1), key=int)[-2:]


def _helped(row: Fact) -> bool:
    """Whether training inverted decisions or repeated text."""
    return bool(row["settings"].get("flip") or row["settings"].get("echo"))


def collapse(rows: Sequence[Fact]) -> Any:
    """Tokens per trained parameter against perplexity, by regime; a run that stopped being finite is marked."""
    rows = [row for row in rows if row.get("tokens_per_trained_parameter") and row["perplexity_ratio"] is not None]
    if not rows:
        return None
    figure, axis = pyplot().subplots(figsize=(8, 5), constrained_layout=True)

    def points(some, **style):
        if some:
            axis.plot([row["tokens_per_trained_parameter"] for row in some],
                      [row["perplexity_ratio"]["ratio"] for row in some], "o", **style)

    for regime in dict.fromkeys(row["regime"] for row in rows):
        points([row for row in rows if row["regime"] == regime], color=COLOURS.get(regime, "black"), label=regime)
    ill = [row for row in rows if row["verdict"] not in (None, "healthy")]
    points(ill, mfc="none", mec="grey", ms=10, label="unhealthy by the collapse report")
    for row in ill:
        axis.annotate(row["name"], (row["tokens_per_trained_parameter"], row["perplexity_ratio"]["ratio"]),
                      xytext=(8, 4), textcoords="offset points", fontsize=7)
    points([row for row in rows if row["non_finite"]], mfc="none", mec="black", ms=12,
           label="became non-finite (weights from before)")
    axis.axvline(1, color="grey", lw=0.8, ls="--", label="the claimed threshold")
    axis.axhline(1, color="grey", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="tokens per trained parameter", ylabel="perplexity / baseline's")
    axis.legend(fontsize=8)
    return figure


def effects(analyses: Mapping[str, dict[str, Any]]) -> Any:
    """Differences from each factor's harmless level with 95 % intervals, a panel a response."""
    if not analyses:
        return None
    figure, axes = pyplot().subplots(1, len(analyses), figsize=(7 * len(analyses), 4.5), constrained_layout=True,
                                     squeeze=False)
    for axis, (response, found) in zip(axes[0], analyses.items(), strict=True):
        labels = []
        for name, term in found["main_effects"]["terms"].items():
            for level, entry in term["levels"].items():
                low, high = entry["interval"]
                axis.errorbar(entry["difference"], len(labels), fmt="o", color="tab:blue",
                              xerr=[[entry["difference"] - low], [high - entry["difference"]]])
                labels.append(f"{name}: {level} instead of {term['reference']}")
        axis.axvline(0, color="grey", lw=0.8)
        axis.set(title=response, yticks=range(len(labels)), yticklabels=labels)
        axis.invert_yaxis()
    return figure


def residual(means: Mapping[str, Mapping[str, Sequence[float]]]) -> Any:
    """Relative distance of the residual stream from the baseline's by depth, a panel a factor, a curve a level (the
    mean over its cells)."""
    if not means:
        return None
    figure, axes = pyplot().subplots(1, len(means), figsize=(3.6 * len(means), 3.6), constrained_layout=True,
                                     squeeze=False, sharey=True)
    for axis, (factor, levels) in zip(axes[0], means.items(), strict=True):
        for level, curve in levels.items():
            axis.plot(range(len(curve)), curve, label=level)
        axis.set(title=factor, xlabel="layers passed")
        axis.legend(fontsize=8)
    axes[0][0].set(ylabel="|routed - plain| / |plain|")
    return figure


def layers(rows: Sequence[Fact]) -> Any:
    """Which layers stay open: the share of decisions that are local, a line a row, a column a layer."""
    rows = [row for row in rows if row.get("sparsity_per_layer")]
    depths = [len(row["sparsity_per_layer"]) for row in rows]
    rows = [row for row, depth in zip(rows, depths, strict=True) if depth == max(set(depths), key=depths.count)]
    if not rows:
        return None
    figure, axis = pyplot().subplots(figsize=(10, 0.28 * len(rows) + 1.6), constrained_layout=True)
    picture = axis.imshow([row["sparsity_per_layer"] for row in rows], vmin=0, vmax=1, aspect="auto", cmap="magma")
    axis.set(yticks=range(len(rows)), yticklabels=[row["name"] for row in rows], xlabel="layer",
             title="share of tokens that are local")
    axis.tick_params(axis="y", labelsize=7)
    figure.colorbar(picture, ax=axis)
    return figure
