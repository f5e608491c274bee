"""Instruments by name: what else a row can be asked, each a function of a `Subject` that returns plain JSON.

An instrument lives in a file of its own and is imported when a row asks for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from l2a_jax.errors import UserError

Instrument = Callable[[Any], dict[str, Any]]


def _residual(subject) -> dict[str, Any]:
    """Distance of the residual stream from the plain model's, layer by layer."""
    module = importlib.import_module("l2a_jax.study.residual")
    windows, _ = subject.audited()
    return module.residual_distance(subject.plain, subject.model, windows, backend=subject.session.backend)


def _flips(subject) -> dict[str, Any]:
    """Perplexity with a share of the learned decisions inverted."""
    module = importlib.import_module("l2a_jax.study.flips")
    windows, scores = subject.audited()
    return module.flip_sweep(subject.model, windows, scores, seeds=subject.row.measures.audit_seeds,
                             **subject.session.passes)


INSTRUMENTS: dict[str, Instrument] = {"residual": _residual, "flips": _flips}
"""By the name that a row's tasks use."""


def register(name: str, instrument: Instrument) -> None:
    """Add an instrument: `instrument(subject)` gets what `measures.Subject` holds (model, plain, row, windows,
    scores). UserError on a name that is taken."""
    if name in INSTRUMENTS:
        raise UserError(f"there is an instrument {name!r} already")
    INSTRUMENTS[name] = instrument
