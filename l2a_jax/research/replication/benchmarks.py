"""lm-eval's benchmarks for many models in a row: prompts are built and tokenised once, metrics stay lm-eval's own.

`evaluation.tasks` builds everything anew for each model, which takes longer than scoring it; scores are the same.
For controls, whose decisions are forced, a request is a window of its own and `score_windows` does the work.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from l2a_jax.errors import UserError
from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.controls import random_decisions, static_decisions
from l2a_jax.evaluation.loglikelihood import Request, log_likelihoods, power_of_two
from l2a_jax.evaluation.perplexity import Scores, routing_rates, score_windows
from l2a_jax.evaluation.task_files import read_task
from l2a_jax.evaluation.tasks import load_tasks
from l2a_jax.research.replication.windows import of_requests
from l2a_jax.sources import Pretrained


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


def score(model: Pretrained, prepared: Prepared, backend: str = "auto", mesh: Mesh | None = None) -> dict[str, Any]:
    """acc, acc_norm with their 95 % intervals (Wilson), and every item's 0 or 1 as a string of bits."""
    began = time.monotonic()
    found = log_likelihoods(model, prepared.requests, backend=backend, mesh=mesh, label=prepared.task.config.task)
    bits = _bits(prepared, list(zip(found.log_probabilities.tolist(), found.greedy.tolist(), strict=True)))
    out: dict[str, Any] = {"n": len(prepared.documents), "num_fewshot": 0, "source": prepared.source,
                           "scoring_seconds": round(time.monotonic() - began, 2)}
    for metric, values in bits.items():
        right = values.count("1")
        out |= {metric: right / len(values), f"{metric}_95": list(intervals.share(right, len(values))),
                f"{metric}_bits": values}
    return out


def controls(model: Pretrained, prepared: Prepared, *, items: int = 1_000, length: int = 256,
             **passes: Any) -> dict[str, Any]:
    """acc of the first `items` items that fit `length` tokens: as learned, with random decisions at each layer's own
    rate, and with a static choice of layers of the same density; and how much worse the two are, paired over items.

    Windows are as long as the longest of them needs, a power of two. Where that is no longer than the window of a layer
    with one shared attention, a row sees everything whatever is decided: `window_covers`, and the controls are the
    learned ones. UserError where no item fits.
    """
    kept, requests, at = [], [], 0
    for index, count in enumerate(prepared.counts[:items]):
        mine = prepared.requests[at : at + count]
        at += count
        if max(len(one.context) + len(one.continuation) for one in mine) <= length + 1:
            kept.append(index)
            requests += mine
    if not kept:
        raise UserError(f"{prepared.source}: none of the first {items} items fits {length} tokens, so the controls "
                        "have nothing to score")
    some = prepared._replace(documents=[prepared.documents[i] for i in kept],
                             counts=[prepared.counts[i] for i in kept], requests=requests)
    longest = max((len(one.context) + len(one.continuation) - 1 for one in requests), default=1)
    length = min(length, power_of_two(longest))
    windows = of_requests(requests, length, "requests")
    name = prepared.task.config.task

    def run(label, decisions=None) -> tuple[str, Scores]:
        scores = score_windows(model, windows, decisions, label=f"{name}, {label}", **passes)
        pairs = list(zip((-scores.nll).tolist(), (scores.correct == scores.tokens).tolist(), strict=True))
        return _bits(some, pairs)["acc"], scores

    bits, learned = run("learned")
    rates, count = routing_rates(learned.decisions, windows.real), len(requests)
    layer = model.l2a_config
    covers = layer.share_attention and layer.topology == "parallel" and layer.window >= length
    out: dict[str, Any] = {"n": len(kept), "of": min(items, len(prepared.counts)), "density": float(rates.mean()),
                           "length": length, "window_covers": covers, "learned": bits.count("1") / len(bits)}
    for control, decisions in (("random", random_decisions(0, rates, count, length)),
                               ("static", static_decisions(0, rates, count, length)[0])):
        theirs = bits if covers else run(control, decisions)[0]
        value, interval = intervals.paired_items(list(map(int, theirs)), list(map(int, bits)))
        out[control] = {"acc": theirs.count("1") / len(theirs), "points": 100 * value,
                        "points_95": [100 * bound for bound in interval]}
    return out


def _bits(prepared: Prepared, pairs: list[tuple[float, bool]]) -> dict[str, str]:
    """lm-eval's metrics of every item, from (log-probability, greedy) of every request."""
    bits: dict[str, str] = {"acc": "", "acc_norm": ""}
    at = 0
    for document, count in zip(prepared.documents, prepared.counts, strict=True):
        metrics = prepared.task.process_results(document, pairs[at : at + count])
        at += count
        for metric in bits:
            bits[metric] += str(int(metrics[metric])) if metric in metrics else ""
    return {metric: values for metric, values in bits.items() if values}
