"""Instruments by name: what else a row can be asked, each a function of an `EvaluatedRow` that returns plain JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from l2a_jax.errors import UserError
from l2a_jax.evaluation import perplexity, routed_picture
from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.evaluation.subject import check_routed
from l2a_jax.files import read_text
from l2a_jax.research.replication import autopsy, benchmarks, damage, needles, routed_text, under
from l2a_jax.research.replication.faulty import FAULTS
from l2a_jax.research.replication.flips import flip_sweep
from l2a_jax.research.replication.prunable import prunable
from l2a_jax.research.replication.residual import residual_distance
from l2a_jax.research.replication.thresholds import threshold_sweep
from l2a_jax.research.replication.windows import some
from l2a_jax.training.optimizer import Dials, OptimizerConfig

SAMPLE = Path(__file__).with_name("sample.txt")
"""The text of the picture: ours, written to be shown to anyone, of prose, lists, code, tables and repetition."""
BETWEEN = Path(damage.__file__)
"""What stands between its two copies."""


def _residual(evaluated) -> dict[str, Any]:
    """Distance of the residual stream from the plain model's, layer by layer."""
    windows, _ = evaluated.audited()
    return residual_distance(evaluated.plain, evaluated.alone, windows, backend=evaluated.session.backend)


def _flips(evaluated) -> dict[str, Any]:
    """Perplexity with a share of the learned decisions inverted."""
    return flip_sweep(evaluated.model, *evaluated.audited(), seeds=evaluated.row.measures.audit_seeds,
                      **evaluated.session.passes)


def _routed(evaluated) -> dict[str, Any]:
    """Which tokens are routed, by class; and where pictures may go, a text with its routed tokens shaded."""
    windows, scores = evaluated.audited()
    layer = evaluated.model.l2a_config
    found = routed_text.what_is_routed(windows, scores.decisions, evaluated.model.tokenizer.decode, reach=layer.window,
                                       pruned=layer.pruned_layers)
    _shade(evaluated, windows, scores.decisions, "routed", evaluated.row.name)
    return found


def _picture(evaluated) -> dict[str, Any]:
    """Which tokens are routed, as a picture of a text of our own, which may be shown to anyone: the sample, other text,
    and the sample again, so that what the second one repeats lies beyond the window."""
    context = evaluated.row.measures.context
    sample, between = (np.asarray(evaluated.model.tokenizer.encode(read_text(path), add_special_tokens=False), np.int32)
                       for path in (SAMPLE, BETWEEN))
    ids = np.concatenate([sample, between[: max(0, context - 2 * len(sample))], sample])[:context]
    windows = perplexity.text_windows(ids, context, context, {"name": SAMPLE.name}, limit=1)
    decisions = perplexity.score_windows(evaluated.model, windows, **evaluated.session.passes).decisions
    check_routed(decisions, "picture")
    window = evaluated.model.l2a_config.window
    if window >= windows.real[0].sum():
        raise UserError(f"picture: the window of {window:,} covers the text's {windows.real[0].sum():,} tokens, so no "
                        "decision changes anything")
    share, shown = _shade(evaluated, windows, decisions, "picture", f"{SAMPLE.name} as {evaluated.row.name} routes it")
    return {"text": SAMPLE.name, "tokens": len(share), "first": window, "shown": shown, "share": float(share.mean())}


def _shade(evaluated, windows: Windows, decisions, kind: str, title: str) -> tuple[np.ndarray, int | None]:
    """Of the first window's real tokens: in what share of the layers each is routed, and how many a picture shows. It
    begins where the layer's window no longer reaches the first token: before, no decision changes anything."""
    real = windows.real[0]
    share = routed_text.routed_share(decisions[:, :1], evaluated.model.l2a_config.pruned_layers)[0][real]
    first = evaluated.model.l2a_config.window
    if evaluated.out is None or first >= len(share):
        return share, None
    path = evaluated.out / f"{evaluated.row.name}_{kind}.png"
    decode = evaluated.model.tokenizer.decode
    return share, routed_picture.draw_routed_text(windows.tokens[0][real], share, decode, path, title=title,
                                                first=first)


