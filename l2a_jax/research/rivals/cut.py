"""At which cut a router routes a share: the logit from which on tokens are routed, found in few passes over a text.

Every pass says what share is routed at one cut, and the share falls as the cut rises. Its log-odds fall about as a
straight line, for logits lie about as a bell does: two passes foretell the third, and what was tried for one share
serves the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

FURTHEST = 64.0
"""No cut is looked for further from 0."""
NARROWEST = 2.0**-14
"""Logits that two cuts so near do not tell apart are taken to be equal."""
_USUAL = {-0.5: 0.75, 0.5: 0.25}
"""What is routed at two cuts, until passes say it: logits lie within about 1 of the threshold."""
_EDGE = 1e-5
"""A share nearer to 0 or 1 says on which side it is, and not how steeply shares fall."""


def cut_at(density: float, share_of: Callable[[float], float], tried: dict[float, float], *,
           like: Mapping[float, float] | None = None, rounds: int = 18, near: float = 0.002) -> float:
    """A cut of `tried` (the share at each cut) whose share is within `near` of the density: one that is there already,
    or of what at most `rounds` calls of `share_of` add to it. The nearest of all where none is so near, for equal
    logits are routed together. `like`: the same of a router that is nearly the same, which says where to begin."""
    brackets: list[float] = []
    for _ in range(rounds):
        if any(abs(share - density) <= near for share in tried.values()):
            break
        high = min((cut for cut, share in tried.items() if share <= density), default=FURTHEST)
        low = max((cut for cut, share in tried.items() if share > density and cut < high), default=-FURTHEST)
        if high - low <= NARROWEST:
            break
        if low in tried and high in tried:
            brackets.append(high - low)
        slow = len(brackets) > 3 and brackets[-1] > brackets[-4] / 4
        cut = (low + high) / 2 if slow else _between(low, high, density, tried, like or {})
        tried[cut] = share_of(cut)
    return min(tried, key=lambda cut: abs(tried[cut] - density))


def _between(low: float, high: float, density: float, tried: Mapping[float, float],
             like: Mapping[float, float]) -> float:
    """The next cut inside the bracket, of which an end that was not tried is the furthest of all."""
    between = low in tried and high in tried
    cut = _foretold(density, tried, like, _USUAL) if tried or like else 0.0
    if between and not low < cut < high:
        cut = _on_line(density, (low, tried[low]), (high, tried[high]))
    elif low in tried and cut <= low:
        cut = low + 1 + 3 * abs(low)
    elif high in tried and cut >= high:
        cut = high - 1 - 3 * abs(high)
    margin = (high - low) / 1000 if between else 0
    return min(max(cut, low + margin), high - margin)


def _foretold(density: float, shares: Mapping[float, float], *similar: Mapping[float, float]) -> float:
    """Where the shares reach the density: on the line through the two nearest; where one alone tells how steeply they
    fall, as far from it as on a `similar` curve; where none does, where that curve reaches it."""
    telling = [(cut, share) for cut, share in shares.items() if _EDGE < share < 1 - _EDGE]
    if not telling:
        return _foretold(density, *similar)
    if len(telling) == 1:
        [(cut, share)] = telling
        return cut + _foretold(density, *similar) - _foretold(share, *similar)
    telling.sort(key=lambda one: abs(_log_odds(one[1]) - _log_odds(density)))
    return _on_line(density, *telling[:2])


def _on_line(density: float, one: tuple[float, float], other: tuple[float, float]) -> float:
    """The cut at which the line through the log-odds of two cuts' shares has the density; the first of a flat one."""
    (cut, share), (next_cut, next_share) = one, other
    rise = _log_odds(next_share) - _log_odds(share)
    return cut + (next_cut - cut) * (_log_odds(density) - _log_odds(share)) / rise if rise else cut


def _log_odds(share: float) -> float:
    share = min(max(share, _EDGE), 1 - _EDGE)
    return math.log(share / (1 - share))
