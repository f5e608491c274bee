"""Benchmarks through lm-eval: its task definitions, prompts and metrics; our log-likelihoods.

The documents come from the hub, or from files of one's own (`task_files`) where there is no network.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2a_jax.errors import UserError, needs
from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.registry import BENCHMARKS, Work
from l2a_jax.evaluation.task_files import TaskFile, read_task
from l2a_jax.files import plain, whole
from l2a_jax.shapes import at_least, one_of, share, some
from l2a_jax.sources import Pretrained

if TYPE_CHECKING:
    from lm_eval.api.task import Task

FEWSHOT_SEED = 1_234
"""lm-eval's own default."""
METRICS = ("acc", "acc_norm")
SHAPE = {"n": at_least(1), "num_fewshot": int, "acc": share, "correct": some(one_of(0, 1)), "acc_norm?": share,
         "correct_norm?": some(one_of(0, 1)), "acc_stderr?": float, "acc_norm_stderr?": float}
LENGTHS = {"correct": "n", "correct_norm": "n"}


def prepare(name: str, options: Any, model: Pretrained) -> None:
    if model.tokenizer is None:
        raise UserError(f"{options.source} has no tokenizer, which {name} needs")
    needs("lm_eval", "eval", f"--tasks {name}")
    if options.task_data is not None:
        read_task(name, options.task_data)


def writes(name: str, options: Any, prepared: None, path: Path) -> list[str]:
    return [f"samples_{name}.jsonl"] if options.log_samples else []


def task(work: Work) -> dict[str, Any]:
    o = work.options
    return evaluate_tasks(work.model, (work.name,), limit=o.limit, num_fewshot=o.num_fewshot, task_data=o.task_data,
                          backend=o.backend, log_samples=work.path.parent if o.log_samples else None)[work.name]


def told(entry: dict[str, Any]) -> str:
    """The accuracies with their 95 % intervals."""
    shown = [f"{metric} {entry[metric]:.3f} +- {intervals.Z * entry[f'{metric}_stderr']:.3f}" for metric in METRICS
             if entry.get(metric) is not None and entry.get(f"{metric}_stderr") is not None]
    return f"{', '.join(shown)} (95 %, {entry['n']} items, {entry['num_fewshot']}-shot)"


def evaluate_tasks(
    model: Pretrained,
    names: tuple[str, ...],
    *,
    limit: int | None,
    num_fewshot: int | None,
    task_data: Path | None,
    backend: str = "auto",
    log_samples: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Accuracy on lm-eval's multiple-choice tasks, by task name, in JSON types.

    `limit`: the first so many items (None: all). `num_fewshot`: worked examples before each question (None: as the
    task says, which is 0 for the usual three). `task_data`: a folder of local files (None: the hub); worked examples
    then come from the same file, never the item itself. `log_samples`: a folder that gets `samples_TASK.jsonl`, with
    every item's texts and log-likelihoods.

    acc takes the choice with the greatest log-likelihood, acc_norm that with the greatest one per character (lm-eval's
    definition); standard errors are those of a mean. `correct` and `correct_norm` hold 0 or 1 for each item in order,
    so that two runs can be compared item by item.

    Raises UserError on an unknown or unsuitable task, a missing or malformed file, and what the model cannot score.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit} items; expected at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"num_fewshot is {num_fewshot}; expected 0 or more")
    files = {name: read_task(name, Path(task_data)) for name in names} if task_data is not None else {}

    from l2a_jax.evaluation.harness import HarnessModel

    harness = HarnessModel(model, backend)
    with _quiet():
        tasks = load_tasks(names, files, num_fewshot, limit)
        return {name: _evaluate(harness, task, files.get(name), limit, log_samples) for name, task in tasks.items()}


