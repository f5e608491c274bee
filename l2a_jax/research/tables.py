"""How measured tables are told, once for all of research: markdown, files side by side, and what they were measured on.
"""

from __future__ import annotations

import datetime
import importlib
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from l2a_jax.errors import needs
from l2a_jax.files import check_writable, whole, write_json, write_text

LIBRARIES = ("jax", "jaxlib", "torch", "triton", "tokamax", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
"""Those that decide a speed."""


def grid(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a table in markdown, and an empty one."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """The versions of those libraries that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def heading() -> dict[str, Any]:
    """What a measurement needs to be repeated and judged: date, command, device, versions."""
    return {"date": datetime.date.today().isoformat(), "command": " ".join(["python", *sys.argv]),
            "device": jax.devices()[0].device_kind, "python": platform.python_version(), "versions": versions()}


def said(result: dict[str, Any]) -> str:
    """A heading as the beginning of a sentence."""
    return ", ".join([result["date"], result["device"], "bfloat16",
                      *(f"{name} {version}" for name, version in result["versions"].items())])


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
