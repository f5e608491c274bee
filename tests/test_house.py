"""The house: floors, read from the imports. Nothing is imported from above, and no two modules import each other.

`l2a_jax/README.md` shows the same floors to people.
"""

from __future__ import annotations

import ast
import functools
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "l2a_jax"
GROUND = ("errors", "commands", "device", "provenance",
          "files", "fields", "flags", "shapes", "config", "progress", "version")
FLOORS = (GROUND, ("attention",), ("nn",), ("models",), ("data",), ("sharding",), ("training",), ("weights",),
          ("sources",), ("inference",), ("evaluation",), ("runs",), ("research",))
"""From the ground up. A module may import from its own floor and from those below."""
LINES = {"library": 21_198, "research": 9_927}


def module_of(path: pathlib.Path) -> str:
    return ".".join(("l2a_jax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str, path: pathlib.Path) -> set[str]:
    """Modules of the package that a module names in any import, wherever it stands in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively; spell l2a_jax out"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {target for target in found if target in MODULES and target not in (name, "l2a_jax")}


@functools.cache
def graph() -> dict[str, set[str]]:
    return {name: imports(name, path) for name, path in MODULES.items() if name != "l2a_jax"}


def floor(name: str) -> int:
    room = name.split(".")[1]
    found = [index for index, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"{name} stands on no floor: give it one in FLOORS, or move it"
    return found[0]


def test_every_module_has_a_floor_and_imports_only_downward():
    upward = [f"{name} -> {target}" for name, targets in graph().items() for target in targets
              if floor(target) > floor(name)]
    assert not upward, upward


def test_no_module_imports_itself_by_way_of_others():
    def circle(name: str, path: tuple[str, ...]) -> tuple[str, ...] | None:
        if name in path:
            return (*path[path.index(name):], name)
        if name in done:
            return None
        for target in sorted(graph()[name]):
            # A package's own front imports its rooms; a room that names its package names what stands there.
            if target in graph() and (found := circle(target, (*path, name))):
                return found
        done.add(name)
        return None

    done: set[str] = set()
    circles = [found for name in graph() if (found := circle(name, ()))]
    assert not circles, [" -> ".join(found) for found in circles]


def test_no_module_goes_by_the_name_of_another():
    """But by that of its own folder, whose face it is."""
    names, root = {name.rpartition(".")[2] for name in MODULES}, PACKAGE.parent
    wrong = [f"{path.relative_to(root)}: {folder}.{module} as {other}"
             for top in ("l2a_jax", "tests", "train", "eval", "convert") for path in sorted((root / top).rglob("*.py"))
             for folder, module, other in re.findall(r"from (l2a_jax[\w.]*) import (\w+) as (\w+)\n", path.read_text())
             if f"{folder}.{module}" in MODULES and other in names - {module, folder.rpartition(".")[2]}]
    assert not wrong, wrong


def test_commands_reach_the_library_and_nothing_reaches_them():
    for name, path in MODULES.items():
        assert "l2a_jax_commands" not in path.read_text(), name


def test_what_a_device_is_stands_in_one_file():
    asked = {"default_backend", "device_kind", "memory_stats", "compute_capability"}
    for name, path in MODULES.items():
        if name != "l2a_jax.device":
            found = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            assert not asked & found, f"{name} asks JAX for {asked & found}: ask l2a_jax.device"


@pytest.mark.parametrize("part", LINES)
def test_the_house_stays_small(part):
    lines = sum(len(path.read_text().splitlines()) for name, path in MODULES.items()
                if name.startswith("l2a_jax.research") == (part == "research"))
    assert lines <= LINES[part], f"{part} has {lines} lines"


def test_a_file_holds_one_idea():
    long = {name: count for name, path in MODULES.items() if (count := len(path.read_text().splitlines())) > 430}
    assert not long, long
