"""What rows share in one process: weights, texts, packed data, prompts, and compiled programs.

Compiling a training step takes longer than many a row trains, so a program is kept by all that is compiled into it
(`Row.program`; rates, penalty, number of steps and seed are its arguments), and the programs of the rows to come are
compiled in threads while the present row runs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from l2a_jax import device
from l2a_jax.config import L2AConfig
from l2a_jax.data.dataset import open_data
from l2a_jax.errors import UserError
from l2a_jax.evaluation import needle, perplexity, texts
from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.research.replication import benchmarks, needles
from l2a_jax.research.replication.row import Row
from l2a_jax.runs.plan import Run, RunPlan, compile_run, make_plan, program_key, read_source
from l2a_jax.sharding.mesh import named
from l2a_jax.sources import Pretrained, load_pretrained

log = logging.getLogger("l2a_jax.research.replication")


class Session:
    """`models` maps a size to its source. `mesh`: the axes over which every row is trained and evaluated (None: on one
    device). `compile_ahead`: threads that compile (0: none, everything in its turn)."""

    def __init__(self, models: dict[str, str], data_dir: str | Path, *, backend: str = "auto", mesh: str | None = None,
                 compile_ahead: int = 0):
        self.models, self.data_dir, self.backend = models, str(data_dir), backend
        self.dtype = jnp.dtype(device.default_dtype())
        self.axes, self.mesh = mesh, named(mesh)
        self.passes = {"backend": backend, "batch_tokens": device.batch_tokens(perplexity.BATCH_TOKENS),
                       "mesh": self.mesh}
        self._kept: dict[tuple, Any] = {}
        self._programs: dict[tuple, Run | Future] = {}
        self._threads = ThreadPoolExecutor(compile_ahead) if compile_ahead else None

    def close(self) -> None:
        """Drop what waits to be compiled; what is being compiled ends first."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def source(self, size: str) -> str:
        """Where the weights of a size are. UserError where none were given."""
        if size not in self.models:
            raise UserError(f"this row needs the {size} model; give --model-{size.replace('.', '')} FILE_OR_FOLDER")
        return self.models[size]

    def place(self, path: str) -> str:
        """A path of a row on this machine."""
        return path.replace("{data}", self.data_dir)

    def base(self, size: str) -> Pretrained:
        """The plain model, loaded once."""
        return self.once(("base", size), lambda: load_pretrained(self.source(size), self.dtype))

    def plan(self, row: Row) -> RunPlan:
        """The row's plan, reading nothing twice."""
        return self.once(("plan", row.name, row.training_hash), lambda: make_plan(
            dataclasses.replace(row.settings(self.source(row.size), self.data_dir), mesh=self.axes),
            read=lambda source: self.once(("read", source), lambda: read_source(source)),
            open_data=lambda spec, tokenizer, **options: self.once(
                ("data", spec, id(tokenizer), tuple(sorted(options.items()))),
                lambda: open_data(spec, tokenizer, **options))))

    def program(self, row: Row) -> Run:
        """The row's compiled run: a program of earlier rows with this row's numbers, where one fits."""
        plan, found = self.plan(row), self._programs.get(row.program)
        if isinstance(found, Future):
            found = found.result()
        if found is None or program_key(found.plan) != program_key(plan):
            found = compile_run(plan)
        self._programs[row.program] = found
        return found._replace(plan=plan)

    def compile_ahead(self, rows: list[Row]) -> None:
        """Begin to compile the programs of rows to come, in their order."""
        for row in rows if self._threads is not None else ():
            if row.regime == "baseline" or row.program in self._programs:
                continue
            try:
                self._programs[row.program] = self._threads.submit(compile_run, self.plan(row))
            except UserError:  # said again, to the row that it concerns, when its turn comes
                continue

    def forget_programs(self, rows: list[Row]) -> None:
        """Free the programs that none of `rows`, those still to come, will use."""
        needed = {row.program for row in rows}
        self._programs = {key: program for key, program in self._programs.items() if key in needed}

    def windows(self, row: Row, context: int, limit: int | None) -> Windows:
        """The row's evaluation text in windows; all rows of a model read the same ones."""
        measures, config = row.measures, self.plan(row).config
        path = self.place(measures.text)

        def tokens():
            text = texts.read_text(path)
            tokenizer = self.plan(row).tokenizer
            return texts.tokenise(text, tokenizer, config.vocab_size), {
                "name": text.name, "rule": text.rule, "files": text.files}

        ids, about = self.once(("text", row.size, path), tokens)
        return self.once(("windows", row.size, path, context, limit),
                          lambda: perplexity.text_windows(ids, context, context, about, limit))

    def needles(self, row: Row) -> tuple[Any, dict[int, Windows]]:
        """The row's needle options and prompts."""
        m = row.measures

        def make():
            empty = self._weightless(row)
            options = needle.make_options({"lengths": m.needle_lengths, "depths": m.needle_depths,
                                           "seeds": m.needle_seeds, "haystack": (self.place(m.haystack),)}, empty)
            return options, needles.prepare(empty, options)

        return self.once(("needle", row.size, m.needle_lengths, m.needle_depths, m.needle_seeds, m.haystack), make)

    def benchmark(self, row: Row, name: str) -> benchmarks.Prepared:
        """A benchmark's items for the row's model."""
        m = row.measures
        return self.once(("benchmark", row.size, name, m.task_data, m.limit), lambda: benchmarks.prepare(
            self._weightless(row), name, self.place(m.task_data), m.limit))

    def _weightless(self, row: Row) -> Pretrained:
        """The row's model without its weights: what prompts are made for."""
        plan = self.plan(row)
        return Pretrained(plan.config, None, {}, plan.tokenizer, "")

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` makes, kept for every row of this process."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def evaluation_layer(layer: L2AConfig | None) -> L2AConfig | None:
    """The layer without what only training reads, so that rows that differ in it share their evaluation programs."""
    return None if layer is None else dataclasses.replace(layer, leakage=1.0, flip=0.0, explore=0.0)
