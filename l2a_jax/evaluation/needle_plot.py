"""A needle grid for people: a table, and a heat map of depth by length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from l2a_jax.errors import needs
from l2a_jax.files import whole

PANELS = {"exact_match": "greedy output is the answer\n{mean:.0%}",
          "ranked_first": "answer is the likeliest of {n}\n{mean:.0%} (chance {chance:.0%})"}


def format_table(result: dict[str, Any]) -> str:
    """Exact match and, in brackets, the share ranked first, in per cent: a row a depth, a column a length."""
    lengths, depths = result["lengths"], result["depths"]
    overall, answers = result["overall"], result["distractors"] + 1
    lines = [f"needle: exact match % (ranked first of {answers} %, chance {1 / answers:.0%}), {result['per_cell']} "
             f"prompts a cell, {result['needles']} needle(s)",
             f"{'depth':>6}" + "".join(f"{length:>14,}" for length in lengths)]
    for depth, exact, first in zip(depths, result["exact_match"], result["ranked_first"], strict=True):
        cells = (f"{100 * a:.0f} ({100 * b:.0f})" for a, b in zip(exact, first, strict=True))
        lines.append(f"{depth:>6.0%}" + "".join(f"{cell:>14}" for cell in cells))
    lines.append(f"all: exact match {overall['exact_match']:.1%} ± {overall['exact_match_stderr']:.1%}, ranked first "
                 f"{overall['ranked_first']:.1%}, mean rank {overall['mean_rank']:.2f}, n = {overall['n']}")
    return "\n".join(lines)


def draw_heat_map(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: a panel for each way of scoring, red for 0 % and green for 100 %, the share in every cell."""
    figure_of = needs("matplotlib.figure", "eval", "a heat map").Figure
    lengths, depths, answers = result["lengths"], result["depths"], result["distractors"] + 1
    width, height = 1.6 + 0.75 * len(lengths), 1.9 + 0.42 * len(depths)
    figure = figure_of(figsize=(2 * max(width, 3.6), max(height, 2.6)), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        grid = np.asarray(result[name])
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (row, column), share in np.ndenumerate(grid):
            axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=9)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.set_xlabel("context length (tokens)")
        axis.set_title(title.format(n=answers, mean=np.mean(grid), chance=1 / answers), fontsize=10)
    axes[0].set_ylabel("needle depth")
    figure.colorbar(image, ax=axes, label="share of prompts", ticks=[0, 0.5, 1])
    figure.suptitle(f"{result['overall']['n']} prompts, {result['per_cell']} a cell, {result['needles']} needle(s)",
                    fontsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        figure.savefig(partial, format="png")
