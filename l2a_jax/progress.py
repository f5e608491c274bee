"""How far a long job is: a bar on a terminal, a line now and then elsewhere. On standard error."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FIRST, QUIET = 1.0, 10.0
"""Seconds to the first line, and between two, where there is no terminal; a job that takes less says how it ended."""


@contextmanager
def progress(label: str, total: int | None, *, start: int = 0,
             least: float = 0.0) -> Iterator[Callable[[int, str], None]]:
    """Yields `report(done, note)`: `done` of `total` (None: unknown), and a note such as tokens so far.

    `start`: what was done before, which says nothing of the time that is left. A job that takes less than `least`
    seconds is not spoken of.
    """
    if not logging.getLogger("l2a_jax").isEnabledFor(logging.WARNING):  # another process tells of the job
        yield lambda done, note: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total, completed=start, note="")
            yield lambda done, note: bar.update(task, completed=done, note=note)
        return
    began = time.monotonic()
    told, final = began + FIRST - QUIET, ""

    def report(done: int, note: str) -> None:
        nonlocal told, final
        now, final = time.monotonic(), note
        if now - told < QUIET:
            return
        told, share, left = now, "", ""
        if total:
            share = f"{min(done / total, 1):4.0%} "
            if start < done < total:
                left = f", {duration((now - began) / (done - start) * (total - done))} left"
        print(f"{label}: {share}{note}{left}", file=sys.stderr, flush=True)

    yield report
    took = time.monotonic() - began
    if took >= least:
        print(f"{label}: done in {duration(took)}, {final}", file=sys.stderr, flush=True)


@contextmanager
def gigabytes(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """`progress` of so many bytes, nothing of which is said where it takes less than a second; yields `add(bytes)`."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        report(done, f"{done / 1e9:.2f} of {total / 1e9:.2f} GB")

    with progress(label, total, least=FIRST) as report:
        yield add


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8 s, 3 min, 2.5 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else \
        f"{seconds / 3600:.1f} h"
