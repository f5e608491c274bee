"""The time limit of commands that continue what they had: one exception, one exit status, one sentence.

Standard library alone: a command says so before anything slow has been imported.
"""

from __future__ import annotations

import time

STOPPED = 75  # EX_TEMPFAIL: not an error, run it again
AGAIN = "run the same command again to continue"


class OutOfTime(Exception):
    """The time limit has come; everything that is finished is on disk."""


def after(began: float, seconds: float | None) -> float:
    """When to stop, on the clock of `time.monotonic()`; never where no limit is given."""
    return float("inf") if seconds is None else began + seconds


def check(deadline: float, saved: str = "everything trained and measured so far is saved") -> None:
    """Raise `OutOfTime`, which says what is saved, once the deadline has passed."""
    if time.monotonic() > deadline:
        raise OutOfTime(saved)
