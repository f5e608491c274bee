"""Figures of the study, each from the facts of rows that were run; None where there are no such rows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from l2a_jax.research.tables import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, pyplot

Fact = dict[str, Any]
COLOURS = {"router_only": BLUE, "l2a_ft": ORANGE, "full_ft": RED, "router_strict": SKY, "norms_only": GREEN}
NAMES = {"router_only": "router and norms trained", "l2a_ft": "attention trained too", "full_ft": "all trained",
         "router_strict": "router alone trained", "norms_only": "norms alone trained, everything routed"}
MARKS = {"0.5b": "o", "1.5b": "s", "3b": "D"}
CONTROLS = {"random": "x", "static": "+"}
FACTORS = {"rope": "change of the positions", "window": "window, tokens", "sinks": "sinks, tokens",
           "leakage": "layer calls that compute every row, share"}
LEVELS = {"theta:5": "base × 5", "linear:5": "positions / 5"}
WIDTH = 8.0
"""Inches: text of 10 points can be read where a figure is shown 800 pixels wide."""


def frontier(rows: Sequence[Fact]) -> Any:
    """Decisions routed against perplexity, needle and benchmarks, each row joined to its controls at the same rates."""
    rows = [row for row in rows if row.get("sparsity") is not None and row["perplexity_ratio"] is not None]
    if not rows:
        return None
    plt, lengths = pyplot(), _needle_lengths(rows)
    height = (2 + len(lengths) + 1) // 2
    figure, axes = plt.subplots(height, 2, figsize=(WIDTH, 3.5 * height + 1), constrained_layout=True)
    first, *others = axes.flat
    needles, last = others[: len(lengths)], others[len(lengths)]
    for axis in others[len(lengths) + 1 :]:
        axis.axis("off")
    windows = sorted({row["settings"]["window"] for row in rows})
    shades = {window: colour for window, colour in zip(windows, itertools.cycle((PURPLE, BLUE, GREEN, ORANGE, RED)))}
    for row in rows:
        shade = shades[row["settings"]["window"]]
        style = {"color": shade, "marker": MARKS[row["size"]], "ls": "none", "ms": 5,
                 "mfc": "white" if _helped(row) else shade}
        x, ratio = _routed(row["sparsity"]), row["perplexity_ratio"]
        low, high = ratio["ratio_95"]
        _controls(first, x, ratio["ratio"], (row["audit"] or {}).get("ratio") or {}, shade)
        first.errorbar(x, ratio["ratio"], [[ratio["ratio"] - low], [high - ratio["ratio"]]], **style)
        for axis, length in zip(needles, lengths, strict=True):
            if row["needle"] is not None and length in row["needle"]["lengths"]:
                entry = row["needle"]["lengths"][length]
                there, found = _routed(entry["sparsity"]), 100 * entry["exact_match"]  # in those prompts
                _controls(axis, there, found, {name: 100 * value for name, value in entry["controls"].items()}, shade)
                axis.plot(there, found, **style)
        _benchmarks(last, row, x, style, shade)
    first.axhline(1, color="grey", lw=0.8)
    first.set(title="Perplexity", ylabel="ratio to the plain model's")
    for axis, length in zip(needles, lengths, strict=True):
        axis.set(title=f"Needle in {int(length):,} tokens", ylabel="found, %", ylim=(-3, 104))
    last.axhline(0, color="grey", lw=0.8)
    last.set(title="Benchmarks, mean of three", ylabel="difference, points")
    for axis in (first, *needles, last):  # sparser to the right, where most of the rows are
        axis.set(xscale="log", xlabel="decisions routed, %")
        axis.invert_xaxis()
        axis.set_xticks((1, 2, 5, 10, 20, 50), labels=("1", "2", "5", "10", "20", "50"))
        axis.set_xticks((), minor=True)
    for window, shade in shades.items():
        first.plot([], [], color=shade, marker="o", ls="none", label=f"window {window:,}")
    names = {size.upper(): {"marker": MARKS[size]} for size in sorted({row["size"] for row in rows})}
    if any(map(_helped, rows)):
        names["inversions or echoes"] = {"marker": "o", "mfc": "none"}
    names |= {"random, same rates": {"marker": "x"}, "fixed layers, same density": {"marker": "+"}}
    for name, style in names.items():
        first.plot([], [], color="black", ls="none", label=name, **style)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _benchmarks(axis, row: Fact, x: float, style, shade) -> None:
    """The mean difference over the benchmarks, and how much worse the controls are."""
    differences = [entry["difference"] for entry in row["benchmarks"].values()
                   if entry is not None and entry["difference"] is not None]
    if not differences:
        return
    mean = sum(one["points"] for one in differences) / len(differences)
    spread = sum(((one["points_95"][1] - one["points_95"][0]) / 2) ** 2 for one in differences) ** 0.5
    asked = [one for one in (row["task_controls"] or {}).values() if not one.get("window_covers")]
    if asked:
        _controls(axis, x, mean, {name: mean + sum(one[name]["points"] for one in asked) / len(asked)
                                  for name in CONTROLS}, shade)
    axis.errorbar(x, mean, spread / len(differences), elinewidth=0.4, **style)


def _routed(sparsity: float) -> float:
    """Percent of the decisions that are routed, for a logarithmic axis: none at all stands at 0.1."""
    return max(100 * (1 - sparsity), 0.1)


def _controls(axis, x: float, own: float, values: Mapping[str, float], shade) -> None:
    """The controls of a row, each joined to the row's `own` value."""
    values = {name: values[name] for name in CONTROLS if name in values}
    if values:
        axis.plot([x, x], [min(own, *values.values()), max(own, *values.values())], color=shade, lw=0.6, alpha=0.5)
    for name, value in values.items():
        axis.plot(x, value, color=shade, marker=CONTROLS[name], ls="none", ms=5)


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
    figure, axis = pyplot().subplots(figsize=(WIDTH, 5.5), constrained_layout=True)

    def points(some, **style):
        if some:
            axis.plot([row["tokens_per_trained_parameter"] for row in some],
                      [row["perplexity_ratio"]["ratio"] for row in some], ls="none", **style)

    for regime, mark in zip(dict.fromkeys(row["regime"] for row in rows), "osD^", strict=False):
        some = [row for row in rows if row["regime"] == regime]
        points(some, marker=mark, color=COLOURS.get(regime, "black"), label=NAMES.get(regime, regime))
        for row in some:  # intervals over windows
            low, high = row["perplexity_ratio"]["ratio_95"]
            axis.plot([row["tokens_per_trained_parameter"]] * 2, [low, high], color=COLOURS.get(regime, "black"), lw=1)
    ill = [row for row in rows if row["verdict"] not in (None, "healthy")]
    points(ill, marker="o", mfc="none", mec="grey", ms=11, label="unhealthy by the collapse report")
    for row in ill:
        axis.annotate(row["verdict"], (row["tokens_per_trained_parameter"], row["perplexity_ratio"]["ratio"]),
                      xytext=(9, 5 if row["perplexity_ratio"]["ratio"] > 1.5 else -16), textcoords="offset points",
                      fontsize=9)
    points([row for row in rows if row["non_finite"]], marker="o", mfc="none", mec="black", ms=13,
           label="became non-finite (weights from before)")
    axis.axvline(1, color="grey", lw=0.8, ls="--", label="the claimed threshold")
    axis.axhline(1, color="grey", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="tokens seen per trained parameter",
             ylabel="perplexity, ratio to the plain model's")
    ticks = (0.7, 1, 1.5, 2, 3, 5, 10, 100, 1_000)
    axis.set_yticks(ticks, labels=[f"{tick:,g}" for tick in ticks])
    axis.set_yticks((), minor=True)
    axis.legend(fontsize=9)
    return figure


