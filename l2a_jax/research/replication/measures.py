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
from l2a_jax.evaluation import audit, collapse, controls, intervals, perplexity
from l2a_jax.evaluation.perplexity import Scores, Windows, routing_rates, score_windows
from l2a_jax.research.replication import benchmarks, far, needles, under
from l2a_jax.research.replication.instruments import INSTRUMENTS
from l2a_jax.research.replication.row import BENCHMARKS, Row
from l2a_jax.research.replication.session import Session, evaluation_layer
from l2a_jax.research.replication.trained import start_params
from l2a_jax.research.replication.windows import some
from l2a_jax.sharding import whole
from l2a_jax.sources import Pretrained


class EvaluatedRow:
    """A trained row under evaluation. `model` is the row's, `plain` the model it came from, `start` the row's model
    before training, `records` the steps of its training, `out` where a picture may go (None: nowhere). Passes that
    several tasks need are made once."""

    def __init__(self, session: Session, row: Row, params: Any, records: list[dict[str, Any]],
                 out: Path | None = None):
        plan, base = session.plan(row), session.base(row.size)
        self.session, self.row, self.plain, self.records, self.out = session, row, base, records, out
        self.model = Pretrained(plan.config, evaluation_layer(plan.l2a_config), whole.put(params, session.mesh),
                                base.tokenizer, base.source_hash)

    @property
    def alone(self) -> Pretrained:
        """The row's model on one device, for what no mesh deals."""
        return self.model if self.session.mesh is None else self.model._replace(params=whole.alone(self.model.params))

    @cached_property
    def start(self) -> Pretrained:
        """The row's model before training."""
        return self.model._replace(params=whole.put(start_params(self.session, self.row), self.session.mesh))

    @cached_property
    def windows(self) -> Windows:
        """The row's text."""
        return self.session.windows(self.row, self.row.measures.context, self.row.measures.windows)

    @cached_property
    def scores(self) -> Scores:
        """One pass over it, as the router decides, or as training forced it."""
        return score_windows(self.model, self.windows, self.forced(self.windows), **self.session.passes)

    def forced(self, windows: Windows) -> Any:
        """The decisions of training where these were forced; None where the router decides."""
        run = self.row.settings()
        return None if run.forced is None else under.drawn(
            np.resize(run.forced, self.model.config.num_layers).tolist(), run, *windows.tokens.shape)

    def audited(self) -> tuple[Windows, Scores]:
        """The first `audit_windows` windows, and the router's own pass over them."""
        count = min(self.row.measures.audit_windows, len(self.windows.tokens))
        s, windows = self.scores, some(self.windows, slice(count))
        return (windows._replace(about={**windows.about, "windows": count}),
                Scores(s.nll[:count], s.tokens[:count], s.correct[:count], None,
                       None if s.decisions is None else s.decisions[:, :count], s.entropy))

    def prompts(self) -> tuple[list[list[int]], tuple[int, ...]]:
        """The collapse report's prompts as tokens, and the tokens that end a text."""
        tokenizer = self.model.tokenizer
        return tokenizer.encode_batch(list(collapse.PROMPTS), add_special_tokens=False), tokenizer.end_ids


def _perplexity(evaluated: EvaluatedRow) -> dict[str, Any]:
    return perplexity.result(evaluated.scores, evaluated.windows)


def _audit(evaluated: EvaluatedRow) -> dict[str, Any]:
    windows, scores = evaluated.audited()
    return audit.audit(evaluated.model, windows, scores, seeds=evaluated.row.measures.audit_seeds,
                       **evaluated.session.passes)


