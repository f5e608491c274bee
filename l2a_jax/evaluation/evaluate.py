"""What `eval/run.py` does from start to end: check everything, load, run each task, merge into `eval.json`.

    options -> plan (files read, names known: nothing is computed before all of it is right) -> model -> tasks
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from l2a_jax import commands, device, fields
from l2a_jax.attention import api as attention
from l2a_jax.attention.backends import CHOICES
from l2a_jax.config import L2AConfig, ModelConfig, position_limit
from l2a_jax.data.recall import RecallCorpus, needs_memory
from l2a_jax.errors import UserError, needs
from l2a_jax.evaluation import audit, collapse, intervals, needle, perplexity, pruning_cost, results, subject, texts
from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.evaluation.tasks import FOLDERS
from l2a_jax.fields import DTYPE, SEED, Choice, Filled, Range, between, count, length
from l2a_jax.files import check_file
from l2a_jax.sources import Pretrained, load_pretrained, locate, read_config, run_source, source_tokenizer
from l2a_jax.training.metrics import read_metrics

log = logging.getLogger("l2a_jax.eval")
OWN_TASKS = ("collapse", "perplexity", "audit", "needle")
RECALL_ROWS, RECALL_LENGTH = 64, 128
_NOT_ROUTED = "a share of tokens not routed, such as 0.99"


@dataclass(frozen=True)
class Options:
    """One evaluation. `layer` holds the layer flags that were given; lengths are tokens; None: not given."""

    source: Annotated[str, Filled()]
    tasks: tuple[str, ...]
    text: Annotated[str | None, Filled()] = None
    context: Annotated[int | None, length()] = None
    stride: Annotated[int | None, length()] = None
    max_windows: Annotated[int | None, count()] = None
    audit_seeds: Annotated[int, between(1, 1_000)] = 3
    limit: Annotated[int | None, count()] = None
    num_fewshot: Annotated[int | None, between(0, 1_000)] = None
    task_data: Path | None = None
    log_samples: bool = False
    needle: dict[str, Any] = field(default_factory=dict)
    layer: dict[str, Any] = field(default_factory=dict)
    route: Annotated[str, Choice(*subject.ROUTES)] = "learned"
    prune_layers: tuple[Annotated[int, count(0)], ...] = ()
    prune_sparsity: Annotated[float | None, Range(0, 1, high_included=False, meaning=_NOT_ROUTED)] = None
    calibration: Annotated[str | None, Filled()] = None
    dtype: Annotated[str | None, DTYPE] = None
    backend: Annotated[str, Choice(*CHOICES)] = "auto"
    batch_tokens: Annotated[int | None, count()] = None
    seed: Annotated[int, SEED] = 0
    out: Path | None = None


class Plan(NamedTuple):
    """An evaluation before anything is computed: names known, files read, flags consistent."""

    options: Options
    tasks: tuple[str, ...]
    config: ModelConfig
    own: L2AConfig | None
    layer: L2AConfig | None
    windows: Windows | None
    calibration: Windows | None
    needle: Any
    dtype: str
    batch_tokens: int
    path: Path
    replace: bool

    @property
    def precision(self) -> str | None:
        """float32 means float32 products too, where an accelerator would take shortcuts (a CPU takes none)."""
        return "float32" if self.dtype == "float32" and device.platform() != "cpu" else None


def make_plan(options: Options) -> Plan:
    """Check all that can be checked before weights are read. Raises UserError naming the flag."""
    tasks = _tasks(options.tasks)
    fields.check(options)
    attention.check(options.backend)
    dtype = options.dtype or device.default_dtype()
    if (options.prune_sparsity is None) != (options.calibration is None):
        raise UserError("--prune-sparsity measures the router on --calibration TEXT: give both")
    config, own = read_config(options.source)
    config, layer = subject.layer_of(config, own, options.layer, options.route, options.prune_layers, options.source)
    if "audit" in tasks and layer is None:
        if "audit" in options.tasks:
            raise UserError(f"--tasks audit: {options.source} is a plain model, which routes nothing; give a routed "
                            "one, or --window to put an untrained layer on it")
        tasks = tuple(name for name in tasks if name != "audit")
    if "audit" in tasks and options.route != "learned":
        if "audit" in options.tasks:
            raise UserError(f"--tasks audit: --route {options.route} leaves no decision to audit")
        tasks = tuple(name for name in tasks if name != "audit")
    if options.prune_sparsity is not None and layer is None:
        raise UserError(f"--prune-sparsity: {options.source} is a plain model, which has no layers to prune")
    tokenizer = source_tokenizer(options.source)
    windows = calibration = None
    if {"perplexity", "audit", "collapse"} & set(tasks) or (_pruning(options) and options.text is not None):
        windows = _windows(options, options.text, "--text", tokenizer, config, layer)
    if options.calibration is not None:
        calibration = _windows(options, options.calibration, "--calibration", tokenizer, config, layer)
    lm_tasks = [name for name in tasks if name not in OWN_TASKS]
    if lm_tasks and tokenizer is None:
        raise UserError(f"{options.source} has no tokenizer, which {lm_tasks[0]} needs")
    if lm_tasks:
        needs("lm_eval", "eval", f"--tasks {lm_tasks[0]}")
    if lm_tasks and options.task_data is not None:
        from l2a_jax.evaluation.task_files import read_task

        for name in lm_tasks:
            read_task(name, options.task_data)
    grid = None
    if "needle" in tasks:
        grid = needle.make_options(options.needle, Pretrained(config, layer, {}, tokenizer, ""))
    path, replace = _place(options)
    batch_tokens = options.batch_tokens or device.batch_tokens(perplexity.BATCH_TOKENS)
    return Plan(options, tasks, config, own, layer, windows, calibration, grid, dtype, batch_tokens, path, replace)


def idle(plan: Plan) -> list[tuple[bool, tuple[str, ...], str]]:
    """Where an option changes nothing, as rules for `commands.say_idle`."""
    o, tasks = plan.options, set(plan.tasks)
    reads = bool(tasks & {"perplexity", "audit", "collapse"} or _pruning(o))
    return [
        (not reads, ("text", "context", "stride", "max_windows"), "no task reads a text"),
        (reads and o.text is None and o.calibration is None, ("stride",), "the rows of the recall corpus stand apart"),
        ("audit" not in tasks, ("audit_seeds",), "no routing audit is taken"),
        (tasks <= {*OWN_TASKS}, ("limit", "num_fewshot", "task_data", "log_samples"), "no benchmark is among --tasks"),
        ("needle" not in tasks, tuple(map(_needle_flag, o.needle)), "needle is not among --tasks"),
        (not (tasks & {"perplexity", "audit"} or _pruning(o)), ("batch_tokens",),
         "it is of windows of text (perplexity, audit, pruning)"),
        ("collapse" not in tasks, ("seed",), "only the collapse report samples"),
        (o.route != "learned", ("temperature", "threshold"), f"--route {o.route} leaves nothing to decide"),
        (o.route == "none", ("prune_layers",), "--route none prunes every layer"),
    ]


def evaluate(options: Options) -> tuple[dict[str, Any], Path]:
    """Run every task; returns the merged results and the file that holds them.

    Raises UserError on bad input before anything is computed; tasks that were finished before an error stay written.
    """
    plan = make_plan(options)
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    given = [name for name, default in defaults.items() if getattr(options, name) != default]
    commands.say_idle([*given, *options.layer, *(_needle_flag(name) for name in options.needle)], idle(plan))
    _check_place(plan)
    log.info("%s: %s", options.source, ", ".join(plan.tasks))
    with jax.default_matmul_precision(plan.precision):
        model = subject.with_layer(load_pretrained(options.source, jnp.dtype(plan.dtype)), plan.config, plan.layer,
                                   options.route)
        unpruned = model
        if plan.calibration is not None:
            model = pruning_cost.by_sparsity(model, plan.calibration, options.prune_sparsity, backend=options.backend,
                                             batch_tokens=plan.batch_tokens)
        elif options.prune_layers:
            unpruned = model._replace(l2a_config=dataclasses.replace(
                model.l2a_config, pruned_layers=() if plan.own is None else plan.own.pruned_layers))
        head = subject.describe(model, options.source, options.route, plan.own)
        results.open_results(plan.path, head, replace=plan.replace)
        for name, run in _steps(plan, model, unpruned):
            log.info("%s ...", name)
            started = time.monotonic()
            found = run()
            seconds = time.monotonic() - started
            settings = dataclasses.asdict(options) | {"dtype": plan.dtype, "batch_tokens": plan.batch_tokens}
            origin = results.origin(settings, seconds)
            results.merge_results(plan.path, head, {task: {**entry, "provenance": origin} for task, entry in
                                                    found.items()}, replace=plan.replace)
            log.info("%s: done in %.1f s", name, seconds)
    return results.read_results(plan.path), plan.path


def _steps(plan: Plan, model: Pretrained, unpruned: Pretrained) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """(name, function) in the order of running; collapse first, which also reports on a model that nothing else can
    run. A function returns results by task name."""
    o = plan.options
    passes = {"backend": o.backend, "batch_tokens": plan.batch_tokens}
    steps: list[tuple[str, Callable]] = []
    if "collapse" in plan.tasks:
        steps.append(("collapse", lambda: {"collapse": _collapse(plan, model)}))
    if {"perplexity", "audit"} & set(plan.tasks):

        def text():
            scores = perplexity.score_windows(model, plan.windows, **passes)
            found = {"perplexity": perplexity.result(scores, plan.windows)}
            if "audit" in plan.tasks:
                found["audit"] = audit.audit(model, plan.windows, scores, seeds=o.audit_seeds, **passes)
            return found

        steps.append(("perplexity" + (" and routing audit" if "audit" in plan.tasks else ""), text))
    if _pruning(o):
        steps.append(("pruning", lambda: {"pruning": pruning_cost.report(unpruned, model, plan.windows, **passes)}))
    lm_tasks = tuple(name for name in plan.tasks if name not in OWN_TASKS)
    if lm_tasks:

        def benchmarks():
            from l2a_jax.evaluation.tasks import evaluate_tasks

            return evaluate_tasks(model, lm_tasks, limit=o.limit, num_fewshot=o.num_fewshot, task_data=o.task_data,
                                  backend=o.backend, log_samples=plan.path.parent if o.log_samples else None)

        steps.append((", ".join(lm_tasks), benchmarks))
    if "needle" in plan.tasks:
        steps.append(("needle", lambda: {"needle": needle.run(model, plan.needle, plan.path, o.backend)}))
    return steps


def _collapse(plan: Plan, model: Pretrained) -> dict[str, Any]:
    run = run_source(locate(plan.options.source))
    records = [] if run is None else read_metrics(run.folder / "metrics.jsonl")
    if texts.speaks_recall(model.tokenizer):  # its words are the corpus's: prompts are the beginnings of held-out rows
        prompts, stops = [row[:24].tolist() for row in plan.windows.tokens[:8]], ()
    elif model.tokenizer is None:
        raise UserError(f"{plan.options.source} has no tokenizer, which collapse needs for its prompts")
    else:
        prompts = model.tokenizer.encode_batch(list(collapse.PROMPTS), add_special_tokens=False)
        stops = model.tokenizer.end_ids
    return collapse.collapse(model, plan.windows, prompts=prompts, stop_tokens=stops, records=records,
                             seed=plan.options.seed, backend=plan.options.backend)


def _needle_flag(name: str) -> str:
    return name if name == "haystack" else f"needle_{name}"


def _pruning(options: Options) -> bool:
    return bool(options.prune_layers) or options.prune_sparsity is not None


def _tasks(asked: tuple[str, ...]) -> tuple[str, ...]:
    known = (*OWN_TASKS, *FOLDERS)
    if not asked:
        raise UserError(f"--tasks names nothing; expected some of {', '.join(known)}")
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"--tasks: there is no task {name!r}" + (f" (did you mean {near[0]}?)" if near else "")
                            + f"; expected some of {', '.join(known)}")
    # The audit belongs to every perplexity of a routed model, and cannot do without it.
    both = {"perplexity": ("perplexity", "audit"), "audit": ("perplexity", "audit")}
    return tuple(dict.fromkeys(part for name in asked for part in both.get(name, (name,))))


def _windows(options, entry, flag, tokenizer, config, layer) -> Windows:
    limit = position_limit(config, layer)
    if entry is None:
        if not texts.speaks_recall(tokenizer):
            raise UserError(f"--tasks {','.join(options.tasks)} needs held-out text: give --text FILE (a folder, a "
                            "glob, or wikitext from the hub)")
        return _recall_windows(options, layer, limit)
    if tokenizer is None:
        raise UserError(f"{options.source} has no tokenizer, so {flag} cannot be read with it")
    context = options.context or min(2_048, limit)
    if context > limit:
        raise UserError(f"--context {context} is longer than max_positions x factor = {limit} of {options.source}")
    text = texts.read_text(entry, flag)
    ids = texts.tokenise(text, tokenizer, config.vocab_size)
    about = {"name": text.name, "rule": text.rule, "files": text.files}
    return perplexity.text_windows(ids, context, options.stride or context, about, options.max_windows)


def _recall_windows(options, layer, limit) -> Windows:
    distance = max(24, 0 if layer is None else layer.window + layer.sinks + 1)
    length = max(options.context or RECALL_LENGTH, 2 * distance + 64)
    if length > limit:
        raise UserError(f"without --text this model is scored on the synthetic recall corpus, which needs rows of "
                        f"{length} tokens for a window of {layer.window}, more than its {limit} positions; give "
                        "a smaller --window, or --text")
    log.info("no --text: scored on held-out rows of the synthetic recall corpus, which this model's tokenizer speaks")
    rows = options.max_windows or RECALL_ROWS
    corpus = RecallCorpus(length, rows, distance=distance)
    about = {"name": "synthetic recall corpus, held out", "rule": corpus.fingerprint, "files": {}}
    return perplexity.batch_windows(list(corpus.held_out(1)), about, needs_memory)


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


def _check_place(plan: Plan) -> None:
    """What will be written can be, and what is there can be merged into: found out before anything is computed."""
    samples = [f"samples_{name}.jsonl" for name in plan.tasks if name not in OWN_TASKS and plan.options.log_samples]
    pictures = [needle.picture(plan.path).name] if "needle" in plan.tasks else []
    for name in (plan.path.name, *samples, *pictures):
        check_file(plan.path.with_name(name), "--out" if plan.options.out is not None else "the results")
    if plan.path.exists():
        results.read_results(plan.path)


def _variant(options: Options) -> str:
    """What sets this model apart from its source, as part of a file's name; empty for the source as it is."""
    parts = [f"{name.replace('_', '-')}-{value}" for name, value in sorted(options.layer.items())]
    parts += [f"route-{options.route}"] if options.route != "learned" else []
    parts += [f"pruned-{'-'.join(map(str, options.prune_layers))}"] if options.prune_layers else []
    parts += [f"pruned-sparsity-{options.prune_sparsity:g}"] if options.prune_sparsity is not None else []
    return re.sub(r"[^\w.-]+", "-", "".join(f"-{part}" for part in parts))