def combinations(crossed: Sequence[tuple[str, Sequence[Fact | None]]], windows: Sequence[int]) -> Any:
    """Perplexity and needle by window, a curve for each topology and number of sinks."""
    curves = [(name, [(place, value) for place, value in enumerate(values) if value is not None])
              for name, values in crossed]
    if not any(values for _, values in curves):
        return None
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(WIDTH, 4.6), constrained_layout=True)
    styles = itertools.product((BLUE, RED), (("-", "o"), ("--", "s"), (":", "^")))
    for index, ((name, values), (colour, (line, mark))) in enumerate(zip(curves, styles, strict=False)):
        shifted = [place + 0.04 * (index - len(curves) / 2) for place, _ in values]  # so that no point hides another
        style = {"color": colour, "ls": line, "marker": mark, "ms": 6}
        ratios = [value["ratio"] for _, value in values]
        low, high = ([abs(value["ratio_95"][edge] - value["ratio"]) for _, value in values] for edge in (0, 1))
        left.errorbar(shifted, ratios, [low, high], label=name, capsize=2, **style)
        asked = [(x, 100 * value["needle"]) for x, (_, value) in zip(shifted, values, strict=True)
                 if value["needle"] is not None]
        right.plot([x for x, _ in asked], [found for _, found in asked], **style)
    left.axhline(1, color="grey", lw=0.8)
    left.set(title="Perplexity", ylabel="ratio to the plain model's")
    right.set(title="Needle in 2,048 tokens", ylabel="found, %", ylim=(-3, 104))
    for axis in (left, right):
        axis.set(xticks=range(len(windows)), xticklabels=[f"{window:,}" for window in windows], xlabel="window, tokens")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def residual(means: Mapping[str, Mapping[str, Sequence[float]]]) -> Any:
    """Relative distance of the residual stream from the baseline's by depth, a panel a factor, a curve a level (the
    mean over its cells)."""
    if not means:
        return None
    height = -(-len(means) // 2)
    figure, axes = pyplot().subplots(height, 2, figsize=(WIDTH, 2.9 * height), constrained_layout=True, squeeze=False,
                                     sharey=True)
    for axis, (factor, levels) in zip(axes.flat, means.items(), strict=False):
        for (level, curve), colour, line in zip(levels.items(), (BLUE, RED, GREEN), ("-", "--", ":"), strict=False):
            axis.plot(range(len(curve)), curve, label=LEVELS.get(level, level), color=colour, ls=line)
        axis.set(title=FACTORS.get(factor, factor), xlabel="layers passed", ylabel="relative distance")
        axis.legend(fontsize=9)
    for axis in axes.flat[len(means) :]:
        axis.axis("off")
    return figure


def layers(rows: Sequence[Fact]) -> Any:
    """Which layers stay open: the share of decisions that are local, a line a row, a column a layer."""
    rows = [row for row in rows if row.get("sparsity_per_layer")]
    depths = [len(row["sparsity_per_layer"]) for row in rows]
    rows = [row for row, depth in zip(rows, depths, strict=True) if depth == max(set(depths), key=depths.count)]
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: (row["settings"].get("window", 0), -row["sparsity"]))
    figure, axis = pyplot().subplots(figsize=(WIDTH, 0.24 * len(rows) + 1.8), constrained_layout=True)
    shares = [[100 * share for share in row["sparsity_per_layer"]] for row in rows]
    picture = axis.imshow(shares, vmin=0, vmax=100, aspect="auto", cmap="cividis")
    axis.set(yticks=range(len(rows)), yticklabels=list(map(_settings, rows)), xlabel="layer",
             title="Decisions that are local, by layer")
    axis.tick_params(axis="y", labelsize=9)
    figure.colorbar(picture, ax=axis, label="local, %", location="bottom", shrink=0.6)
    return figure


def _settings(row: Fact) -> str:
    """What distinguishes a row of the repair, in words."""
    given = row["settings"]
    more = [f"rows {given['seq_len']:,}"] if "seq_len" in given else []
    more += [word for name, word in (("flip", "inverted"), ("echo", "echoes")) if given.get(name)]
    return ", ".join([f"window {given.get('window', 0):,}", f"penalty {given.get('penalty', 0):g}", *more])
