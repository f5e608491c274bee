"""Instruments by name: what else a row can be asked, each a function of a `Subject` that returns plain JSON.

An instrument lives in a file of its own and is imported when a row asks for it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from l2a_jax.errors import UserError
from l2a_jax.evaluation import perplexity

OWN_TEXT = "l2a_jax.research.replication.damage"
"""A module whose source is the text of the picture."""
Instrument = Callable[[Any], dict[str, Any]]


def _residual(subject) -> dict[str, Any]:
    """Distance of the residual stream from the plain model's, layer by layer."""
    module = importlib.import_module("l2a_jax.research.replication.residual")
    windows, _ = subject.audited()
    return module.residual_distance(subject.plain, subject.model, windows, backend=subject.session.backend)


def _flips(subject) -> dict[str, Any]:
    """Perplexity with a share of the learned decisions inverted."""
    module = importlib.import_module("l2a_jax.research.replication.flips")
    windows, scores = subject.audited()
    return module.flip_sweep(subject.model, windows, scores, seeds=subject.row.measures.audit_seeds,
                             **subject.session.passes)


def _routed(subject) -> dict[str, Any]:
    """Which tokens are routed, by class; and where pictures may go, a text with its routed tokens shaded."""
    text = importlib.import_module("l2a_jax.research.replication.routed_text")
    picture = importlib.import_module("l2a_jax.research.replication.routed_picture")
    windows, scores = subject.audited()
    layer, decode = subject.model.l2a_config, subject.model.tokenizer.decode
    found = text.what_is_routed(windows, scores.decisions, decode, reach=layer.window, pruned=layer.pruned_layers)
    if subject.out is not None:
        share = text.routed_share(scores.decisions[:, :1], layer.pruned_layers)[0]
        picture.draw_routed_text(windows.tokens[0], share, decode, subject.out / f"{subject.row.name}_routed.png",
                                 title=subject.row.name)
    return found


def _picture(subject) -> dict[str, Any]:
    """Which tokens are routed, as a picture that may be shown to anyone: of text of our own, a module of this study."""
    text = importlib.import_module("l2a_jax.research.replication.routed_text")
    picture = importlib.import_module("l2a_jax.research.replication.routed_picture")
    source = inspect.getsource(importlib.import_module(OWN_TEXT))
    ids = np.asarray(subject.model.tokenizer.encode(source, add_special_tokens=False), np.int32)
    windows = perplexity.text_windows(ids, subject.row.measures.context, subject.row.measures.context,
                                      {"name": OWN_TEXT}, limit=1)
    scores = perplexity.score_windows(subject.model, windows, **subject.session.passes)
    if scores.decisions is None:
        raise UserError("picture: this is a plain model, which routes nothing")
    real = windows.real[0]
    share = text.routed_share(scores.decisions[:, :1], subject.model.l2a_config.pruned_layers)[0][real]
    shown = None
    if subject.out is not None:
        shown = picture.draw_routed_text(windows.tokens[0][real], share, subject.model.tokenizer.decode,
                                         subject.out / f"{subject.row.name}_picture.png",
                                         title=f"{OWN_TEXT} as {subject.row.name} routes it")
    return {"text": OWN_TEXT, "tokens": int(real.sum()), "shown": shown, "share": float(share.mean())}


def _prunable(subject) -> dict[str, Any]:
    """Which layers can lose global attention: chosen on the first half of the windows, paid for on the rest."""
    module = importlib.import_module("l2a_jax.research.replication.prunable")
    windows, _ = subject.audited()
    half = len(windows.tokens) // 2
    if half == 0:
        raise UserError("prunable: half of the audited windows choose and half pay, so there must be two at least")
    first, rest = (windows._replace(**{name: getattr(windows, name)[part]
                                       for name in ("tokens", "targets", "scored", "real")})
                   for part in (slice(None, half), slice(half, None)))
    return module.prunable(subject.model, first, rest, **subject.session.passes)


def _thresholds(subject) -> dict[str, Any]:
    """Sparsity, perplexity and needle at lower thresholds than the router was trained with."""
    module = importlib.import_module("l2a_jax.research.replication.thresholds")
    windows, scores = subject.audited()
    options, prepared = subject.session.needles(subject.row)
    return module.threshold_sweep(subject.model, windows, scores, prepared, options, **subject.session.passes)


def _autopsy(subject) -> dict[str, Any]:
    """The row's training with each fault on purpose, and which of the reported symptoms it produces."""
    from l2a_jax.research.replication import benchmarks, needles
    from l2a_jax.runs.plan import dials_of
    from l2a_jax.training.optimizer import OptimizerConfig

    module = importlib.import_module("l2a_jax.research.replication.autopsy")
    session, row = subject.session, subject.row
    plan = session.plan(row)
    s, dials = plan.settings, dials_of(plan)
    objective = session.program(row).objective._replace(
        penalty=float(dials.penalty), penalty_warmup=int(dials.penalty_warmup), penalty_ramp=int(dials.penalty_ramp))
    rule = OptimizerConfig(s.lr, plan.steps, int(dials.warmup), s.router_lr, s.weight_decay, s.clip)

    def extra(model) -> dict[str, float]:
        scores = {name: benchmarks.score(model, session.benchmark(row, name), session.backend)
                  for name in ("hellaswag", "piqa")}
        error = {name: (one["acc"], (one["acc"] * (1 - one["acc"]) / one["n"]) ** 0.5) for name, one in scores.items()}
        options, prepared = session.needles(row)
        return {"task_margin": module.task_margin(error),
                "needle": needles.score(model, prepared, options, **session.passes)["exact_match"]}

    prompts, stops = subject.prompts()
    names = row.measures.faults
    if unknown := set(names) - {fault.name for fault in module.FAULTS}:
        raise UserError(f"autopsy: there is no fault {', '.join(sorted(unknown))}")
    faults = [fault for fault in module.FAULTS if fault.name in names or not names]
    return module.autopsy(subject.plain, plan.l2a_config, plan.data, subject.audited()[0], prompts,
                          objective=objective, optimizer=rule, regime=s.regime, faults=faults, extra=extra,
                          stop_tokens=stops, seed=s.seed, batch_tokens=session.passes["batch_tokens"])


INSTRUMENTS: dict[str, Instrument] = {
    "residual": _residual, "flips": _flips, "routed": _routed, "prunable": _prunable, "thresholds": _thresholds,
    "picture": _picture, "autopsy": _autopsy}
"""By the name that a row's tasks use."""


def register(name: str, instrument: Instrument) -> None:
    """Add an instrument: `instrument(subject)` gets what `measures.Subject` holds (model, plain, row, windows,
    scores). UserError on a name that is taken."""
    if name in INSTRUMENTS:
        raise UserError(f"there is an instrument {name!r} already")
    INSTRUMENTS[name] = instrument
