"""A column of the table of runs, as a task declares it in its own file, and how its cells are spelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

SCORE, ROUTING, VERDICT = range(3)
"""What a column is about, in the order of the table; within each, tasks stand as the registry lists them."""
DIFFERENCE = {"value": float, "interval": [float, 2]}
CELL = {"value": float, "interval": [float, 2], "n": int}


class Column(NamedTuple):
    """`key`: of its cell in a row of the table's JSON, whose shape is `shape`.

    `cell(entry, other, say)`: from a run's entry of the task and the baseline's (None: no baseline, or it lacks the
    task); `say` adds a note to the run. `text(cell, versus)`: as the table shows it, with the difference where
    `versus`. `reported`: how the study's number is spelled. `always`: it has a place on a page even where no run has
    it. `note`: what it says, for the lines below the table.
    """

    key: str
    head: str
    about: int
    shape: Any
    cell: Callable[[dict[str, Any], dict[str, Any] | None, Callable[[str], None]], Any]
    text: Callable[[Any, bool], str]
    reported: Callable[[Any], str] | None = None
    always: bool = False
    note: str = ""


def interval(cell: dict[str, Any], shown: str, scale: float, digits: int) -> str:
    """`value [low, high] (shown)`."""
    low, high = (scale * bound for bound in cell["interval"])
    return f"{scale * cell['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}] ({shown})"


def change(difference: dict[str, Any], scale: float, digits: int) -> str:
    """`+value [+low, +high]`, with signs."""
    low, high = (scale * bound for bound in difference["interval"])
    return f"{scale * difference['value']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
