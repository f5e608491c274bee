"""Every flag of `train/study.py`. Free of JAX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from l2a_jax.attention.backends import Backend
from l2a_jax.fields import Filled, Unit, Written, at_least, between, count
from l2a_jax.sharding import axes

Names = tuple[Annotated[str, Unit("name")], ...]
Weights = Annotated[str | None, Filled(), Unit("source"), "hub id, folder or .gguf file"]


@dataclass(frozen=True, kw_only=True)
class HowRun:
    """How they are run."""

    time_limit: Annotated[float | None, at_least(0), Unit("seconds"), "stop cleanly after so long"] = None
    keep: Annotated[bool, "keep what was trained whatever its size (ROW.npz)"] = False
    backend: Backend = "auto"
    mesh: Annotated[str | None, Written(axes.written), Unit("axes"),
                    "devices over which a row's training and evaluation are dealt, such as data=2 (default: one device)"
                    ] = None
    compile_ahead: Annotated[int | None, between(0, 256), Unit("threads"),
                             "threads that compile the rows to come (default: 2 on a GPU, none elsewhere)"] = None
    compiled: Annotated[Path | None, "folder of compiled programs, so that the next process need not compile"] = None


@dataclass(frozen=True, kw_only=True)
class StudyOptions(HowRun):
    """Rows, and what they need."""

    rows: Annotated[Names, "rows by name, in this order, those of one compiled program side by side"] = ()
    group: Annotated[Names, "all rows of these groups (--list says which there are)"] = ()
    list: Annotated[bool, "say which rows there are, and which are done in --out"] = False
    dry_run: Annotated[bool, "say what would be run, with every command, and stop"] = False
    report: Annotated[Path | None, "write replication.md, replication.json and the figures from the rows in --out"
                      ] = None
    limit: Annotated[int | None, count(), Unit("items"), "the first so many items of every benchmark"] = None
    model_05b: Weights = None
    model_15b: Weights = None
    model_3b: Weights = None
    data_dir: Annotated[Path | None, "folder with train/ (texts) and eval/ (and benchmarks)"] = None
    out: Annotated[Path | None, "folder for ROW.json"] = None
