"""How measured tables are told, once for all of research: markdown, files side by side, and what they were measured on.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from l2a_jax.errors import needs
from l2a_jax.files import check_writable, whole, write_json, write_text
from l2a_jax.provenance import installed, provenance

LIBRARIES = ("jax", "jaxlib", "torch", "triton", "tokamax", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
"""Those that decide a speed."""
COLOURS = BLUE, RED, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
"""Of figures: people who are blind to some can tell them apart (Okabe and Ito)."""


def grid(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a table in markdown, and an empty one."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def heading() -> dict[str, Any]:
    """What a measurement needs to be repeated and judged, with the libraries that decide a speed."""
    origin = provenance()
    return {**origin, "versions": {**origin["versions"], **installed(*LIBRARIES)}}


def said(result: dict[str, Any]) -> str:
    """A heading as a sentence."""
    versions = [f"{name} {result['versions'][name]}" for name in LIBRARIES if name in result["versions"]]
    return f"{', '.join([result['date'][:10], result['device'], *versions])}: `{' '.join(result['command'])}`."


def chosen(cases: Iterable[Any], only: str) -> list[Any]:
    """The cases in whose name the regular expression `only` is found."""
    return [case for case in cases if re.search(only, case.name)]


def reason(error: Exception) -> str:
    """Why something was not measured, on one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def write(folder: Path | None, name: str, result: Any, text: str | None = None) -> None:
    """NAME.json, and with a text NAME.md, in a folder; nothing without one."""
    if folder is None:
        return
    check_writable(folder, "--out")
    write_json(folder / f"{name}.json", result)
    if text is not None:
        write_text(folder / f"{name}.md", text)


def write_figure(figure: Any, path: Path, dpi: int = 110) -> None:
    """A figure of matplotlib as PNG, whole or not at all, and forgotten."""
    with whole(path) as partial:
        figure.savefig(partial, dpi=dpi, format="png")
    pyplot().close(figure)


def pyplot() -> Any:
    """matplotlib's pyplot, which opens no window."""
    needs("matplotlib", "research", "a figure").use("Agg")
    return importlib.import_module("matplotlib.pyplot")