def load_tasks(names: Sequence[str], files: dict[str, TaskFile], num_fewshot: int | None,
               limit: int | None = None) -> dict[str, Task]:
    """lm-eval's tasks by name; `files` replaces the documents of those it names. Raises UserError as above.

    `limit` only spares the reading of documents that will not be asked for.
    """
    lm_tasks = needs("lm_eval.tasks", "eval", "a benchmark")
    root = Path(lm_tasks.__file__).parent
    folders = sorted({str(root / BENCHMARKS[name]) for name in names}) if set(names) <= set(BENCHMARKS) else None
    manager = lm_tasks.TaskManager(include_defaults=folders is None, include_path=folders)
    unknown = [name for name in names if name not in manager.all_subtasks]
    if unknown:
        raise UserError(f"lm-eval has no task {unknown[0]!r}; the usual ones are {', '.join(BENCHMARKS)}")
    try:
        # A group of one's own is lm-eval's way to change some settings of a task it knows.
        needed = limit if not num_fewshot else None
        group = [_from_file(name, files[name], needed) if name in files else {"task": name} for name in names]
        tasks = manager.load({"group": "l2a_jax", "task": group})["tasks"]
    except Exception as error:  # whatever the hub client raises, which changes between versions
        if files:
            raise
        raise UserError(f"the data of {', '.join(names)} cannot be loaded from the hub ({type(error).__name__}: "
                        f"{str(error)[:200]}); give local files with --task-data instead") from error
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "multiple_choice":
            raise UserError(f"the task {name!r} is of type {task.OUTPUT_TYPE}; expected multiple_choice")
        shots = (task.config.num_fewshot or 0) if num_fewshot is None else num_fewshot
        if name in files and shots >= len(files[name].documents):
            raise UserError(f"{files[name].path} holds {len(files[name].documents)} items; {shots} worked examples "
                            "beside the question need more")
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return {name: tasks[name] for name in names}


def _from_file(name: str, file: TaskFile, needed: int | None) -> dict[str, Any]:
    """lm-eval's settings of a task whose one split is a local file. Without a test split the sampler of worked
    examples leaves the item itself out."""
    from datasets import Dataset

    return {"task": name, "custom_dataset": lambda **_: {"validation": Dataset.from_list(file.documents[:needed])},
            "training_split": None, "validation_split": "validation", "test_split": None}


def _evaluate(harness, task: Task, file: TaskFile | None, limit: int | None, log_samples: Path | None):
    from lm_eval.evaluator import evaluate

    name = task.config.task
    harness.label = name
    started = time.monotonic()
    results = evaluate(harness, {"tasks": {name: task}}, limit=limit)
    seconds = time.monotonic() - started
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    row: dict[str, Any] = {}
    for metric, correct in zip(METRICS, ("correct", "correct_norm"), strict=True):
        if f"{metric},none" in results["results"][name]:
            row[metric] = float(results["results"][name][f"{metric},none"])
            error = results["results"][name][f"{metric}_stderr,none"]
            row[f"{metric}_stderr"] = float(error) if isinstance(error, int | float) else None
            row[correct] = [int(sample[metric]) for sample in samples]
    row |= {
        "n": len(samples),
        "limit": limit,
        "num_fewshot": int(task.config.num_fewshot),
        "fewshot_seed": FEWSHOT_SEED,
        "version": results["versions"][name],
        "lm_eval": metadata.version("lm_eval"),
        "source": str(file.path.name) if file else "/".join(filter(None, (task.DATASET_PATH, task.DATASET_NAME))),
        "split": task.config.test_split or task.config.validation_split,
        "prefix_token": {"id": harness.prefix_token_id, "text": harness.tokenizer.decode([harness.prefix_token_id])},
        "requests": len(harness.scores.greedy),
        "requests_cut_from_the_left": int(harness.scores.truncated.sum()),
        "seconds": round(seconds, 2),
    }
    if log_samples is not None:
        _write_samples(log_samples, name, samples)
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


def _write_samples(folder: Path, name: str, samples: list[dict]) -> None:
    """One object an item; the file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / f"samples_{name}.jsonl") as partial, partial.open("w", encoding="utf-8") as stream:
        for sample in samples:
            stream.write(json.dumps(plain(_sample_row(sample)), ensure_ascii=False) + "\n")


def _sample_row(sample: dict) -> dict[str, Any]:
    scores = sample["filtered_resps"]
    return {"item": sample["doc_id"], "target": sample["target"], "context": sample["arguments"][0][0],
            "continuations": [pair[1] for pair in sample["arguments"]], "log_likelihoods": [one[0] for one in scores],
            "greedy": [one[1] for one in scores], **{metric: sample[metric] for metric in METRICS if metric in sample}}
