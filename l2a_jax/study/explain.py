"""The instruments as a study asks them: of a trained row (`measures.Subject`), or of a row's settings (the autopsy)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from l2a_jax.evaluation.collapse import PROMPTS
from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.study import benchmarks, needles
from l2a_jax.study.autopsy import CHANCE, autopsy, task_margin
from l2a_jax.study.faulty import FAULTS, Fault
from l2a_jax.study.prunable import THRESHOLDS, prunable
from l2a_jax.study.routed_picture import draw_routed_text
from l2a_jax.study.routed_text import routed_share, what_is_routed
from l2a_jax.training.optimizer import OptimizerConfig
from l2a_jax.training.remat import checkpoint_policy
from l2a_jax.training.step import Objective
from l2a_jax.weights.pretrained import Pretrained

PICTURE = "routed_text.png"


def routed_text(subject: Any) -> dict[str, Any]:
    """Which tokens and layers a row routes, over its audited windows; with `subject.out`, also the picture of the
    second window (the first begins the text). The picture shows the text itself: mind whose it is."""
    windows, scores = subject.audited()
    layer, decode = subject.model.l2a_config, subject.model.tokenizer.decode
    report = what_is_routed(windows, scores.decisions, decode, reach=layer.window, pruned=layer.pruned_layers)
    if subject.out is not None:
        row = min(1, len(windows.tokens) - 1)
        real = windows.real[row]
        share = routed_share(scores.decisions[:, row : row + 1], layer.pruned_layers)[0]
        report["picture"] = PICTURE
        report["picture_tokens"] = draw_routed_text(windows.tokens[row][real], share[real], decode,
                                                    subject.out / PICTURE, title=f"{subject.row.name}, window {row}")
    return report


def prunable_layers(subject: Any, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Any]:
    """Which of a row's layers can be pruned: sparsity from the first half of its windows, costs from the second, and
    the row's own needles for every threshold."""
    half = len(subject.windows.tokens) // 2
    options, prepared = subject.session.needles(subject.row)

    def needle(model: Pretrained) -> dict[str, Any]:
        found = needles.score(model, prepared, options, **subject.session.passes)
        return {"needle": found["exact_match"], "needle_95": found["exact_match_95"]}

    return prunable(subject.model, _rows(subject.windows, 0, half), _rows(subject.windows, half, None),
                    thresholds=thresholds, extra=needle, **subject.session.passes)


def autopsy_of(session: Any, row: Any, *, steps: int = 300, windows: int = 16, faults: Sequence[Fault] = FAULTS,
               seed: int = 0) -> dict[str, Any]:
    """The autopsy with a row's regime, layer, data, rates and penalty schedule, for `steps` steps of one micro-batch;
    tasks and needle are the row's own."""
    plan, base, m = session.plan(row), session.base(row.size), row.measures
    s = plan.settings
    objective = Objective(
        plan.config, plan.l2a_config, penalty=s.penalty, penalty_warmup=round(s.penalty_warmup * steps),
        penalty_ramp=max(1, round(s.penalty_ramp * steps)), dtype=plan.dtype, backend=session.backend,
        remat=checkpoint_policy(s.remat))
    optimizer = OptimizerConfig(s.lr, steps, round(s.warmup * steps), s.router_lr, s.weight_decay, s.clip)
    options, prepared = session.needles(row)

    def extra(model: Pretrained) -> dict[str, float | None]:
        scores = {name: benchmarks.score(model, session.benchmark(row, name), session.backend) for name in CHANCE}
        pairs = {name: (found["acc"], (found["acc"] * (1 - found["acc"]) / found["n"]) ** 0.5)
                 for name, found in scores.items()}
        return {"task_margin": task_margin(pairs), **{name: accuracy for name, (accuracy, _) in pairs.items()},
                "needle": needles.score(model, prepared, options, **session.passes)["exact_match"]}

    tokenizer = plan.tokenizer
    ends = (tokenizer.eos_token_id, tokenizer.token_id("<|endoftext|>"))
    return autopsy(
        base._replace(config=plan.config), plan.l2a_config, plan.data, session.windows(row, m.context, windows),
        tokenizer.encode_batch(list(PROMPTS), add_special_tokens=False), objective=objective, optimizer=optimizer,
        regime=row.regime, faults=faults, extra=extra, seed=seed,
        stop_tokens=tuple(sorted({end for end in ends if end is not None})),
        batch_tokens=session.passes["batch_tokens"])


def _rows(windows: Windows, start: int, stop: int | None) -> Windows:
    tokens, targets, scored, real = (x[start:stop] for x in windows[:4])
    return Windows(tokens, targets, scored, real, {**windows.about, "windows": len(tokens), "first_window": start})