def summary(found: dict[str, Any]) -> str:
    """The results as text, one paragraph a task."""
    lines: list[str] = []
    for name, entry in found["tasks"].items():
        if name == "perplexity":
            low, high = entry["perplexity_95"]
            text, count = entry["text"], entry["tokens"]
            lines.append(f"perplexity {entry['perplexity']:.3f} [{low:.3f}, {high:.3f}] over {count:,} tokens "
                         f"of {text['name']} (context {text['context']}, stride {text['stride']}, {text['rule']})")
            if entry.get("recall_accuracy") is not None:
                lines.append(f"recall accuracy {entry['recall_accuracy']:.1%}")
            if entry.get("sparsity") is not None:
                layers = " ".join(f"{value:.0%}" for value in entry.get("sparsity_per_layer") or ())
                lines.append(f"local: {entry['sparsity']:.1%} (by layer: {layers})")
        elif name == "audit":
            lines += ["routing audit:", audit.format_audit(entry)]
        elif name == "collapse":
            lines.append(collapse.format_collapse(entry))
        elif name == "pruning":
            lines.append(pruning_cost.format_report(entry))
        elif name == "needle":
            lines.append(needle.format_table(entry))
        else:
            shown = [f"{metric} {entry[metric]:.3f} +- {intervals.Z * entry[f'{metric}_stderr']:.3f}"
                     for metric in ("acc", "acc_norm")
                     if entry.get(metric) is not None and entry.get(f"{metric}_stderr") is not None]
            lines.append(f"{name}: {', '.join(shown)} (95 %, {entry['n']} items, {entry['num_fewshot']}-shot)")
    return "\n".join(lines)