def _contexts(evaluated: EvaluatedRow) -> dict[str, Any]:
    m, out = evaluated.row.measures, {}
    for context in m.contexts:
        windows = evaluated.session.windows(evaluated.row, context, max(1, m.context_tokens // context))
        scores = score_windows(evaluated.model, windows, label=f"perplexity at {context}", **evaluated.session.passes)
        out[str(context)] = perplexity.result(scores, windows)
    return out


def _needle(evaluated: EvaluatedRow) -> dict[str, Any]:
    options, prepared = evaluated.session.needles(evaluated.row)
    return needles.score(evaluated.model, prepared, options, controls=evaluated.row.measures.controls,
                         forced=evaluated.forced, **evaluated.session.passes)


def _collapse(evaluated: EvaluatedRow) -> dict[str, Any]:
    prompts, stops = evaluated.prompts()
    found = collapse.collapse(evaluated.alone, evaluated.windows, prompts=prompts, records=evaluated.records,
                              stop_tokens=stops, backend=evaluated.session.backend)
    for texts in (found["generation"] or {}).values():
        if isinstance(texts, dict) and "texts" in texts:
            texts["texts"] = texts["texts"][:2]
    return found


def _absorption(evaluated: EvaluatedRow) -> dict[str, Any]:
    """Do the learned decisions still matter once attention has adapted? The trained weights ("after") and those from
    before the run ("before") score the same windows under the run's decisions, random ones at each layer's rate, and
    none. `carried` = (random - learned) / (none - learned): 1 where random decisions are as bad as none at all."""
    windows, learned = evaluated.audited()
    if learned.decisions is None:
        raise UserError("absorption: this row routes nothing")
    rates, (count, length) = routing_rates(learned.decisions, windows.real), windows.tokens.shape
    seeds = evaluated.row.measures.audit_seeds
    choices = {"learned": [learned.decisions], "none": [np.zeros_like(learned.decisions)],
               "random": [controls.random_decisions(seed, rates, count, length) for seed in range(seeds)]}
    out: dict[str, Any] = {"windows": count, "seeds": seeds, "density": float(rates.mean())}
    for when, model in (("after", evaluated.model), ("before", evaluated.start)):
        nll = {name: np.mean([score_windows(model, windows, decisions, label=f"absorption, {when}, {name}",
                                            **evaluated.session.passes).nll for decisions in draws], axis=0)
               for name, draws in choices.items()}
        worse, interval = intervals.paired_windows(nll["random"], nll["learned"], learned.tokens)
        lost, lost_interval = intervals.paired_windows(nll["none"], nll["learned"], learned.tokens)
        out[when] = {"nll": {name: float(values.sum() / learned.tokens.sum()) for name, values in nll.items()},
                     "random_worse": worse, "random_worse_95": list(interval), "none_worse": lost,
                     "none_worse_95": list(lost_interval), "carried": worse / lost if abs(lost) > 1e-3 else None}
    return out


def _task_controls(evaluated: EvaluatedRow) -> dict[str, Any]:
    return {name: benchmarks.controls(evaluated.model, evaluated.session.benchmark(evaluated.row, name),
                                      **evaluated.session.passes) for name in BENCHMARKS}


def _benchmark(name: str) -> Callable[[EvaluatedRow], dict[str, Any]]:
    return lambda evaluated: benchmarks.score(evaluated.model, evaluated.session.benchmark(evaluated.row, name),
                                              evaluated.session.backend, evaluated.session.mesh)


TASKS: dict[str, Callable[[EvaluatedRow], dict[str, Any]]] = {
    "perplexity": _perplexity, "audit": _audit, "contexts": _contexts, "needle": _needle, "absorption": _absorption,
    "collapse": _collapse, "task_controls": _task_controls, "reach": far.reach, "ruler": far.long_tasks,
    "all_routed": far.all_routed, **{name: _benchmark(name) for name in BENCHMARKS},
}


def measure(evaluated: EvaluatedRow, task: str) -> dict[str, Any]:
    """The result of one task or instrument; {"not_finite": why} where the model's numbers are not finite.

    UserError on anything else that is wrong."""
    known = {**INSTRUMENTS, **TASKS}
    if task not in known:
        raise UserError(f"there is no task or instrument {task!r}; expected some of {', '.join(known)}")
    try:
        found = known[task](evaluated)
    except UserError as error:
        if "not finite" not in str(error):
            raise
        return {"not_finite": str(error)}
    return found
