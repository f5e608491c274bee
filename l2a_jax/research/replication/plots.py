"""Figures of the study, each from the facts of rows that were run; without such rows there is no figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from l2a_jax.research.tables import pyplot, write_figure

Fact = dict[str, Any]
COLOURS = {"router_only": "tab:blue", "l2a_ft": "tab:orange", "full_ft": "tab:red", "router_strict": "tab:cyan"}


def frontier(rows: Sequence[Fact], path: Path) -> bool:
    """Decisions routed against perplexity, needle and benchmarks, with the controls at the same rates."""
    rows = [row for row in rows if row.get("sparsity") is not None and row["perplexity_ratio"] is not None]
    if not rows:
        return False

    def draw(plt):
        lengths = _needle_lengths(rows)
        figure, axes = plt.subplots(1, 2 + len(lengths), figsize=(5 * (2 + len(lengths)), 4.6), constrained_layout=True)
        windows = sorted({row["settings"]["window"] for row in rows})
        shades = {window: plt.cm.plasma(i / len(windows)) for i, window in enumerate(windows)}
        marks = {"0.5b": "o", "1.5b": "s", "3b": "D"}
        for row in rows:
            x, ratio, shade = _routed(row["sparsity"]), row["perplexity_ratio"], shades[row["settings"]["window"]]
            style = {"color": shade, "marker": marks[row["size"]], "ls": "none", "ms": 6,
                     "mfc": "none" if _helped(row) else shade}
            low, high = ratio["ratio_95"]
            axes[0].errorbar(x, ratio["ratio"], [[ratio["ratio"] - low], [high - ratio["ratio"]]], **style)
            _controls(axes[0], x, (row["audit"] or {}).get("ratio") or {}, shade)
            for axis, length in zip(axes[1:], lengths, strict=False):
                if row["needle"] is not None and length in row["needle"]["lengths"]:
                    entry = row["needle"]["lengths"][length]
                    there = _routed(entry["sparsity"])  # in those prompts
                    axis.plot(there, 100 * entry["exact_match"], **style)
                    _controls(axis, there, {name: 100 * value for name, value in entry["controls"].items()}, shade)
            differences = [entry["difference"] for entry in row["benchmarks"].values()
                           if entry is not None and entry["difference"] is not None]
            if differences:
                mean = sum(one["points"] for one in differences) / len(differences)
                spread = sum(((one["points_95"][1] - one["points_95"][0]) / 2) ** 2
                             for one in differences) ** 0.5 / len(differences)
                axes[-1].errorbar(x, mean, spread, elinewidth=0.4, **style)
                worse = {name: [one[name]["points"] for one in (row["task_controls"] or {}).values()
                                if not one.get("window_covers")] for name in CONTROLS}
                _controls(axes[-1], x, {name: mean + sum(points) / len(points) for name, points in worse.items()
                                        if points}, shade)
        axes[0].axhline(1, color="grey", lw=0.8)
        axes[0].set(title="perplexity / baseline's")
        for axis, length in zip(axes[1:], lengths, strict=False):
            axis.set(title=f"needle found, %, in {int(length):,} tokens", ylim=(-3, 103))
        axes[-1].axhline(0, color="grey", lw=0.8)
        axes[-1].set(title="benchmarks, mean difference in points")
        for axis in axes:  # sparser to the right, where most of the rows are
            axis.set(xscale="log", xlabel="decisions routed, %")
            axis.invert_xaxis()
            axis.set_xticks((1, 2, 5, 10, 20, 50), labels=("1", "2", "5", "10", "20", "50"))
            axis.set_xticks((), minor=True)
        for window, shade in shades.items():
            axes[0].plot([], [], color=shade, marker="o", ls="none", label=f"window {window}")
        for size in sorted({row["size"] for row in rows}):
            axes[0].plot([], [], color="black", marker=marks[size], ls="none", label=size)
        if any(map(_helped, rows)):
            axes[0].plot([], [], color="black", marker="o", mfc="none", ls="none", label="trained with flips or echoes")
        axes[0].plot([], [], color="black", marker="x", ls="none", label="random, same rates")
        axes[0].plot([], [], color="black", marker="+", ls="none", label="static layers, same density")
        figure.legend(loc="outside lower center", ncols=10, fontsize=8)
        return figure

    return _save(draw, path)


CONTROLS = {"random": "x", "static": "+"}


def _routed(sparsity: float) -> float:
    """Percent of the decisions that are routed, for a logarithmic axis: none at all stands at 0.1."""
    return max(100 * (1 - sparsity), 0.1)


def _controls(axis, x: float, values: Mapping[str, float], shade) -> None:
    for name, mark in CONTROLS.items():
        if name in values:
            axis.plot(x, values[name], color=shade, marker=mark, ls="none")


def collapse(rows: Sequence[Fact], path: Path) -> bool:
    """Tokens per trained parameter against perplexity, by regime; a run that stopped being finite is marked."""
    rows = [row for row in rows if row.get("tokens_per_trained_parameter") and row["perplexity_ratio"] is not None]
    if not rows:
        return False

    def draw(plt):
        figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
        for regime in dict.fromkeys(row["regime"] for row in rows):
            some = [row for row in rows if row["regime"] == regime]
            axis.plot([row["tokens_per_trained_parameter"] for row in some],
                      [row["perplexity_ratio"]["ratio"] for row in some], "o", color=COLOURS.get(regime, "black"),
                      label=regime)
        ill = [row for row in rows if row["verdict"] not in (None, "healthy")]
        if ill:
            axis.plot([row["tokens_per_trained_parameter"] for row in ill],
                      [row["perplexity_ratio"]["ratio"] for row in ill], "o", mfc="none", mec="grey", ms=10,
                      label="unhealthy by the collapse report")
        for row in ill:
            axis.annotate(row["name"], (row["tokens_per_trained_parameter"], row["perplexity_ratio"]["ratio"]),
                          xytext=(8, 4), textcoords="offset points", fontsize=7)
        broken = [row for row in rows if row["non_finite"]]
        if broken:
            axis.plot([row["tokens_per_trained_parameter"] for row in broken],
                      [row["perplexity_ratio"]["ratio"] for row in broken], "o", mfc="none", mec="black", ms=12,
                      label="became non-finite (weights from before)")
        axis.axvline(1, color="grey", lw=0.8, ls="--", label="the claimed threshold")
        axis.axhline(1, color="grey", lw=0.8)
        axis.set(xscale="log", yscale="log", xlabel="tokens per trained parameter", ylabel="perplexity / baseline's")
        axis.legend(fontsize=8)
        return figure

    return _save(draw, path)


def effects(analyses: Mapping[str, dict[str, Any]], path: Path) -> bool:
    """Differences from each factor's harmless level with 95 % intervals, a panel a response."""
    if not analyses:
        return False

    def draw(plt):
        figure, axes = plt.subplots(1, len(analyses), figsize=(7 * len(analyses), 4.5), constrained_layout=True,
                                    squeeze=False)
        for axis, (response, found) in zip(axes[0], analyses.items(), strict=True):
            labels, at = [], 0
            for name, term in found["main_effects"]["terms"].items():
                for level, entry in term["levels"].items():
                    low, high = entry["interval"]
                    reach = [[entry["difference"] - low], [high - entry["difference"]]]
                    axis.errorbar(entry["difference"], at, xerr=reach, fmt="o", color="tab:blue")
                    labels.append(f"{name}: {level} instead of {term['reference']}")
                    at += 1
            axis.axvline(0, color="grey", lw=0.8)
            axis.set(title=response, yticks=range(at), yticklabels=labels)
            axis.invert_yaxis()
        return figure

    return _save(draw, path)


