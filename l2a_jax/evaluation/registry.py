"""What a model can be asked: the one list of tasks, in the order of running. Free of JAX.

From it follow `--tasks` and its help, what an evaluation reads, and what `eval.json` must hold. A task is a file here:

    SHAPE         what its entry in `eval.json` must hold (`l2a_jax.shapes`), or a function of the entry that says it;
                  LENGTHS: which lists are as long as which
    task(work)    its entry, in JSON types
    told(entry)   the entry in a few lines, for people

and, where it has them:

    prepare(name, options, model)           what it reads and checks before there are weights: `work.prepared`
    writes(name, options, prepared, path)   names of the files that it writes beside the results in `path`
    columns(name)                           its columns in the table of runs (`columns`)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from l2a_jax.sources import Pretrained


class Task(NamedTuple):
    """`module`: its file. `reads`: the flags that it reads, beside those of the model; `shared`: --text as windows
    that several tasks share. `routed`: it is about learned decisions, and left out where there are none. `asked`: by
    name; else by flags of its own. `also`: what belongs to it, and is run with it."""

    module: str
    reads: tuple[str, ...]
    shared: bool = False
    routed: bool = False
    asked: bool = True
    also: tuple[str, ...] = ()


BENCHMARKS = {"hellaswag": "hellaswag", "piqa": "piqa", "arc_challenge": "arc", "arc_easy": "arc",
              "gsm8k": "gsm8k"}
"""lm-eval's, by its own names, and its folder of each: reading these alone spares the ten seconds that all take."""
TEXT = ("text", "context", "stride", "max_windows")
LM_EVAL = Task("tasks", ("limit", "num_fewshot", "task_data", "log_samples", "batch_tokens"))
"""What every name that is not in the list is taken for: a task of lm-eval's."""
TASKS = {
    "collapse": Task("collapse", (*TEXT, "seed"), shared=True),  # first: it reports on models that nothing else can run
    "perplexity": Task("perplexity", (*TEXT, "batch_tokens"), shared=True, also=("audit",)),
    "audit": Task("audit", (*TEXT, "audit_seeds", "batch_tokens"), shared=True, routed=True, also=("perplexity",)),
    "reach": Task("reach", (*TEXT, "audit_seeds", "batch_tokens")),
    "looks": Task("looks", (*TEXT, "looks_sample", "looks_from", "seed", "batch_tokens"), routed=True),
    "pruning": Task("pruning_cost", (*TEXT, "batch_tokens"), asked=False),
    **dict.fromkeys(BENCHMARKS, LM_EVAL),
    "needle": Task("needle", ("needle_lengths", "needle_depths", "needle_seeds", "needle_needles", "needle_generate",
                              "haystack")),
    "ruler": Task("ruler", ("lengths", "ruler_tasks", "ruler_items", "controls", "haystack", "task_data", "log_samples",
                            "seed", "batch_tokens")),
}
ASKED = tuple(name for name, task in TASKS.items() if task.asked)
EXPECTED = f"some of {', '.join(ASKED)}, or a task of lm-eval's by its name"


class Work(NamedTuple):
    """An evaluation under way, as a task sees it. `unpruned`: the model before --prune-...; `prepared`: what the task
    made of the options before there were weights; `score`: the router's own pass over `windows`, made once; `passes`:
    backend, batch and mesh of every other; `path`: of the results; `held`: the task's entry in them, if there is one;
    `keep`: takes an entry of what is done so far."""

    name: str
    options: Any
    model: Pretrained
    unpruned: Pretrained
    windows: Any
    prepared: Any
    passes: dict[str, Any]
    score: Callable[[], Any]
    path: Path
    held: dict[str, Any] | None = None
    keep: Callable[[dict[str, Any]], None] | None = None

    @property
    def mesh(self) -> Any:
        """The devices over which it is dealt; None where it has one."""
        return self.passes.get("mesh")


def find(name: str) -> Task:
    """The task of a name."""
    return TASKS.get(name, LM_EVAL)


def of_lm_eval(name: str) -> bool:
    """Whether the task's definition is lm-eval's."""
    return find(name).module == LM_EVAL.module


def module(name: str) -> ModuleType:
    """The file of a task, imported now."""
    return importlib.import_module(f"l2a_jax.evaluation.{find(name).module}")
