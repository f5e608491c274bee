"""The autopsy of "collapse": which fault produces which of the reported symptoms?

The study reports, together: training loss zero, sparsity 100 %, text that loops; and, for some of the same rows, finite
perplexities (2.5 to 5.3 times the baseline's), task scores above chance and a needle that is never found. Each fault of
`faulty.FAULTS` is trained on purpose, and every symptom is a rule over measures, so that "produces" can be argued with.
A run in which NaN came in is looked at twice: as it ended, and as its last sound weights would be evaluated, where what
training logged is still that of the end. Every evaluation is ordinary: the causal model with its own decisions.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from l2a_jax.data.batch import TrainingData
from l2a_jax.evaluation import collapse
from l2a_jax.evaluation.collapse import Rule
from l2a_jax.evaluation.perplexity import BATCH_TOKENS, Windows, result, score_windows
from l2a_jax.models.params import add_routing
from l2a_jax.research.replication.faulty import FAULTS, Fault, Trace, train_faulty
from l2a_jax.research.tables import grid
from l2a_jax.sources import Pretrained
from l2a_jax.training.optimizer import Dials, OptimizerConfig
from l2a_jax.training.step import Objective

SYMPTOMS = (
    Rule("zero training loss", "logged_loss", "<", 0.02, "training loss as logged, nats; mean of the last 5 %"),
    Rule("100 % sparsity", "logged_sparsity", ">=", 0.999, "sparsity as logged; mean of the last 5 % of steps"),
    Rule("text loops", "greedy_ends_in_loop", ">", 0.5, "share of greedy continuations that end in a loop"),
    Rule("finite, bad perplexity", "perplexity_ratio", ">=", 2.0, "held-out perplexity over the plain model's"),
    Rule("finite, bad perplexity", "perplexity_ratio", "<=", 6.0, "held-out perplexity over the plain model's"),
    Rule("tasks above chance", "task_margin", ">", 0.0, "least of (accuracy - chance - 2 standard errors), HellaSwag "
         "and PIQA"),
    Rule("needle lost", "needle", "<=", 0.2, "share of needles found"),
)
"""A symptom holds where all its rules do; it is None where a measure was not taken or is not finite."""
CHANCE = {"hellaswag": 0.25, "piqa": 0.5}
"""ARC-Challenge is left out: the study's own collapsed rows are below its chance of 0.25."""


def symptoms(measures: Mapping[str, float | None]) -> dict[str, bool | None]:
    """Which symptoms the measures show."""
    found: dict[str, bool | None] = {}
    for rule in SYMPTOMS:
        value = measures.get(rule.measure)
        if value is None or not np.isfinite(value):
            # A perplexity that is not finite is measured well enough: it is no finite one.
            holds = False if value is not None and rule.measure == "perplexity_ratio" else None
        else:
            holds = rule.holds(value)
        known = found.get(rule.verdict, True)
        found[rule.verdict] = None if holds is None or known is None else holds and known
    return found


def task_margin(scores: Mapping[str, tuple[float, float]]) -> float | None:
    """The least of (accuracy - chance - 2 standard errors), of {task: (accuracy, standard error)}."""
    margins = [accuracy - CHANCE[name] - 2 * error for name, (accuracy, error) in scores.items() if name in CHANCE]
    return min(margins) if len(margins) == len(CHANCE) else None


class Examination(NamedTuple):
    """What every model is asked: the text of its perplexity, prompts to continue, and `extra` measures of a model whose
    weights and logits are finite, such as `task_margin` and `needle`. `seed`: of training and of sampled text."""

    windows: Windows
    prompts: Sequence[Sequence[int]]
    extra: Callable[[Pretrained], Mapping[str, float | None]] = lambda model: {}
    stop_tokens: Sequence[int] = ()
    new_tokens: int = 96
    seed: int = 0
    batch_tokens: int = BATCH_TOKENS


def autopsy(plain: Pretrained, data: TrainingData, asked: Examination, *, objective: Objective, dials: Dials,
            optimizer: OptimizerConfig, faults: Sequence[Fault] = FAULTS) -> dict[str, Any]:
    """A row for each fault (two where NaN came in), and rows for the plain and the untrained routed model.

    `objective`, `dials` and `optimizer` are the sound run's. A row holds the fault, the curves as logged (`loss_curve`,
    `sparsity_curve`), `finite_losses` (share of steps), the measures of `SYMPTOMS`, perplexity, the collapse report's
    verdict and generated text, and `symptoms`.
    """
    layer = objective.l2a_config
    baseline = examine_model(plain, asked, objective.backend)
    examine = functools.partial(examine_model, asked=asked, backend=objective.backend, reference=baseline["perplexity"])
    routed = plain._replace(l2a_config=layer, params=add_routing(plain.params, plain.config, layer))
    rows = [{"fault": "plain model", "meaning": "before anything", **baseline},
            {"fault": "untrained", "meaning": "the routed model before training", **examine(routed)}]
    for fault in faults:
        started = time.monotonic()
        trace = train_faulty(routed.params, data, fault, objective, dials, optimizer, seed=asked.seed)
        told = {"meaning": fault.meaning, "settings": fault._asdict(), "training_seconds": time.monotonic() - started}
        looks = {fault.name: trace.params, f"{fault.name}, evaluated before": trace.before}
        rows += [{"fault": name, **told, **examine(routed._replace(params=params), trace=trace)}
                 for name, params in looks.items() if params is not None]
    return {"rows": rows, "regime": optimizer.regime, "steps": dials.steps, "seed": asked.seed,
            "text": asked.windows.about, "rules": [rule._asdict() for rule in SYMPTOMS]}


