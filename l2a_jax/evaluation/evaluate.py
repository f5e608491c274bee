"""What `eval/run.py` does from start to end: check everything, load, run each task, merge into `eval.json`.

    options -> setup (files read, names known: nothing is computed before all of it is right) -> model -> tasks
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from l2a_jax import commands, device, fields
from l2a_jax.attention import api as attention
from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.errors import UserError
from l2a_jax.evaluation import perplexity, pruning_cost, registry, results, subject
from l2a_jax.evaluation.options import Options
from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.evaluation.windows import windows_of
from l2a_jax.files import check_file
from l2a_jax.inference.pruning import check_prunable
from l2a_jax.sharding import whole
from l2a_jax.sharding.mesh import named
from l2a_jax.sources import Pretrained, load_pretrained, locate, read_config, run_source, source_tokenizer

log = logging.getLogger("l2a_jax.eval")


class Setup(NamedTuple):
    """An evaluation before anything is computed: names known, files read, flags consistent."""

    options: Options
    tasks: tuple[str, ...]
    config: ModelConfig
    own: L2AConfig | None
    layer: L2AConfig | None
    windows: Windows | None
    calibration: Windows | None
    prepared: dict[str, Any]
    dtype: str
    batch_tokens: int
    path: Path
    replace: bool

    @property
    def precision(self) -> str | None:
        """float32 means float32 products too, where an accelerator would take shortcuts (a CPU takes none)."""
        return "float32" if self.dtype == "float32" and device.platform() != "cpu" else None

    @property
    def mesh(self) -> Mesh | None:
        """The devices over which the work is dealt; None: one device."""
        return named(self.options.mesh)


def set_up(options: Options) -> Setup:
    """Check all that can be checked before weights are read. Raises UserError naming the flag."""
    tasks = _tasks(options.tasks)
    fields.check(options)
    attention.check(options.backend)
    named(options.mesh)  # refused before anything is read
    dtype = options.dtype or device.default_dtype()
    if (options.prune_sparsity is None) != (options.calibration is None):
        raise UserError("--prune-sparsity measures the router on --calibration TEXT: give both")
    config, own = read_config(options.source)
    config, layer = subject.layer_of(config, own, options.layer, options.route, options.prune_layers, options.source)
    if layer is None or options.route != "learned":
        for name in [name for name in options.tasks if registry.find(name).routed]:
            subject.check_routed(layer, f"--tasks {name}", subject.INSTEAD, options.source)
            raise UserError(f"--tasks {name}: --route {options.route} leaves no decision to audit")
        tasks = tuple(name for name in tasks if not registry.find(name).routed)
    if options.prune_sparsity is not None:
        check_prunable(layer, "--prune-sparsity", options.source)
    bare = Pretrained(config, layer, {}, source_tokenizer(options.source), "")
    windows = calibration = None
    if any(registry.find(name).shared for name in tasks) or (_pruning(options) and options.text is not None):
        windows = windows_of(options, options.text, "--text", bare)
    if options.calibration is not None:
        calibration = windows_of(options, options.calibration, "--calibration", bare)
    prepared = {name: registry.module(name).prepare(name, options, bare)
                for name in tasks if hasattr(registry.module(name), "prepare")}
    path, replace = _place(options)
    batch_tokens = options.batch_tokens or device.batch_tokens(perplexity.BATCH_TOKENS)
    return Setup(options, tasks, config, own, layer, windows, calibration, prepared, dtype, batch_tokens, path, replace)


def idle(setup: Setup) -> list[tuple[bool, tuple[str, ...], str]]:
    """Where an option changes nothing, as rules for `commands.say_idle`."""
    o, tasks = setup.options, _wanted(setup)
    read = {flag for name in tasks for flag in registry.find(name).reads}
    readers: dict[str, list[str]] = {}
    for name, task in registry.TASKS.items():
        for flag in task.reads:
            readers.setdefault(flag, []).append(name)
    return [
        *((flag not in read, (flag,), f"it is of {', '.join(names)}; none of these is run")
          for flag, names in readers.items()),
        ("text" in read and o.text is None and o.calibration is None, ("stride",),
         "the rows of the recall corpus stand apart"),
        (o.route != "learned", ("temperature", "threshold"), f"--route {o.route} leaves nothing to decide"),
        (o.route == "none", ("prune_layers",), "--route none prunes every layer"),
    ]


def evaluate(options: Options) -> tuple[dict[str, Any], Path]:
    """Run every task; returns the merged results and the file that holds them.

    Raises UserError on bad input before anything is computed; tasks that were finished before an error stay written.
    """
    setup = set_up(options)
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    given = [name for name, default in defaults.items() if getattr(options, name) != default]
    commands.say_idle([*given, *options.layer, *(_needle_flag(name) for name in options.needle)], idle(setup))
    _check_place(setup)
    log.info("%s: %s", options.source, ", ".join(setup.tasks))
    if _pruning(options) and setup.windows is None:
        log.info("without --text it is not scored what pruning costs in perplexity")
    with jax.default_matmul_precision(setup.precision):
        model = subject.with_layer(load_pretrained(options.source, jnp.dtype(setup.dtype)), setup.config, setup.layer,
                                   options.route)
        model = model._replace(params=whole.put(model.params, setup.mesh))
        unpruned = model
        if setup.calibration is not None:
            model = pruning_cost.by_sparsity(model, setup.calibration, options.prune_sparsity, backend=options.backend,
                                             batch_tokens=setup.batch_tokens, mesh=setup.mesh)
        elif options.prune_layers:
            unpruned = model._replace(l2a_config=dataclasses.replace(
                model.l2a_config, pruned_layers=() if setup.own is None else setup.own.pruned_layers))
        head = subject.describe(model, options.source, options.route, setup.own)
        held = results.open_results(setup.path, head, replace=setup.replace)["tasks"]
        started = time.monotonic()

        def keep(found: dict[str, Any]) -> None:
            settings = dataclasses.asdict(options) | {"dtype": setup.dtype, "batch_tokens": setup.batch_tokens}
            origin = results.origin(settings, time.monotonic() - started)
            results.merge_results(setup.path, head, {task: {**entry, "provenance": origin} for task, entry in
                                                    found.items()}, replace=setup.replace)

        for name, run in _steps(setup, model, unpruned, held, keep):
            log.info("%s ...", name)
            started = time.monotonic()
            keep(run())
            log.info("%s: done in %.1f s", name, time.monotonic() - started)
    return results.read_results(setup.path), setup.path


def _steps(setup: Setup, model: Pretrained, unpruned: Pretrained, held: dict[str, Any], keep: Callable[[dict], None]
           ) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """(name, function) in the order of running. A function returns results by task name, as `held` has those that the
    file holds and `keep` takes those of a task that is not done yet."""
    passes = {"backend": setup.options.backend, "batch_tokens": setup.batch_tokens, "mesh": setup.mesh}
    score = functools.cache(lambda: perplexity.score_windows(model, setup.windows, **passes))

    def step(name: str) -> tuple[str, Callable[[], dict[str, Any]]]:
        work = registry.Work(name, setup.options, model, unpruned, setup.windows, setup.prepared.get(name), passes,
                             score, setup.path, held.get(name), lambda entry: keep({name: entry}))
        return name, lambda: {name: registry.module(name).task(work)}

    wanted = _wanted(setup)
    return [step(name) for name in {**registry.TASKS, **dict.fromkeys(wanted)} if name in wanted]


def _wanted(setup: Setup) -> tuple[str, ...]:
    """The tasks asked for and, where layers are pruned and there is a text to score, what that costs."""
    return (*setup.tasks, *(["pruning"] if _pruning(setup.options) and setup.windows is not None else []))


def _needle_flag(name: str) -> str:
    return name if name == "haystack" else f"needle_{name}"


def _pruning(options: Options) -> bool:
    return bool(options.prune_layers) or options.prune_sparsity is not None


def _tasks(asked: tuple[str, ...]) -> tuple[str, ...]:
    if not asked:
        raise UserError(f"--tasks names nothing; expected {registry.EXPECTED}")
    for name in asked:
        if not registry.find(name).asked:
            raise UserError(f"--tasks: {name} is asked for by flags of its own; expected {registry.EXPECTED}")
    wanted = {*asked, *(other for name in asked for other in registry.find(name).also)}
    others = dict.fromkeys(name for name in asked if name not in registry.ASKED)
    return (*(name for name in registry.ASKED if name in wanted), *others)


def _place(options: Options) -> tuple[Path, bool]:
    """(the file for the results, whether results of other weights in it may be replaced)."""
    variant = _variant(options)
    if options.out is not None:
        return options.out / results.FILE, False
    run = run_source(locate(options.source))
    if run is not None:
        return run.folder / (f"eval{f'-{run.label}' if run.label else ''}{variant}.json"), True
    name = re.sub(r"[^\w.-]+", "-", Path(options.source).name or "model").removesuffix(".gguf")
    place = Path("runs") / f"eval-{name}{variant}" / results.FILE
    log.info("no --out: results go to %s", place)
    return place, False


def _check_place(setup: Setup) -> None:
    """What will be written can be, and what is there can be merged into: found out before anything is computed."""
    made = [file for name in setup.tasks if hasattr(registry.module(name), "writes")
            for file in registry.module(name).writes(name, setup.options, setup.prepared[name], setup.path)]
    for name in (setup.path.name, *made):
        check_file(setup.path.with_name(name), "--out" if setup.options.out is not None else "the results")
    if setup.path.exists():
        results.read_results(setup.path)


def _variant(options: Options) -> str:
    """What sets this model apart from its source, as part of a file's name; empty for the source as it is."""
    parts = [f"{name.replace('_', '-')}-{value}" for name, value in sorted(options.layer.items())]
    parts += [f"route-{options.route}"] if options.route != "learned" else []
    parts += [f"pruned-{'-'.join(map(str, options.prune_layers))}"] if options.prune_layers else []
    parts += [f"pruned-sparsity-{options.prune_sparsity:g}"] if options.prune_sparsity is not None else []
    return re.sub(r"[^\w.-]+", "-", "".join(f"-{part}" for part in parts))


def summary(found: dict[str, Any]) -> str:
    """The results as text, one paragraph a task."""
    return "\n".join((f"{name}: " if registry.of_lm_eval(name) else "") + registry.module(name).told(entry)
                     for name, entry in found["tasks"].items())
