"""Many rows in one process: train, measure, write ROW.json; skip what is done, stop cleanly at the time limit.

Several processes, one a GPU, may share a folder: a row belongs to whoever locks it first, until it is done or its
process ends. A row's file is rewritten after each phase, whole or not at all, so that an interrupted study keeps what
it had. What a rerun needs beyond it is kept only where it is small: trained leaves of up to `KEEP_BYTES` (a router and
its norms) go to ROW.npz, with which later tasks are answered without training again.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from l2a_jax import device
from l2a_jax.errors import UserError
from l2a_jax.files import check_file, claim, write_json
from l2a_jax.provenance import provenance
from l2a_jax.research.deadline import OutOfTime, check
from l2a_jax.research.replication.measures import EvaluatedRow, measure
from l2a_jax.research.replication.row import Row
from l2a_jax.research.replication.row_file import FORMAT, read_row
from l2a_jax.research.replication.session import Session
from l2a_jax.research.replication.trained import load_masters, save_masters, train_row
from l2a_jax.training.loop import Stopped
from l2a_jax.training.memory import tree_bytes

log = logging.getLogger("l2a_jax.research.replication")
KEEP_BYTES = 2_000_000
SPEED = {"0.5b": 90_000, "1.5b": 35_000, "3b": 15_000}
"""Tokens a second that a row is planned with before one of its size was run: cautious for an H100."""
OVERHEAD = 60.0
"""Seconds beside training that a row is planned with."""


def order(rows: Sequence[Row]) -> list[Row]:
    """The rows, those of one compiled program side by side, programs in the order of their first row."""
    place: dict[tuple, int] = {}
    for row in rows:
        place.setdefault(row.program, len(place))
    return sorted(rows, key=lambda row: place[row.program])


def planned_seconds(row: Row, speeds: dict[tuple[str, str], float] | None = None,
                    tokens: float | None = None) -> float:
    """How long the row is expected to take; `speeds` are measured tokens a second by (size, regime), `tokens` those
    that it trains on (None: as its settings say)."""
    if row.regime == "baseline":
        return OVERHEAD
    speed = (speeds or {}).get((row.size, row.regime), SPEED[row.size])
    return OVERHEAD + (row.settings().tokens or 0 if tokens is None else tokens) / speed


def is_done(row: Row, out: Path) -> bool:
    """Whether the row's file answers everything that the row asks today."""
    found = read_row(out / f"{row.name}.json")
    return found is not None and found["training_hash"] == row.training_hash and not _missing(row, found)


@contextmanager
def claimed(row: Row, out: Path) -> Iterator[bool]:
    """Whether the row is this process's to run, for as long as the block lasts; the system frees it if we die."""
    with claim(out / ".locks" / f"{row.name}.lock") as other:
        yield other is None


def run_rows(rows: Sequence[Row], session: Session, out: Path, *, deadline: float = float("inf"),
             keep: bool = False) -> tuple[list[str], list[str]]:
    """Run what is not done and no other process runs, in `order`; returns the names of (rows left for want of time,
    rows that failed). What another process runs is looked at once more at the end, in case it gave up.

    A row that cannot run (it does not fit the device) fails by itself, with its error in its file. Raises
    KeyboardInterrupt when asked to stop, and UserError where `out` cannot be written or holds a damaged file.
    """
    check_file(out / ".locks" / "row.lock", "--out")
    waiting = [row for row in order(rows) if row.not_run is None and not is_done(row, out)]
    log.info("%d rows: %d to do, %d done, %d not to be run", len(rows), len(waiting),
             sum(row.not_run is None for row in rows) - len(waiting), sum(row.not_run is not None for row in rows))
    speeds: dict[tuple[str, str], float] = {}
    began = time.time()
    left: list[str] = []
    failed: list[str] = []
    taken: list[Row] = []
    for again in (False, True):
        queue = taken if again else waiting
        for index, row in enumerate(queue):
            with claimed(row, out) as mine:
                if not mine:
                    log.info("%s is run by another process", row.name)
                    if not again:
                        taken.append(row)
                elif is_done(row, out):
                    log.info("%s was done by another process", row.name)
                elif _failed_since(began, out / f"{row.name}.json"):
                    log.info("%s failed in another process", row.name)
                elif deadline - time.monotonic() < planned_seconds(row, speeds):
                    left.append(row.name)
                else:
                    log.info("[%d/%d] %s (%s)", index + 1, len(queue), row.name, row.question)
                    ended, speed = _attempt(row, queue[index:], session, out, deadline, keep)
                    if ended != "done":
                        {"left": left, "failed": failed}[ended].append(row.name)
                    elif speed:
                        speeds[row.size, row.regime] = speed
            session.forget_programs([*queue[index + 1 :], *taken])
    return left, failed


def _failed_since(began: float, path: Path) -> bool:
    """Whether another process has tried and failed: what does not fit its device fits ours no better."""
    return path.exists() and path.stat().st_mtime >= began and read_row(path)["status"] == "failed"


def _attempt(row: Row, coming: Sequence[Row], session: Session, out: Path, deadline: float,
             keep: bool) -> tuple[str, float | None]:
    """Run one row, the first of those `coming`: how it ended (done, left, failed), and its tokens a second."""
    try:
        session.compile_ahead(coming[:3])
        return "done", _run_row(row, session, out, deadline, keep)["training"].get("tokens_per_second_median")
    except OutOfTime:
        return "left", None
    except Stopped as stopped:
        raise KeyboardInterrupt from stopped
    except (UserError, jax.errors.JaxRuntimeError) as error:  # the device's own errors, memory above all, too
        log.error("%s failed: %s", row.name, error)
        _write_failure(out / f"{row.name}.json", row, str(error))
        return "failed", None


