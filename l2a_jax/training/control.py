"""A target in place of a penalty: what moves the penalty's weight until the asked share of decisions is local.

Control is of the weight's logarithm, because a share answers to factors, and of the share's log-odds, because at 0.95
a point is as hard to gain as three are at 0.8. The error is that of a moving average against a reference, which goes
from the share at the end of the warm-up to the target while the ramp lasts, fast at first:

    weight = exp(integral + PROPORTIONAL * error),   d integral = INTEGRAL * error a run

within `LEAST` and `MOST`, which the integral keeps to as well: a target out of reach winds nothing up. During warm-up
the weight is 0. All times are shares of the run, so that gains mean the same in a short and a long one. Below
`SETTLING` steps the integral is as slow as in a run of so many: a router takes steps to answer, and a faster integral
has weight and share swing about the target. The number comes from a simulation; it does not end all swinging.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l2a_jax.training.optimizer import Dials

PROPORTIONAL, INTEGRAL, SETTLING = 2.0, 20.0, 250
EDITION = 2
"""A short run goes on with the edition that it began with, or not at all: in the first, its integral was faster."""
SPAN = 0.03
"""Of the moving average, as a share of the run."""
START, LEAST, MOST = 0.05, 1e-3, 1e2
"""The weight that control begins with, and its bounds."""
_CERTAIN = 1e-3
"""Shares nearer than this to 0 or 1 count as this far: their log-odds have no end."""


class Control(NamedTuple):
    """What control remembers: the logarithm of the weight that it has come to, the moving average of the local share,
    and that average at the end of the warm-up."""

    integral: Float[Array, ""]
    average: Float[Array, ""]
    start: Float[Array, ""]


def initial() -> Control:
    """Control before the first step."""
    return Control(jnp.log(jnp.asarray(START, jnp.float32)), jnp.zeros(()), jnp.zeros(()))


def penalty_weight(control: Control, step: Int[Array, ""], dials: Dials) -> Float[Array, ""]:
    """lambda of the step `step` (counted from 0)."""
    exponent = control.integral + PROPORTIONAL * _error(control, step, dials)
    weight = jnp.exp(jnp.clip(exponent, jnp.log(LEAST), jnp.log(MOST)))
    return jnp.where(step < dials.penalty_warmup, 0.0, weight)


def updated(control: Control, local: Float[Array, ""], step: Int[Array, ""], dials: Dials) -> Control:
    """Control after step `step`, in which the share `local` of the router's decisions was local; as it was where that
    is not a number (no token was counted)."""
    span = jnp.maximum(SPAN * dials.steps, 1.0)
    average = control.average + (local - control.average) / jnp.minimum(span, step + 1.0)
    moved = Control(control.integral, average, jnp.where(step <= dials.penalty_warmup, average, control.start))
    integral = control.integral + INTEGRAL / jnp.maximum(dials.steps, SETTLING) * _error(moved, step + 1, dials)
    integral = jnp.clip(integral, jnp.log(LEAST), jnp.log(MOST))
    moved = moved._replace(integral=jnp.where(step < dials.penalty_warmup, control.integral, integral))
    return Control(*(jnp.where(jnp.isfinite(local), new, old) for new, old in zip(moved, control, strict=True)))


def reference(control: Control, step: Int[Array, ""], dials: Dials) -> Float[Array, ""]:
    """The share that control holds the average to at step `step`."""
    left = 1 - jnp.clip((step - dials.penalty_warmup) / jnp.maximum(dials.penalty_ramp, 1), 0.0, 1.0)
    return dials.target_local + (control.start - dials.target_local) * left**3


def _error(control: Control, step: Any, dials: Dials) -> Float[Array, ""]:
    return _log_odds(reference(control, step, dials)) - _log_odds(control.average)


def _log_odds(share: Float[Array, ""]) -> Float[Array, ""]:
    share = jnp.clip(share, _CERTAIN, 1 - _CERTAIN)
    return jnp.log(share) - jnp.log1p(-share)