def symptoms_of(model: Pretrained, plain: Pretrained, asked: Examination, records: Sequence[Mapping[str, Any]],
                backend: str = "auto") -> dict[str, Any]:
    """The same of an ordinary run, by what it recorded of its steps: measures and symptoms, without texts."""
    reference = result(score_windows(plain, asked.windows, backend=backend, batch_tokens=asked.batch_tokens),
                       asked.windows)["perplexity"]
    loss, sparsity = (np.array([record.get(name, np.nan) for record in records], float)
                      for name in ("loss", "sparsity"))
    trace = Trace(model.params, None, loss, sparsity, np.isfinite(loss), 0.0)
    found = examine_model(model, asked, backend, reference, trace)
    left_out = ("generation", "updates_lost", "loss_curve", "sparsity_curve")
    return {**{name: value for name, value in found.items() if name not in left_out},
            "rules": [rule._asdict() for rule in SYMPTOMS]}


def format_autopsy(report: Mapping[str, Any]) -> str:
    """A Markdown table: measures, then which symptoms each row shows (- : not measured)."""
    names = list(dict.fromkeys(rule.verdict for rule in SYMPTOMS))
    shown = {True: "yes", False: "no", None: "-"}
    return "\n".join(grid(
        ["fault", "loss logged", "sparsity logged", "perplexity", "greedy loops", "sampled loops", "verdict", *names],
        [[row["fault"], _cell(row["logged_loss"], ".3f"), _cell(row["logged_sparsity"], ".1%"),
          _cell(row["perplexity"], ".2f"), _cell(row["greedy_ends_in_loop"], ".0%"),
          _cell(row["sampled_ends_in_loop"], ".0%"), row["verdict"],
          *(shown[row["symptoms"][name]] for name in names)] for row in report["rows"]])[:-1])


def examine_model(model: Pretrained, asked: Examination, backend: str, reference: float | None = None,
             trace: Trace | None = None) -> dict[str, Any]:
    """Everything that is measured of one model, with what its training logged (`trace`). `reference`: the plain
    model's perplexity (None: this is the plain model)."""
    windows, prompts, stops = asked.windows, asked.prompts, asked.stop_tokens
    records = [] if trace is None else [{"loss": loss} for loss in trace.loss]
    report = collapse.collapse(model, windows, prompts=prompts, stop_tokens=stops, records=records,
                               new_tokens=asked.new_tokens, seed=asked.seed, backend=backend)
    # The report writes no text with weights that are not finite; here what such a model "says" is the symptom itself.
    written = report["generation"] or collapse.generation_measures(model, prompts, stops, asked.new_tokens, asked.seed,
                                                                   backend)
    sound = not report["text"]["logits_not_finite"]
    perplexity = float("nan")
    if sound:
        scores = score_windows(model, windows, backend=backend, batch_tokens=asked.batch_tokens)
        perplexity = result(scores, windows)["perplexity"]
    logged: dict[str, Any] = {"logged_loss": None, "logged_sparsity": None}
    curves: dict[str, Any] = {}
    if trace is not None:
        tail = max(1, len(trace.loss) // 20)
        logged = {f"logged_{name}": float(getattr(trace, name)[-tail:].mean()) for name in ("loss", "sparsity")}
        curves = {"loss_curve": trace.loss.tolist(), "sparsity_curve": trace.sparsity.tolist(),
                  "finite_losses": float(trace.finite.mean()), "updates_lost": trace.updates_lost}
    measures: dict[str, Any] = {
        **logged, "perplexity": perplexity, "perplexity_ratio": perplexity / (reference or perplexity),
        **{f"{kind}_ends_in_loop": written[kind]["ends_in_loop"] for kind in ("greedy", "sampled")},
        **(asked.extra(model) if sound else {})}
    return {**measures, "symptoms": symptoms(measures), "verdict": report["verdict"],
            "weights_not_finite": sum(report["weights_not_finite"].values()), "sparsity": report["text"]["sparsity"],
            "future_seen": report["text"]["future_seen"], "generation": written, **curves}


def _cell(value: float | None, style: str) -> str:
    return "-" if value is None else "not finite" if not np.isfinite(value) else format(value, style)