def residual(means: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> bool:
    """Relative distance of the residual stream from the baseline's by depth, a panel a factor, a curve a level (the
    mean over its cells)."""
    if not means:
        return False

    def draw(plt):
        figure, axes = plt.subplots(1, len(means), figsize=(3.6 * len(means), 3.6), constrained_layout=True,
                                    squeeze=False, sharey=True)
        for axis, (factor, levels) in zip(axes[0], means.items(), strict=True):
            for level, curve in levels.items():
                axis.plot(range(len(curve)), curve, label=level)
            axis.set(title=factor, xlabel="layers passed")
            axis.legend(fontsize=8)
        axes[0][0].set(ylabel="|routed - plain| / |plain|")
        return figure

    return _save(draw, path)


def layers(rows: Sequence[Fact], path: Path) -> bool:
    """Which layers stay open: the share of decisions not routed, a line a row, a column a layer."""
    rows = [row for row in rows if row.get("sparsity_per_layer")]
    depths = [len(row["sparsity_per_layer"]) for row in rows]
    rows = [row for row in rows if len(row["sparsity_per_layer"]) == max(set(depths), key=depths.count)] if rows else []
    if not rows:
        return False

    def draw(plt):
        figure, axis = plt.subplots(figsize=(10, 0.28 * len(rows) + 1.6), constrained_layout=True)
        picture = axis.imshow([row["sparsity_per_layer"] for row in rows], vmin=0, vmax=1, aspect="auto", cmap="magma")
        axis.set(yticks=range(len(rows)), yticklabels=[row["name"] for row in rows], xlabel="layer",
                 title="share of tokens that are local")
        axis.tick_params(axis="y", labelsize=7)
        figure.colorbar(picture, ax=axis)
        return figure

    return _save(draw, path)


def _needle_lengths(rows: Sequence[Fact]) -> list[str]:
    """The two longest contexts that the needle was looked for in by at least two rows."""
    lengths = Counter(length for row in rows if row["needle"] is not None for length in row["needle"]["lengths"])
    return sorted((length for length, count in lengths.items() if count > 1), key=int)[-2:]


def _helped(row: Fact) -> bool:
    """Whether training inverted decisions or repeated text."""
    return bool(row["settings"].get("flip") or row["settings"].get("echo"))


def _save(draw: Callable[[Any], Any], path: Path) -> bool:
    write_figure(draw(pyplot()), path)
    return True
