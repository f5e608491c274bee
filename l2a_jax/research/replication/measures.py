"""What a trained row is asked, task by task; each returns plain JSON.

A task that meets numbers that are not finite says so in its result (`not_finite`): a collapsed model is a finding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from l2a_jax.errors import UserError
from l2a_jax.evaluation import audit, collapse, intervals, perplexity
from l2a_jax.evaluation.perplexity import Scores, Windows, routing_rates, score_windows
from l2a_jax.research.replication import benchmarks, needles
from l2a_jax.research.replication.instruments import INSTRUMENTS
from l2a_jax.research.replication.row import BENCHMARKS, Row
from l2a_jax.research.replication.session import Session, evaluation_layer
from l2a_jax.research.replication.trained import start_params
from l2a_jax.sources import Pretrained


class Subject:
    """A trained row under evaluation. `model` is the row's, `plain` the model it came from, `start` the row's model
    before training, `records` the steps of its training, `out` where a picture may go (None: nowhere). Passes that
    several tasks need are made once."""

    def __init__(self, session: Session, row: Row, params: Any, records: list[dict[str, Any]],
                 out: Path | None = None):
        plan, base = session.plan(row), session.base(row.size)
        self.session, self.row, self.plain, self.records, self.out = session, row, base, records, out
        self.model = Pretrained(plan.config, evaluation_layer(plan.l2a_config), params, base.tokenizer,
                                base.source_hash)

    @cached_property
    def start(self) -> Pretrained:
        """The row's model before training."""
        return self.model._replace(params=start_params(self.session, self.row))

    @cached_property
    def windows(self) -> Windows:
        """The row's text."""
        return self.session.windows(self.row, self.row.measures.context, self.row.measures.windows)

    @cached_property
    def scores(self) -> Scores:
        """One pass over it, as the router decides."""
        return score_windows(self.model, self.windows, **self.session.passes)

    def audited(self) -> tuple[Windows, Scores]:
        """The first `audit_windows` windows, and the router's own pass over them."""
        count = min(self.row.measures.audit_windows, len(self.windows.tokens))
        s, w = self.scores, self.windows
        about = {**w.about, "windows": count}
        return (Windows(w.tokens[:count], w.targets[:count], w.scored[:count], w.real[:count], about),
                Scores(s.nll[:count], s.tokens[:count], s.correct[:count], None,
                       None if s.decisions is None else s.decisions[:, :count], s.entropy))

    def prompts(self) -> tuple[list[list[int]], tuple[int, ...]]:
        """The collapse report's prompts as tokens, and the tokens that end a text."""
        tokenizer = self.model.tokenizer
        return tokenizer.encode_batch(list(collapse.PROMPTS), add_special_tokens=False), tokenizer.end_ids


def _perplexity(subject: Subject) -> dict[str, Any]:
    return perplexity.result(subject.scores, subject.windows)


def _audit(subject: Subject) -> dict[str, Any]:
    windows, scores = subject.audited()
    return audit.audit(subject.model, windows, scores, seeds=subject.row.measures.audit_seeds,
                       **subject.session.passes)


def _contexts(subject: Subject) -> dict[str, Any]:
    m, out = subject.row.measures, {}
    for context in m.contexts:
        windows = subject.session.windows(subject.row, context, max(1, m.context_tokens // context))
        scores = score_windows(subject.model, windows, label=f"perplexity at {context}", **subject.session.passes)
        out[str(context)] = perplexity.result(scores, windows)
    return out


def _needle(subject: Subject) -> dict[str, Any]:
    options, prepared = subject.session.needles(subject.row)
    return needles.score(subject.model, prepared, options, controls=subject.row.measures.controls,
                         **subject.session.passes)


def _collapse(subject: Subject) -> dict[str, Any]:
    prompts, stops = subject.prompts()
    found = collapse.collapse(subject.model, subject.windows, prompts=prompts, records=subject.records,
                              stop_tokens=stops, backend=subject.session.backend)
    for texts in (found["generation"] or {}).values():
        if isinstance(texts, dict) and "texts" in texts:
            texts["texts"] = texts["texts"][:2]
    return found


def _absorption(subject: Subject) -> dict[str, Any]:
    """Do the learned decisions still matter once attention has adapted? The trained weights ("after") and those from
    before the run ("before") score the same windows under the run's decisions, random ones at each layer's rate, and
    none. `carried` = (random - learned) / (none - learned): 1 where random decisions are as bad as none at all."""
    windows, learned = subject.audited()
    if learned.decisions is None:
        raise UserError("absorption: this row routes nothing")
    rates, (count, length) = routing_rates(learned.decisions, windows.real), windows.tokens.shape
    choices = {"learned": [learned.decisions], "none": [np.zeros_like(learned.decisions)],
               "random": [audit.random_decisions(seed, rates, count, length)
                          for seed in range(subject.row.measures.audit_seeds)]}
    out: dict[str, Any] = {"windows": count, "seeds": subject.row.measures.audit_seeds, "density": float(rates.mean())}
    for when, model in (("after", subject.model), ("before", subject.start)):
        nll = {name: np.mean([score_windows(model, windows, decisions, label=f"absorption, {when}, {name}",
                                            **subject.session.passes).nll for decisions in draws], axis=0)
               for name, draws in choices.items()}
        worse, interval = intervals.paired_windows(nll["random"], nll["learned"], learned.tokens)
        lost, lost_interval = intervals.paired_windows(nll["none"], nll["learned"], learned.tokens)
        out[when] = {"nll": {name: float(values.sum() / learned.tokens.sum()) for name, values in nll.items()},
                     "random_worse": worse, "random_worse_95": list(interval), "none_worse": lost,
                     "none_worse_95": list(lost_interval), "carried": worse / lost if abs(lost) > 1e-3 else None}
    return out


def _task_controls(subject: Subject) -> dict[str, Any]:
    return {name: benchmarks.controls(subject.model, subject.session.benchmark(subject.row, name),
                                      **subject.session.passes) for name in BENCHMARKS}


def _benchmark(name: str) -> Callable[[Subject], dict[str, Any]]:
    return lambda subject: benchmarks.score(subject.model, subject.session.benchmark(subject.row, name),
                                            subject.session.backend)


TASKS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "perplexity": _perplexity, "audit": _audit, "contexts": _contexts, "needle": _needle, "absorption": _absorption,
    "collapse": _collapse, "task_controls": _task_controls, **{name: _benchmark(name) for name in BENCHMARKS},
}


def measure(subject: Subject, task: str) -> dict[str, Any]:
    """The result of one task or instrument; {"not_finite": why} where the model's numbers are not finite.

    UserError on anything else that is wrong."""
    known = {**INSTRUMENTS, **TASKS}
    if task not in known:
        raise UserError(f"there is no task or instrument {task!r}; expected some of {', '.join(known)}")
    try:
        found = known[task](subject)
    except UserError as error:
        if "not finite" not in str(error):
            raise
        return {"not_finite": str(error)}
    return found
