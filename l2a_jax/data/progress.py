"""Progress of a long job: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

QUIET = 10.0
"""Seconds between two lines where there is no terminal; a job that takes less prints only how it ended."""


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """Yields `report(done, note)`: `done` of `total` (None: unknown), and a note such as tokens so far. On stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total, note="")
            yield lambda done, note: bar.update(task, completed=done, note=note)
        return
    last, final = time.monotonic(), ""

    def report(done: int, note: str) -> None:
        nonlocal last, final
        share = f"{min(done / total, 1):4.0%} " if total else ""
        final = note
        if time.monotonic() - last >= QUIET:
            last = time.monotonic()
            print(f"{label}: {share}{note}", file=sys.stderr, flush=True)

    yield report
    print(f"{label}: done, {final}", file=sys.stderr, flush=True)
