"""`eval.json`: one model's results by task, each with what is needed to repeat and to trust it.

A file belongs to one model, its layer included: results of other weights or of another layer never mix. Tasks are
merged as they finish, each write whole or not at all, so an interrupted evaluation keeps what it had.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from typing import Any

from l2a_jax import commands
from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.errors import UserError
from l2a_jax.evaluation import registry
from l2a_jax.files import claim, from_plain, plain, read_json, write_json
from l2a_jax.provenance import provenance
from l2a_jax.shapes import each, require, require_length

log = logging.getLogger("l2a_jax.eval")
FILE = "eval.json"
IDENTITY = ("source_hash", "model_config", "l2a_config", "route")
"""What two results must share to stand in one file."""
WAIT = 60.0
"""Seconds to wait for another process that is merging into the same file; it takes milliseconds."""


_RUN = {f"{name}?": float for name in ("trained_parameters", "tokens_seen", "tokens_per_trained_parameter")}
RESULTS = {"source": str, "source_hash": str, "size?": str, "regime": str, "route?": str, "run?": _RUN,
           "tasks": each(dict)}


def check(found: Any, where: str) -> None:
    """UserError naming `where` (the file) and the key on what the readers of results could not read.

    A task that is not there was not run; one that is there has to be whole.
    """
    require(found, RESULTS, where)
    for name, entry in found["tasks"].items():
        task, place = registry.module(name), f"{where}: task {name}"
        require(entry, task.SHAPE(entry) if callable(task.SHAPE) else task.SHAPE, place)
        for key, other in getattr(task, "LENGTHS", {}).items():
            size, why = (entry[other], "which is n") if other == "n" else (len(entry[other]), f"as {other}")
            require_length(size * [0] if entry.get(key) is None else entry[key], size, f"{place}: {key}", why)


def origin(settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """When, where, by which command, with which versions and settings a result was made, and how long it took."""
    return {**provenance(), "seconds": round(seconds, 2),
            "settings": {name: str(value) if isinstance(value, pathlib.Path) else value
                         for name, value in settings.items()}}


def open_results(path: pathlib.Path, model: dict[str, Any], *, replace: bool) -> dict[str, Any]:
    """The results in `path`, or none yet, for the model described by `model` (which holds the `IDENTITY`).

    Where the file is about another model, `replace` starts anew (a run that was trained further); otherwise UserError.
    """
    fresh = {**plain(model), "tasks": {}}
    if not path.exists():
        return fresh
    old = read_results(path)
    differs = [name for name in IDENTITY if _today(name, old.get(name)) != _today(name, fresh[name])]
    if not differs:
        return {**fresh, "tasks": old["tasks"]}
    if not replace:
        raise UserError(f"{path} holds the results of another model (its {', '.join(differs)} differ); choose another "
                        "--out")
    log.warning("%s is about earlier weights (its %s differ) and is replaced", path, ", ".join(differs))
    return fresh


def _today(name: str, said: Any) -> Any:
    """What a file says of the model, where a configuration of before a field was added gets the field's default."""
    kind = {"model_config": ModelConfig, "l2a_config": L2AConfig}.get(name)
    if kind is None or not isinstance(said, dict):
        return said
    return plain({field.name: field.default for field in dataclasses.fields(kind)
                  if field.default is not dataclasses.MISSING}) | said


def read_results(path: pathlib.Path) -> dict[str, Any]:
    """The results in a file: of the shape that its readers expect, numbers that are not finite as numbers.

    UserError naming the file and the key where it is not so.
    """
    found = from_plain(read_json(path))
    try:
        check(found, str(path))
    except UserError as error:
        raise UserError(f"{error}. It is not as {commands.spelled('eval/run.py')} writes it: move "
                        "it away, and evaluate again") from error
    return found


def merge_results(path: pathlib.Path, model: dict[str, Any], tasks: dict[str, Any], *, replace: bool) -> dict[str, Any]:
    """Add `tasks` to what the file holds now, which another evaluation may have written meanwhile; returns all of it.

    Makes the file, and its folder, where there is none. UserError as `open_results`, or where it cannot be written.
    """
    with claim(path.with_name(f".{path.name}.lock"), wait=WAIT) as other:
        if other is not None:
            raise UserError(f"{path} is being written by {other}, for {WAIT:.0f} s now; stop it, and evaluate again")
        results = open_results(path, model, replace=replace)
        results["tasks"] |= plain(tasks)
        write_json(path, results)
    return results
