"""95 % confidence intervals: of means over tokens, of shares, and of paired differences between two runs.

Losses are sums over windows of text, so windows are what is sampled: the mean over tokens is a ratio of two sums, and
its variance comes from the windows' residuals (the delta method, as for cluster samples). Neighbouring windows of one
text are not quite independent, so these intervals say how much the text's sampling alone could move a number, no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from l2a_jax.errors import UserError

Z = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""

Interval = tuple[float, float]
INTERVAL = [float, 2]
"""As a file holds it (`l2a_jax.shapes`)."""


def token_mean(nll: Float[np.ndarray, " B"], tokens: Int[np.ndarray, " B"]) -> tuple[float, float]:
    """(mean over tokens, its standard error) of per-window sums over `tokens` each; NaN error for a single window.
    UserError where there is no token: a mean over nothing is no number.
    """
    if not np.sum(tokens) > 0:
        raise UserError("there is no scored token, so there is no mean over tokens")
    return ratio(nll, tokens)


def ratio(top: Shaped[np.ndarray, " B"], bottom: Shaped[np.ndarray, " B"]) -> tuple[float, float]:
    """(ratio of two sums over samples, its standard error); NaN error for a single sample.

    r = sum(top) / sum(bottom);  se = sqrt(B / (B - 1) * sum((top - r bottom)^2)) / |sum(bottom)|.
    """
    top, bottom = np.asarray(top, np.float64), np.asarray(bottom, np.float64)
    count, mean = len(top), float(top.sum() / bottom.sum())
    if count < 2:
        return mean, math.nan
    return mean, float(np.sqrt(count / (count - 1) * np.square(top - mean * bottom).sum()) / abs(bottom.sum()))


def exp(nats: float) -> float:
    """e^nats: infinite beyond what float64 holds, NaN where there is no number."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t (Abramowitz and Stegun, 26.7.5; exact for 1 and 2 degrees of freedom,
    within 0.2 % for more); NaN for none."""
    if freedom < 3:
        return {1: 12.706204736432095, 2: 4.302652729911275}.get(freedom, math.nan)
    terms = ((Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96, (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
             (79 * Z**9 + 776 * Z**7 + 1_482 * Z**5 - 1_920 * Z**3 - 945 * Z) / 92_160)
    return Z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def around(mean: float, error: float) -> Interval:
    """The normal 95 % interval."""
    return mean - Z * error, mean + Z * error


def paired_windows(nll: Float[np.ndarray, " B"], baseline: Float[np.ndarray, " B"],
                   tokens: Int[np.ndarray, " B"]) -> tuple[float, Interval]:
    """(difference of the token means, its 95 % interval) of two runs over the same windows, in nats per token.

    What the windows have in common (hard or easy text) cancels, so the interval is far narrower than either run's own.
    """
    mean, error = token_mean(np.asarray(nll, np.float64) - np.asarray(baseline, np.float64), tokens)
    return mean, around(mean, error)


def paired_items(correct: Sequence[float], baseline: Sequence[float]) -> tuple[float, Interval]:
    """(difference of the accuracies, its 95 % interval) of two runs over the same items. UserError for no item."""
    if not len(correct):
        raise UserError("there is no item, so there is no accuracy")
    difference = np.asarray(correct, np.float64) - np.asarray(baseline, np.float64)
    error = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else math.nan
    return float(difference.mean()), around(float(difference.mean()), error)


def share(successes: float, count: int) -> Interval:
    """Wilson's 95 % interval of a share (E. B. Wilson, 1927): honest at 0 and at 1, where the normal one is a point.
    UserError for a share of nothing."""
    if not count > 0:
        raise UserError("there is no item, so there is no share")
    p, z2 = successes / count, Z * Z
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z * math.sqrt(p * (1 - p) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)
