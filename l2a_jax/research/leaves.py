"""The leaves of a tree by their paths, as files hold them, and what a file must hold to be taken for that tree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l2a_jax.errors import UserError
from l2a_jax.models.params import Tree, map_with_path


def by_path(tree: Tree) -> dict[str, Any]:
    """Every leaf by its path, such as `embed/embedding`."""
    found: dict[str, Any] = {}
    map_with_path(found.setdefault, tree)
    return found


def check(found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path, advice: str) -> None:
    """UserError naming the file and the leaf where it does not hold just the leaves of these shapes."""
    for name in sorted(shapes.keys() | found.keys()):
        shape = found[name].shape if name in found else "missing"
        if shape != shapes.get(name):
            raise UserError(f"{path}: {name} is {shape}; expected {shapes.get(name, 'nothing of that name')}; {advice}")
