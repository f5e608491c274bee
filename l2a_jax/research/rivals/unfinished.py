"""What a run of rivals has found so far: a file beside the result, from which the same command goes on.

It is written as a whole after every finished part, and goes when the result is there. A file of another question, with
which any number could be another one, is refused and stays as it is.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from l2a_jax.errors import UserError, shown
from l2a_jax.evaluation.intervals import INTERVAL
from l2a_jax.files import claim, from_plain, native, read_json, write_json
from l2a_jax.shapes import at_least, each, nullable, require, share, some

log = logging.getLogger("l2a_jax.rivals")
NAME = "rivals.unfinished.json"
_ORDER = [some(at_least(0))]
_SUMS = some(some(float))
SHAPE = {"question": dict, "rates?": some(share), "none?": _SUMS, "all?": _SUMS, "layers?": _ORDER, "heads?": _ORDER,
         "known?": [{"cut": float, "rates": some(share)}],
         "rows?": [{"name": str, "target": share, "own": bool, "density": share, "density_beyond": share,
                    "kept": nullable(float), "kept_95": nullable(INTERVAL), "sums": _SUMS, "prefill_ms?": float,
                    "decode_ms?": float, "ruler?": each({"local": share, "scores": some(share)})}]}
_AGAIN = "take the file away to begin anew, or give another --out"


class Unfinished:
    """The finished `parts` of a question, as they are in the file: the router's `rates`, the sums of nats with nothing
    and all routed, the orders of `layers` and `heads` so far, the cuts that are `known`, and the `rows`."""

    def __init__(self, folder: Path):
        """UserError where there is a file that is not whole; nothing is held against its question yet."""
        self.path = folder / NAME
        self.parts: dict[str, Any] = {}
        self._question: dict[str, Any] | None = None
        if self.path.exists():
            try:
                self.parts = from_plain(read_json(self.path))
                require(self.parts, SHAPE, str(self.path))
            except UserError as error:
                raise UserError(f"{error}. It is not as an interrupted run leaves it: {_AGAIN}") from error
            self._question = self.parts.pop("question")

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.parts.get("rows", [])

    def ask(self, question: dict[str, Any]) -> None:
        """Say what the parts answer. UserError where those of the file answer something else."""
        question, held = native(question), self._question
        if held is not None:
            other = [f"{key} is {shown(held.get(key))} there and {shown(question.get(key))} here"
                     for key in dict.fromkeys([*question, *held]) if held.get(key) != question.get(key)]
            if other:
                raise UserError(f"{self.path} is of another question: {'; '.join(other)}. Ask that one again to go on, "
                                f"{_AGAIN}")
            log.info("%s: goes on from there; rows that are finished: %d", self.path, len(self.rows))
        self._question = question

    def expect(self, rows: list[tuple[str, float]]) -> None:
        """UserError unless the rows are the first of these, by name and target."""
        if [(row["name"], row["target"]) for row in self.rows] != rows[: len(self.rows)]:
            raise UserError(f"{self.path}: the rows are not those of its question: {_AGAIN}")

    def keep(self, **parts: Any) -> None:
        """Add finished parts, and write all of them."""
        self.parts |= native(parts)
        write_json(self.path, {"question": self._question, **self.parts})

    def end(self) -> None:
        """Take the file away: the result holds all of it."""
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[Unfinished]:
    """What `folder` holds, for one process at a time. UserError where another one is at work there."""
    with claim(folder / ".rivals.lock") as other:
        if other is not None:
            raise UserError(f"the rivals in {folder} are being written by {other}; wait for it, or give another --out")
        yield Unfinished(folder)
