"""A text as a picture: every token shaded by how many layers route it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped

from l2a_jax.errors import UserError, needs
from l2a_jax.files import whole

COLUMNS, LINES = 96, 60
"""Characters a line, and lines a picture at most: what does not fit is left out, and the title says so."""


def lay_out(pieces: Sequence[str], columns: int) -> list[list[tuple[int, int, str, int]]]:
    """Lines of (piece, first column, text, columns): a piece that does not fit begins the next line, and a line end
    ends one."""
    lines: list[list[tuple[int, int, str, int]]] = [[]]
    column = 0
    for index, piece in enumerate(pieces):
        for part_number, part in enumerate(piece.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    ")
                                           .split("\n")):
            if part_number:
                # The line end itself is a mark one column wide, so that a newline token can be seen.
                lines[-1].append((index, column, "↵", 1))
                lines.append([])
                column = 0
            text = "".join(_shown(letter) for letter in part)
            while text:
                if column >= columns or column + min(len(text), columns) > columns:  # cut only what fits no line
                    lines.append([])
                    column = 0
                piece_of_line, text = text[: columns - column], text[columns - column :]
                lines[-1].append((index, column, piece_of_line, len(piece_of_line)))
                column += len(piece_of_line)
    return lines if lines[-1] else lines[:-1]


def draw_routed_text(tokens: Int[np.ndarray, " T"], routed: Shaped[np.ndarray, " T"],
                     decode: Callable[[Sequence[int]], str], path: Path, *, title: str = "", first: int = 0,
                     columns: int = COLUMNS, max_lines: int = LINES, label: str = "share of layers that route") -> int:
    """Write a PNG of a text from its token `first` on, the shade of each token how many layers route it: their share or
    number, as `label` says. The colour scale ends at the greatest. Returns how many tokens are on it. The file appears
    whole or not at all.

    Raises UserError where lengths differ or there is no token from `first` on.
    """
    needs("matplotlib", "eval", "a picture of a routed text")
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    if len(tokens) != len(routed) or not len(tokens):
        raise UserError(f"there are {len(tokens)} tokens and {len(routed)} shares; expected one for each, at least one")
    every = len(tokens)
    if not 0 <= first < every:
        raise UserError(f"the picture begins at token {first:,} of {every:,}; expected 0 to {every - 1:,}")
    tokens, routed = tokens[first:], routed[first:]
    lines = lay_out([decode([int(token)]) for token in tokens], columns)
    shown = lines[:max_lines]
    count = 1 + max((index for line in shown for index, *_ in line), default=-1)
    scale = Normalize(0, max(float(routed[:count].max()), 1e-9))
    colours = colormaps["OrRd"]
    height = 0.2 * len(shown)
    figure = Figure(figsize=(0.088 * columns + 1.4, height + 0.9))
    axis = figure.add_axes((0.02, 0.12 / (height + 0.9), 0.87, height / (height + 0.9)))
    axis.set(xlim=(0, columns), ylim=(len(shown), 0))
    axis.axis("off")
    for row, line in enumerate(shown):
        for index, column, text, width in line:
            colour = colours(scale(routed[index]) * 0.8) if routed[index] > 0 else "white"
            axis.add_patch(Rectangle((column, row + 0.06), width, 0.88, facecolor=colour, linewidth=0))
            for offset, letter in enumerate(text):  # a letter a column, whatever the font's own widths are
                if letter != " ":
                    axis.text(column + offset + 0.5, row + 0.72, letter, family="monospace", fontsize=8.5,
                              ha="center", va="baseline", color="0.4" if letter == "↵" else "black", parse_math=False)
    cut = "" if count == every else f" (tokens {first + 1:,} to {first + count:,} of {every:,})"
    figure.text(0.02, 1 - 0.35 / (height + 0.9), title + cut, fontsize=10)
    bar = figure.add_axes((0.91, 0.2, 0.015, 0.6))
    used = ListedColormap(colours(np.linspace(0, 0.8, 256)))  # the darkest fifth would hide black letters
    figure.colorbar(ScalarMappable(Normalize(0, scale.vmax), used), cax=bar, label=label)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    return count


def _shown(letter: str) -> str:
    """The letter, or a box where the picture's font has none that fits a column."""
    wide = unicodedata.east_asian_width(letter) in ("W", "F") or unicodedata.combining(letter)
    return "□" if letter == "\ufffd" or wide or not letter.isprintable() else letter