def _run_row(row: Row, session: Session, out: Path, deadline: float, keep: bool) -> dict[str, Any]:
    path, kept = out / f"{row.name}.json", out / f"{row.name}.npz"
    old = read_row(path)
    if old is not None and (old["training_hash"] != row.training_hash or not old["training"]):
        old = None
    if old is not None and (row.regime == "baseline" or kept.exists()):
        params = session.base(row.size).params if row.regime == "baseline" else load_masters(session, row, kept)
        found = {**_head(row, old["environment"]), "training": old["training"], "evaluations": _current(row, old)}
        records = old["training"].get("curve", [])
    else:
        kept.unlink(missing_ok=True)
        trained = train_row(session, row)
        params, records = trained.params, trained.records
        found = {**_head(row, environment()), "training": trained.report, "evaluations": {}}
        if trained.masters and (keep or tree_bytes(trained.masters) <= KEEP_BYTES):
            save_masters(trained.masters, kept)
        del trained
        _write(path, found, "partial")
    evaluated = EvaluatedRow(session, row, params, records, out)
    for task in _missing(row, found):
        check(deadline)
        began = time.perf_counter()
        result = measure(evaluated, task)
        seconds = time.perf_counter() - began
        found["evaluations"][task] = {"hash": row.task_hash(task), "seconds": round(seconds, 2), "result": result,
                                      **_elsewhere(found["environment"])}
        log.info("%s: %s in %.1f s", row.name, task, seconds)
        _write(path, found, "partial")
    found["training"].setdefault("memory", {}).setdefault("process_peak_after_gb", device.peak_memory_gb())
    _write(path, found, "done")
    return found


def _current(row: Row, found: dict[str, Any]) -> dict[str, Any]:
    return {task: entry for task, entry in found["evaluations"].items()
            if task not in row.measures.tasks or row.accepts(task, entry["hash"])}


def _missing(row: Row, found: dict[str, Any]) -> list[str]:
    have = found["evaluations"]
    return [task for task in row.measures.tasks if task not in have or not row.accepts(task, have[task]["hash"])]


def environment() -> dict[str, Any]:
    """Where something was run; without the command, whose paths are this machine's."""
    origin = provenance()
    return {name: origin[name] for name in ("date", "device", "versions", "revision")}


def _elsewhere(trained: dict[str, Any]) -> dict[str, Any]:
    """The environment of an evaluation that is not the one that the row was trained in."""
    here = environment()
    return {} if all(here[name] == trained[name] for name in ("device", "versions")) else {"environment": here}


def _head(row: Row, where: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT, "name": row.name, "group": row.group, "question": row.question, "size": row.size,
        "regime": row.regime, "given": dict(row.given), "data": list(row.data), "baseline": row.baseline,
        "factors": dict(row.factors), "measures": dataclasses.asdict(row.measures),
        "training_hash": row.training_hash, "settings": _portable(row), "commands": row.commands(),
        "environment": where,
    }


def _portable(row: Row) -> dict[str, Any]:
    """Settings without this machine's paths."""
    return dataclasses.asdict(row.settings())


def _write(path: Path, found: dict[str, Any], status: str) -> None:
    evaluated = sum(entry["seconds"] for entry in found["evaluations"].values())
    training = found["training"].get("seconds", {})
    write_json(path, {**found, "status": status, "seconds": {**training, "evaluate": round(evaluated, 2)}})


def _write_failure(path: Path, row: Row, error: str) -> None:
    """What the row had before it failed stays, and can be continued."""
    old = read_row(path)
    if old is None or old["training_hash"] != row.training_hash:
        old = {**_head(row, environment()), "training": {}, "evaluations": {}}
    write_json(path, {**old, "status": "failed", "error": error})


def dry_run(rows: Sequence[Row], session: Session) -> str:
    """What would be run: each row's command, tokens, trained parameters and ratio, and the sum of them; nothing is
    compiled or trained."""
    from l2a_jax.models.params import abstract_params
    from l2a_jax.training.regimes import count_parameters, regime_mask

    lines, run, all_tokens, seconds = [], 0, 0, 0.0
    for row in order(rows):
        if row.not_run is not None:
            lines.append(f"{row.name}: not run: {row.not_run}")
        else:
            plan = session.plan(row)
            shapes = abstract_params(plan.config, plan.l2a_config)
            trained = count_parameters(shapes, regime_mask(shapes, row.regime), plan.settings.attention_layers)
            tokens = 0 if not trained else plan.data.tokens_read(plan.steps * plan.settings.grad_accum)
            ratio = f", {tokens / trained:.3g} a trained parameter" if trained else ""
            needed = planned_seconds(row, tokens=tokens)
            lines.append(f"{row.name}: {trained:,} trained, {tokens:,.0f} tokens{ratio}, about {needed:.0f} s")
            run, all_tokens, seconds = run + 1, all_tokens + tokens, seconds + needed
        lines += [f"  {command}" for command in row.commands()]
    return "\n".join([*lines, f"in all {run} rows, {all_tokens:,.0f} tokens, about {seconds / 60:.0f} min"])
