"""Benchmark files on disk, turned into the documents that lm-eval's task definitions expect from the hub.

Only the container changes: every field keeps the name, type and text it has on the hub, so prompts, choices and
metrics stay lm-eval's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from l2a_jax.data.files import check_regular, once
from l2a_jax.data.text import check_text, read_lines, read_records
from l2a_jax.errors import UserError

Record = Mapping[str, Any]
Document = dict[str, Any]


class LocalTask(NamedTuple):
    """Where a task's documents are in a folder, and how a record becomes one of lm-eval's documents.

    `convert(place, record, label)` gets the line of `LABELS` beside the file where `labels` is set, else None.
    `training`: where its worked examples are, which its questions come with unless told otherwise.
    """

    pattern: str
    labels: bool
    convert: Callable[[str, Record, str | None], Document]
    training: str | None = None


class TaskFile(NamedTuple):
    """The documents of a task, the file they came from, and its training file where there is one."""

    path: Path
    documents: list[Document]
    training: TaskFile | None = None


LABELS = "-labels.lst"
"""`NAME-labels.lst` beside `NAME.jsonl`: a label a line."""


def read_task(name: str, folder: Path) -> TaskFile:
    """The documents of a task from a folder.

    Raises UserError if the task has no local form, if its file is missing, not the only one or empty, and on the first
    malformed line, named by file and line.
    """
    if name not in LOCAL_TASKS:
        raise UserError(f"the task {name!r} cannot be read from local files; expected one of {', '.join(LOCAL_TASKS)}")
    task = LOCAL_TASKS[name]
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected one that holds {task.pattern}")
    path = _find(folder, task.pattern, name)
    if path is None:
        raise UserError(f"{folder} holds no {task.pattern} (also .gz), which the task {name!r} needs")
    training = None if task.training is None else _find(folder, task.training, name)
    return TaskFile(path, _documents(path, task),
                    None if training is None else TaskFile(training, _documents(training, task)))


def _find(folder: Path, pattern: str, name: str) -> Path | None:
    patterns = (pattern, f"{pattern}.gz")
    found = sorted(path for path in folder.iterdir() if any(fnmatch(path.name, one) for one in patterns))
    for path in found:
        check_regular(path)
    found = once(found)
    if len(found) > 1:
        raise UserError(f"{folder} holds {len(found)} files for the task {name!r} "
                        f"({', '.join(path.name for path in found)}); expected one")
    return found[0] if found else None


def _documents(path: Path, task: LocalTask) -> list[Document]:
    records = list(read_records(path))
    labels: list[str] | list[None] = _read_labels(path, len(records)) if task.labels else [None] * len(records)
    documents = [task.convert(place, record, label)
                 for (place, record), label in zip(records, labels, strict=True)]
    if not documents:
        raise UserError(f"{path} is empty; expected a JSON object a line")
    return documents


def _read_labels(path: Path, expected: int) -> list[str]:
    file = path.with_name(path.name.removesuffix(".gz").removesuffix(".jsonl") + LABELS)
    if not file.is_file():
        raise UserError(f"{file} is missing; expected the labels of {path.name}, one a line")
    labels = [line.strip() for _, line in read_lines(file)]
    while labels and not labels[-1]:  # blank lines at the end of a file are no labels
        labels.pop()
    if len(labels) != expected:
        raise UserError(f"{file} holds {len(labels)} labels; {path.name} has {expected} items")
    return labels


def _text(place: str, record: Record, field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise UserError(f"{place}: field {field!r} is {_kind(record, field)}; expected text")
    check_text(value, place)
    return value


def _choices(place: str, record: Record, field: str) -> list[str]:
    value = record.get(field)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(one, str) and one for one in value):
        raise UserError(f"{place}: field {field!r} is {_kind(record, field)}; expected two or more texts, none empty")
    check_text("".join(value), place)
    return value


def _label(place: str, label: Any, choices: int) -> int:
    """A label as a number; the hub writes some as text."""
    if isinstance(label, bool) or not isinstance(label, int | str) or str(label) not in map(str, range(choices)):
        raise UserError(f"{place}: the label is {label!r}; expected a whole number from 0 to {choices - 1}")
    return int(label)


def _kind(record: Record, field: str) -> str:
    return f"{type(record[field]).__name__} {str(record[field])[:40]!r}" if field in record else "missing"


def _hellaswag(place: str, record: Record, label: str | None) -> Document:
    endings = _choices(place, record, "endings")
    texts = {field: _text(place, record, field) for field in ("activity_label", "ctx_a", "ctx_b")}
    return {**texts, "endings": endings, "label": str(_label(place, record.get("label"), len(endings)))}


def _piqa(place: str, record: Record, label: str | None) -> Document:
    texts = {field: _text(place, record, field) for field in ("goal", "sol1", "sol2")}
    for field in ("sol1", "sol2"):
        if not texts[field]:
            raise UserError(f"{place}: field {field!r} is empty; expected a solution")
    return {**texts, "label": _label(f"{place} of its labels", label, 2)}


def _arc(place: str, record: Record, label: str | None) -> Document:
    choices = _choices(place, record, "choices")
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    identity = str(record.get("id", place))
    check_text(identity, place)
    return {"id": identity, "question": _text(place, record, "question"),
            "choices": {"text": choices, "label": letters},
            "answerKey": letters[_label(place, record.get("label"), len(choices))]}


def _gsm8k(place: str, record: Record, label: str | None) -> Document:
    texts = {field: _text(place, record, field) for field in ("question", "answer")}
    if "#### " not in texts["answer"]:
        raise UserError(f"{place}: field 'answer' has no '#### '; expected the result after it")
    return texts


LOCAL_TASKS: dict[str, LocalTask] = {
    "hellaswag": LocalTask("hellaswag*.jsonl", False, _hellaswag),
    "piqa": LocalTask("piqa*.jsonl", True, _piqa),
    "arc_challenge": LocalTask("arc_challenge*.jsonl", False, _arc),
    "gsm8k": LocalTask("gsm8k_test*.jsonl", False, _gsm8k, training="*gsm8k_train*.jsonl"),
}