def _prunable(evaluated) -> dict[str, Any]:
    """Which layers can lose global attention: chosen on the first half of the windows, paid for on the rest."""
    windows, _ = evaluated.audited()
    half = len(windows.tokens) // 2
    if half == 0:
        raise UserError("prunable: half of the audited windows choose and half pay, so there must be two at least")
    return prunable(evaluated.model, some(windows, slice(None, half)), some(windows, slice(half, None)),
                    **evaluated.session.passes)


def _thresholds(evaluated) -> dict[str, Any]:
    """Sparsity, perplexity and needle at lower thresholds than the router was trained with."""
    options, prepared = evaluated.session.needles(evaluated.row)
    return threshold_sweep(evaluated.model, *evaluated.audited(), prepared, options, **evaluated.session.passes)


def _autopsy(evaluated) -> dict[str, Any]:
    """The row's training with each fault on purpose, and which of the reported symptoms it produces."""
    session, row = evaluated.session, evaluated.row
    plan = session.plan(row)
    s, run = plan.settings, session.program(row)
    if s.target_local is not None or s.forced is not None:
        raise UserError(f"autopsy: {row.name} has --{'forced' if s.forced else 'target-local'}; expected a row whose "
                        "router decides, with --penalty")
    # No arrays: they are compiled in.
    dials = Dials(*(None if number is None else number.item() for number in run.dials))
    names = row.measures.faults
    if unknown := set(names) - {fault.name for fault in FAULTS}:
        raise UserError(f"autopsy: there is no fault {', '.join(sorted(unknown))}")
    faults = [fault for fault in FAULTS if fault.name in names or not names]
    return autopsy.autopsy(evaluated.plain, plan.data, _examination(evaluated), dials=dials, faults=faults,
                           objective=run.objective._replace(mesh=None),
                           optimizer=OptimizerConfig(s.regime, s.weight_decay, s.clip))


def _symptoms(evaluated) -> dict[str, Any]:
    """Which of the reported symptoms the row itself shows."""
    return autopsy.symptoms_of(evaluated.alone, evaluated.plain, _examination(evaluated), evaluated.records,
                               evaluated.session.backend)


def _examination(evaluated) -> autopsy.Examination:
    """What the autopsy asks of every model, on the row's text, benchmarks and needles."""
    session, row = evaluated.session, evaluated.row

    def extra(model) -> dict[str, float]:
        scores = {name: benchmarks.score(model, session.benchmark(row, name), session.backend, session.mesh)
                  for name in ("hellaswag", "piqa")}
        error = {name: (one["acc"], (one["acc"] * (1 - one["acc"]) / one["n"]) ** 0.5) for name, one in scores.items()}
        options, prepared = session.needles(row)
        return {"task_margin": autopsy.task_margin(error),
                "needle": needles.score(model, prepared, options, **session.passes)["exact_match"]}

    prompts, stops = evaluated.prompts()
    return autopsy.Examination(evaluated.audited()[0], prompts, extra, stops, seed=row.settings().seed,
                               batch_tokens=session.passes["batch_tokens"])


def _under(evaluated) -> dict[str, Any]:
    """Nats under every kind of decisions, those of the row that is asked for among them."""
    row, (windows, own) = evaluated.row, evaluated.audited()
    if own.decisions is None or row.measures.under is None or evaluated.out is None:
        raise UserError(f"under: {row.name} needs a layer that routes, the row whose decisions are the learned ones, "
                        "and a folder for them")
    learned_by, rates = row.measures.under
    place = evaluated.out / f"{learned_by}_decisions.npz"
    if learned_by == row.name:
        under.keep(own.decisions, place)
    learned = under.kept(place, own.decisions.shape, learned_by)
    return under.under(evaluated.model, windows, own, under.choices(rates, row.settings(), learned),
                       **evaluated.session.passes)


INSTRUMENTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "residual": _residual, "flips": _flips, "routed": _routed, "prunable": _prunable, "thresholds": _thresholds,
    "picture": _picture, "autopsy": _autopsy,
    "under": _under, "symptoms": _symptoms}
"""By the name that a row's tasks use."""
