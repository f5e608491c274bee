"""What a Hugging Face folder says beyond the model itself: read once, and written again by an export.

What it means is another reader's business; nothing here is interpreted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from l2a_jax.files import read_json
from l2a_jax.weights.ends import GENERATION

_FOLDERS = ("additional_chat_templates",)


class Carried(NamedTuple):
    """The fields of a `config.json`, and whole files by their path in the folder."""

    config: dict[str, Any]
    files: dict[str, bytes]


def folder_carried(folder: Path) -> Carried:
    """What to carry over from a folder. Raises UserError or OSError where a file cannot be read."""
    names = [GENERATION] if (folder / GENERATION).exists() else []
    names += [f"{inside}/{file.name}" for inside in _FOLDERS for file in sorted((folder / inside).glob("*.jinja"))]
    return Carried(read_json(folder / "config.json"), {name: (folder / name).read_bytes() for name in names})


def write_carried(carried: Carried, folder: Path) -> None:
    """Write the whole files. Raises OSError if the disk refuses."""
    for name, content in carried.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
