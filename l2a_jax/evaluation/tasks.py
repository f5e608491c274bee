"""Benchmarks through lm-eval: its task definitions, prompts and metrics; our log-likelihoods and texts.

The documents come from the hub, or from files of one's own (`task_files`) where there is no network.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from l2a_jax.errors import UserError, few, needs
from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.columns import CELL, DIFFERENCE, SCORE, Column, change, interval
from l2a_jax.evaluation.registry import ASKED, BENCHMARKS, EXPECTED, Work
from l2a_jax.evaluation.task_files import LOCAL_TASKS, TaskFile, read_task
from l2a_jax.files import plain, whole
from l2a_jax.shapes import at_least, each, one_of, share, some
from l2a_jax.sources import Pretrained

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from lm_eval.api.task import Task

log = logging.getLogger("l2a_jax.eval")

FEWSHOT_SEED = 1_234
"""lm-eval's own default."""
SERVED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
"""What lm-eval's tasks ask of a model."""
GENERATES = "generate_until"
METRICS = {"acc": "correct", "acc_norm": "correct_norm"}
"""Metrics of a choice, and where each item's 0 or 1 stands; all others stand in `scores`, by metric and filter."""
LENGTHS = {"correct": "n", "correct_norm": "n"}


def SHAPE(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry holds its accuracy, or scores by metric and filter, each with a value an item."""
    known = {"n": at_least(1), "num_fewshot": int, "acc_stderr?": float, "acc_norm?": share,
             "correct_norm?": some(one_of(0, 1)), "acc_norm_stderr?": float}
    if "scores" not in entry:
        return {**known, "acc": share, "correct": some(one_of(0, 1))}
    return {**known, "acc?": share, "correct?": some(one_of(0, 1)),
            "scores": each({"value": float, "stderr?": float, "items?": [float, entry.get("n")]})}


class Benchmark(NamedTuple):
    """A task of lm-eval's with its documents, and the file that they came from (None: the hub)."""

    task: Task
    file: TaskFile | None


def prepare(name: str, options: Any, model: Pretrained) -> dict[str, Benchmark]:
    if model.tokenizer is None:
        raise UserError(f"{options.source} has no tokenizer, which {name} needs")
    needs("lm_eval", "eval", f"--tasks {name}")
    return load((name,), options.task_data, options.num_fewshot, options.limit)


def writes(name: str, options: Any, prepared: dict[str, Benchmark], path: Path) -> list[str]:
    return [_samples_file(name)] if options.log_samples or prepared[name].task.OUTPUT_TYPE == GENERATES else []


def task(work: Work) -> dict[str, Any]:
    o = work.options
    samples = work.path.parent if writes(work.name, o, work.prepared, work.path) else None
    return evaluate_tasks(work.model, (work.name,), limit=o.limit, num_fewshot=o.num_fewshot, task_data=o.task_data,
                          backend=o.backend, batch_tokens=o.batch_tokens, mesh=work.mesh,
                          log_samples=samples, loaded=work.prepared)[work.name]


class Metric(NamedTuple):
    """A metric of an entry, wherever it stands there; `items`: its value for each, where that is a number."""

    name: str
    value: float
    stderr: float | None
    items: list[float] | None


def metrics(entry: dict[str, Any]) -> list[Metric]:
    """The metrics of an entry, the accuracies of a choice first."""
    choice = [Metric(name, entry[name], entry.get(f"{name}_stderr"), entry.get(items))
              for name, items in METRICS.items() if entry.get(name) is not None]
    return choice + [Metric(name, score["value"], score.get("stderr"), score.get("items"))
                     for name, score in entry.get("scores", {}).items()]


def told(entry: dict[str, Any]) -> str:
    """The metrics with their 95 % intervals."""
    texts = [f"{one.name} {one.value:.3f}" + ("" if one.stderr is None else f" +- {intervals.Z * one.stderr:.3f}")
             for one in metrics(entry)]
    return f"{', '.join(texts)} (95 %, {entry['n']} items, {entry['num_fewshot']}-shot)"


LABELS = {"hellaswag": "HellaSwag acc / norm", "piqa": "PIQA acc / norm", "arc_challenge": "ARC-C acc / norm",
          "gsm8k": "GSM8K strict / flexible"}
"""How the table of runs names a task; one that is not here has its own name, and a column where a run has it."""
STUDY = ("hellaswag", "piqa", "arc_challenge")
"""What the study reported. It does not say which accuracy; acc resembles its numbers, and acc_norm stands after a
stroke."""


def columns(name: str) -> tuple[Column, ...]:
    shape = {**CELL, "acc_norm?": float, "difference?": DIFFERENCE, "others?": each(float), "scale?": float}
    return (Column(name, LABELS.get(name, name), SCORE, shape, functools.partial(_cell, name), _text,
                   lambda share: f"{100 * share:.1f}", always=name in STUDY),)


def _cell(name: str, entry: dict[str, Any], other: dict[str, Any] | None, say: Callable[[str], None]) -> dict[str, Any]:
    """The first of an entry's metrics, and the others beside it; differences are paired over items."""
    same = other is not None and all(entry.get(key) == other.get(key) for key in (
        "n", "num_fewshot", "source", "version", "limit"))
    if other is not None and not same:
        say(f"{name} is of other items or shots than the baseline's: no paired difference")
    baseline = {metric.name: metric.items for metric in metrics(other)} if same else {}
    first, *others = metrics(entry)
    cell = {"value": first.value, "interval": _interval(first), "n": entry["n"], "num_fewshot": entry["num_fewshot"],
            "difference": _paired(first, baseline)}
    if first.name != "acc":
        return cell | {"metric": first.name, "scale": 100 if _shares(first) else 1,
                       "others": {metric.name: metric.value for metric in others}}
    norm = next((metric for metric in others if metric.name == "acc_norm"), None)
    return cell | {"acc_norm": None if norm is None else norm.value,
                   "acc_norm_interval": None if norm is None or not norm.items else _interval(norm),
                   "difference_norm": None if norm is None else _paired(norm, baseline)}


def _shares(metric: Metric) -> bool:
    """Whether its items are 0 or 1."""
    return bool(metric.items) and set(metric.items) <= {0, 1}


def _interval(metric: Metric) -> list[float]:
    if _shares(metric):
        return list(intervals.share(sum(metric.items), len(metric.items)))
    return list(intervals.around(metric.value, math.nan if metric.stderr is None else metric.stderr))


def _paired(metric: Metric, baseline: dict[str, list[float] | None]) -> dict[str, Any] | None:
    theirs = baseline.get(metric.name)
    if not metric.items or not theirs:
        return None
    difference, bounds = intervals.paired_items(metric.items, theirs)
    return {"value": difference, "interval": list(bounds)}


def _text(cell: dict[str, Any], versus: bool) -> str:
    scale = cell.get("scale") or 100
    others = [cell["acc_norm"]] if cell.get("acc_norm") is not None else (cell.get("others") or {}).values()
    shown = interval(cell, f"n={cell['n']}", scale, 1) + "".join(f" / {scale * value:.1f}" for value in others)
    if versus and cell["difference"]:
        shown += f"<br>Δ {'' if cell.get('metric') else 'acc '}{change(cell['difference'], scale, 1)}"
    return shown


def evaluate_tasks(
    model: Pretrained,
    names: tuple[str, ...],
    *,
    limit: int | None,
    num_fewshot: int | None,
    task_data: Path | None,
    backend: str = "auto",
    batch_tokens: int | None = None,
    mesh: Mesh | None = None,
    log_samples: Path | None = None,
    loaded: Mapping[str, Benchmark] | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores on lm-eval's tasks, by task name, in JSON types.

    `limit`: the first so many items (None: all). `num_fewshot`: worked examples before each question (None: as the
    task says). `task_data`: a folder of local files (None: the hub); worked examples then come from the task's
    training file, where the folder holds one, else from the same file, never the item itself. `log_samples`: a folder
    that gets `samples_TASK.jsonl`, with every item's texts and log-likelihoods. `batch_tokens`: of a batch of requests,
    or of the cache for texts (None: what the device holds), on each device of a `mesh`. `loaded`: what `load` made of
    all this.

    Of a choice, acc takes the one with the greatest log-likelihood, acc_norm that with the greatest one per character
    (lm-eval's definition); standard errors are those of a mean. `correct` and `correct_norm` hold 0 or 1 for each item
    in order, so that two runs can be compared item by item. Every other metric stands in `scores` under
    `metric,filter`: its value, standard error and items.

    Raises UserError on an unknown or unsuitable task, a missing or malformed file, and what the model cannot score.
    """
    loaded = load(names, task_data, num_fewshot, limit) if loaded is None else loaded

    from l2a_jax.evaluation.harness import HarnessModel

    harness = HarnessModel(model, backend, batch_tokens=batch_tokens, mesh=mesh)
    with _quiet():
        return {name: _evaluate(harness, loaded[name], limit, log_samples) for name in names}


def load(names: tuple[str, ...], task_data: Path | None, num_fewshot: int | None,
         limit: int | None) -> dict[str, Benchmark]:
    """Tasks with their documents, read and checked; `evaluate_tasks` says what is what. Raises UserError as it does."""
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit} items; expected at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"num_fewshot is {num_fewshot}; expected 0 or more")
    files = {name: read_task(name, Path(task_data)) for name in names} if task_data is not None else {}
    with _quiet():
        return {name: Benchmark(task, files.get(name))
                for name, task in load_tasks(names, files, num_fewshot, limit).items()}


def load_tasks(names: Sequence[str], files: dict[str, TaskFile], num_fewshot: int | None,
               limit: int | None = None) -> dict[str, Task]:
    """lm-eval's tasks by name; `files` replaces the documents of those it names. Raises UserError as above.

    `limit` only spares the reading of documents that will not be asked for.
    """
    lm_tasks = needs("lm_eval.tasks", "eval", "a benchmark")
    root = Path(lm_tasks.__file__).parent
    folders = sorted({str(root / BENCHMARKS[name]) for name in names}) if set(names) <= set(BENCHMARKS) else None
    manager = lm_tasks.TaskManager(include_defaults=folders is None, include_path=folders)
    for name in names:
        _check_known(name, manager)
    try:
        # A group of one's own is lm-eval's way to change some settings of a task it knows.
        group = [_from_file(name, files[name], num_fewshot, limit) if name in files else {"task": name}
                 for name in names]
        tasks = manager.load({"group": "l2a_jax", "task": group})["tasks"]
    except Exception as error:  # whatever the hub client raises, which changes between versions
        if files:
            raise
        instead = "; give local files with --task-data instead" if set(names) <= set(LOCAL_TASKS) else ""
        raise UserError(f"the data of {', '.join(names)} cannot be loaded from the hub ({type(error).__name__}: "
                        f"{str(error)[:200]}){instead}") from error
    for name, task in tasks.items():
        _check_served(name, task)
        shots = (task.config.num_fewshot or 0) if num_fewshot is None else num_fewshot
        if name in files:
            _check_shots(files[name], shots)
            lacking = LOCAL_TASKS[name].training
            if shots and lacking and files[name].training is None:
                log.warning("%s: there is no %s beside %s, whose other items are its worked examples then; scores are "
                            "not those with examples for training", name, lacking, files[name].path)
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return {name: tasks[name] for name in names}


def _check_known(name: str, manager: Any) -> None:
    if name in manager.all_subtasks:
        return
    if name in manager.all_tasks:
        inside = [one for one in manager.all_subtasks if one.startswith(f"{name}_")]
        raise UserError(f"--tasks: {name!r} names several tasks of lm-eval's; name one of them: {few(inside)}")
    near = [*difflib.get_close_matches(name, ASKED, n=1), *difflib.get_close_matches(name, manager.all_subtasks, n=1)]
    raise UserError(f"--tasks: there is no task {name!r}" + (f" (did you mean {near[0]}?)" if near else "")
                    + f"; expected {EXPECTED}")


def _check_served(name: str, task: Task) -> None:
    if task.OUTPUT_TYPE not in SERVED:
        raise UserError(f"the task {name!r} is of type {task.OUTPUT_TYPE}; expected one of {', '.join(SERVED)}")
    for flag, what in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "shows pictures")):
        if getattr(task, flag, False):
            raise UserError(f"the task {name!r} {what}, which is not done here")
    if task.OUTPUT_TYPE == GENERATES:
        from l2a_jax.evaluation.harness import greedy

        greedy(task.config.generation_kwargs or {}, f"the task {name!r}")


def _check_shots(file: TaskFile, shots: int) -> None:
    examples, beside = (file, " beside the question") if file.training is None else (file.training, "")
    if shots + bool(beside) > len(examples.documents):
        raise UserError(f"{examples.path} holds {len(examples.documents)} items; {shots} worked examples{beside} need "
                        "more")


def _from_file(name: str, file: TaskFile, num_fewshot: int | None, limit: int | None) -> dict[str, Any]:
    """lm-eval's settings of a task over local files: a test split with a training split beside it, or one split alone,
    whose items are the worked examples too. Without a test split the sampler of these leaves the item itself out."""
    from datasets import Dataset

    if file.training is not None:
        splits = {"train": file.training.documents, "test": file.documents[:limit]}
        named = {"training_split": "train", "validation_split": None, "test_split": "test"}
    else:
        alone = num_fewshot == 0 or (num_fewshot is None and LOCAL_TASKS[name].training is None)
        splits = {"validation": file.documents[: limit if alone else None]}
        named = {"training_split": None, "validation_split": "validation", "test_split": None, "fewshot_split": None}
    return {"task": name, "custom_dataset": lambda **_: {split: Dataset.from_list(rows) for split, rows in
                                                         splits.items()}, **named}


def _evaluate(harness, benchmark: Benchmark, limit: int | None, log_samples: Path | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    task, file = benchmark
    name = task.config.task
    harness.label = name
    started = time.monotonic()
    results = evaluate(harness, {"tasks": {name: task}}, limit=limit)
    seconds = time.monotonic() - started
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    row = _scores(results["results"][name], samples) | {
        "n": len({sample["doc_id"] for sample in samples}),
        "limit": limit,
        "num_fewshot": int(task.config.num_fewshot),
        "fewshot_seed": FEWSHOT_SEED,
        "version": results["versions"][name],
        "lm_eval": metadata.version("lm_eval"),
        "source": str(file.path.name) if file else "/".join(filter(None, (task.DATASET_PATH, task.DATASET_NAME))),
        "split": task.config.test_split or task.config.validation_split,
        "prefix_token": {"id": harness.prefix_token_id, "text": harness.tokenizer.decode([harness.prefix_token_id])},
        "requests": harness.requests,
        "requests_cut_from_the_left": harness.truncated,
        "seconds": round(seconds, 2),
    }
    if log_samples is not None:
        _write_samples(log_samples, name, samples)
    return row


def _scores(found: dict[str, Any], samples: list[dict]) -> dict[str, Any]:
    """Every metric as lm-eval gives it: value, standard error, and that of each item where it is a number."""
    row: dict[str, Any] = {}
    for key, value in found.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}_stderr,{filtered}")
        error = float(error) if isinstance(error, int | float) else None
        items = [sample[metric] for sample in samples if sample["filter"] == filtered]
        if metric in METRICS and filtered == "none":
            row |= {metric: float(value), f"{metric}_stderr": error, METRICS[metric]: list(map(int, items))}
        else:
            numbers = all(isinstance(item, int | float) for item in items)
            row.setdefault("scores", {})[key] = {"value": float(value), "stderr": error,
                                                 "items": list(map(float, items)) if numbers else None}
    return row


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval explains settings that we made on purpose, and datasets draws a bar for every pass over the items."""
    import datasets

    log, shown = logging.getLogger("lm_eval"), datasets.is_progress_bar_enabled()
    level = log.level
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


def _samples_file(name: str) -> str:
    return f"samples_{name}.jsonl"


def _write_samples(folder: Path, name: str, samples: list[dict]) -> None:
    """One object an item; the file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    items: dict[int, list[dict]] = {}
    for sample in samples:
        items.setdefault(sample["doc_id"], []).append(sample)
    with whole(folder / _samples_file(name)) as partial, partial.open("w", encoding="utf-8") as stream:
        for filtered in items.values():
            stream.write(json.dumps(plain(_sample_row(filtered)), ensure_ascii=False) + "\n")


def _sample_row(filtered: list[dict]) -> dict[str, Any]:
    """What was asked and answered of an item, which has an entry a filter: texts and what each filter read in them, or
    log-likelihoods."""
    first = filtered[0]
    row = {"item": first["doc_id"], "target": first["target"], "context": first["arguments"][0][0]}
    answers = first["filtered_resps"]
    if isinstance(first["resps"][0][0], str):
        return row | {"written": first["resps"][0][0],
                      "read": {sample["filter"]: sample["filtered_resps"][0] for sample in filtered},
                      "scores": {f"{metric},{sample['filter']}": sample[metric] for sample in filtered
                                 for metric in sample["metrics"]}}
    if isinstance(answers[0], float):
        return row | {"log_likelihoods": answers}
    return row | {"continuations": [pair[1] for pair in first["arguments"]],
                  "log_likelihoods": [one[0] for one in answers], "greedy": [one[1] for one in answers],
                  **{metric: first[metric] for metric in METRICS if metric in first}}
