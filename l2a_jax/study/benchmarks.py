"""lm-eval's benchmarks for many models in a row: prompts are built and tokenised once, metrics stay lm-eval's own.

`evaluation.tasks` builds everything anew for each model, which takes longer than scoring it; scores are the same.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.loglikelihood import Request, log_likelihoods
from l2a_jax.evaluation.task_files import read_task
from l2a_jax.evaluation.tasks import load_tasks
from l2a_jax.weights.pretrained import Pretrained


class Prepared(NamedTuple):
    """A task's items in order: the lm-eval task, its documents, how many requests each has, and all of them."""

    task: Any
    documents: list[Any]
    counts: list[int]
    requests: list[Request]
    source: str


def prepare(model: Pretrained, name: str, task_data: str, limit: int | None) -> Prepared:
    """Read and tokenise the first `limit` items (None: all). UserError as `evaluate_tasks` does."""
    from l2a_jax.evaluation.harness import HarnessModel

    file = read_task(name, Path(task_data))
    task = load_tasks((name,), {name: file}, None, limit)[name]
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    instances = sorted(task.instances, key=lambda one: (one.doc_id, one.idx))
    documents, counts = {}, {}
    for one in instances:
        documents[one.doc_id] = one.doc
        counts[one.doc_id] = counts.get(one.doc_id, 0) + 1
    order = sorted(documents)
    requests = HarnessModel(model).encode_pairs([one.args for one in instances])
    return Prepared(task, [documents[i] for i in order], [counts[i] for i in order], requests, file.path.name)


def score(model: Pretrained, prepared: Prepared, backend: str = "auto") -> dict[str, Any]:
    """acc, acc_norm with their 95 % intervals (Wilson), and every item's 0 or 1 as a string of bits."""
    began = time.monotonic()
    found = log_likelihoods(model, prepared.requests, backend=backend, label=prepared.task.config.task)
    pairs = list(zip(found.log_probabilities.tolist(), found.greedy.tolist(), strict=True))
    bits: dict[str, list[str]] = {"acc": [], "acc_norm": []}
    at = 0
    for document, count in zip(prepared.documents, prepared.counts, strict=True):
        metrics = prepared.task.process_results(document, pairs[at : at + count])
        at += count
        for metric, values in bits.items():
            if metric in metrics:
                values.append(str(int(metrics[metric])))
    out: dict[str, Any] = {"n": len(prepared.documents), "num_fewshot": 0, "source": prepared.source,
                           "scoring_seconds": round(time.monotonic() - began, 2)}
    for metric, values in bits.items():
        if values:
            right = values.count("1")
            out |= {metric: right / len(values), f"{metric}_95": list(intervals.share(right, len(values))),
                    f"{metric}_bits": "".join(values)}
    return out


