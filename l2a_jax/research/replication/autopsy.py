"""The autopsy of "collapse": which fault produces which of the reported symptoms?

The study reports, together: training loss zero, sparsity 100 %, text that loops; and, for some of the same rows, finite
perplexities (2.5 to 5.3 times the baseline's), task scores above chance and a needle that is never found. Each fault of
`faulty.FAULTS` is trained on purpose, and every symptom is a rule over measures, so that "produces" can be argued with.
A run in which NaN came in is looked at twice: as it ended, and as its last sound weights would be evaluated, where what
training logged is still that of the end. Every evaluation is ordinary: the causal model with its own decisions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from l2a_jax.config import L2AConfig
from l2a_jax.data.batch import TrainingData
from l2a_jax.evaluation import collapse
from l2a_jax.evaluation.collapse import Rule
from l2a_jax.evaluation.perplexity import BATCH_TOKENS, Windows, result, score_windows
from l2a_jax.models.params import Tree, add_routing
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


def autopsy(
    plain: Pretrained,
    l2a_config: L2AConfig,
    data: TrainingData,
    windows: Windows,
    prompts: Sequence[Sequence[int]],
    *,
    objective: Objective,
    dials: Dials,
    optimizer: OptimizerConfig,
    faults: Sequence[Fault] = FAULTS,
    extra: Callable[[Pretrained], Mapping[str, float | None]] | None = None,
    stop_tokens: Sequence[int] = (),
    new_tokens: int = 96,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, Any]:
    """A row for each fault (two where NaN came in), and rows for the plain and the untrained routed model.

    `objective` (with this `l2a_config`), `dials` and `optimizer` are the sound run's; `extra` may add measures of a
    model whose weights and logits are finite, such as `task_margin` and `needle`. A row holds the fault, the curves as
    logged (`loss_curve`, `sparsity_curve`), `finite_losses` (share of steps), the measures of `SYMPTOMS`, perplexity,
    the collapse report's verdict and generated text, and `symptoms`.
    """
    options = {"objective": objective, "extra": extra, "stop_tokens": stop_tokens, "new_tokens": new_tokens,
               "seed": seed, "batch_tokens": batch_tokens}
    baseline = _examine(plain, windows, prompts, None, None, **options)
    reference = baseline["perplexity"]
    routed = plain._replace(l2a_config=l2a_config, params=add_routing(plain.params, plain.config, l2a_config))
    rows = [{"fault": "plain model", "meaning": "before anything", **baseline},
            {"fault": "untrained", "meaning": "the routed model before training",
             **_examine(routed, windows, prompts, None, reference, **options)}]
    for fault in faults:
        started = time.monotonic()
        trace = train_faulty(routed.params, data, fault, objective, dials, optimizer, seed=seed)
        seconds = time.monotonic() - started
        looks: list[tuple[str, Tree]] = [(fault.name, trace.params)]
        if trace.before is not None:
            looks.append((f"{fault.name}, evaluated before", trace.before))
        for name, params in looks:
            found = _examine(routed._replace(params=params), windows, prompts, trace, reference, **options)
            rows.append({"fault": name, "meaning": fault.meaning, "settings": fault._asdict(),
                         "training_seconds": seconds, **found})
    return {"rows": rows, "regime": optimizer.regime, "steps": dials.steps, "seed": seed, "text": windows.about,
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


def _examine(model: Pretrained, windows: Windows, prompts, trace: Trace | None, reference: float | None, *, objective,
             extra, stop_tokens, new_tokens, seed, batch_tokens) -> dict[str, Any]:
    """Everything that is measured of one model, with what its training logged."""
    records = [] if trace is None else [{"loss": loss} for loss in trace.loss]
    report = collapse.collapse(model, windows, prompts=prompts, stop_tokens=stop_tokens, records=records,
                               new_tokens=new_tokens, seed=seed, backend=objective.backend)
    # The report writes no text with weights that are not finite; here what such a model "says" is the symptom itself.
    written = report["generation"] or collapse.generation_measures(model, prompts, stop_tokens, new_tokens, seed,
                                                                   objective.backend)
    sound = not report["text"]["logits_not_finite"]
    perplexity = result(score_windows(model, windows, backend=objective.backend, batch_tokens=batch_tokens),
                        windows)["perplexity"] if sound else float("nan")
    tail = 1 if trace is None else max(1, len(trace.loss) // 20)
    measures: dict[str, Any] = {
        "logged_loss": None if trace is None else float(trace.loss[-tail:].mean()),
        "logged_sparsity": None if trace is None else float(trace.sparsity[-tail:].mean()),
        "perplexity": perplexity, "perplexity_ratio": perplexity / (reference or perplexity),
        "greedy_ends_in_loop": written["greedy"]["ends_in_loop"],
        "sampled_ends_in_loop": written["sampled"]["ends_in_loop"],
    }
    if extra is not None and sound:
        measures |= extra(model)
    return {
        **measures, "symptoms": symptoms(measures), "verdict": report["verdict"],
        "weights_not_finite": sum(report["weights_not_finite"].values()), "sparsity": report["text"]["sparsity"],
        "future_seen": report["text"]["future_seen"], "generation": written,
        **({} if trace is None else {
            "loss_curve": trace.loss.tolist(), "sparsity_curve": trace.sparsity.tolist(),
            "finite_losses": float(trace.finite.mean()), "updates_lost": trace.updates_lost}),
    }


def _cell(value: float | None, style: str) -> str:
    return "-" if value is None else "not finite" if not np.isfinite(value) else format(value, style)
