"""What the consumer-scale study reported, to stand beside what is measured here.

T. Hertel, "Testing Conditional Attention Routing at Consumer Scale", 21 April 2026. Its text, checkpoints, window and
penalty were not published, so a difference in perplexity may be one of texts; nearly all of its task scores are
multiples of 0.002, about 500 items each.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "T. Hertel, Testing Conditional Attention Routing at Consumer Scale, 21 April 2026"


class Reported(NamedTuple):
    """One row of the study. Scores are shares of 1, `needle` as it was printed; None: not reported."""

    size: str
    regime: str
    data: str | None
    trained: str | None
    perplexity: float
    hellaswag: float | None
    piqa: float | None
    arc_challenge: float | None
    needle: str


ROWS = (
    Reported("qwen2.5-0.5b", "baseline", None, None, 11.52, 0.391, 0.700, 0.289, "60-80%"),
    Reported("qwen2.5-0.5b", "router", "diverse", "65K", 22.38, 0.354, 0.688, 0.234, "0-20%"),
    Reported("qwen2.5-0.5b", "l2a_ft", "diverse", "88M", 60.83, 0.368, 0.674, 0.236, "0%"),
    Reported("qwen2.5-0.5b", "full_ft", "diverse", "538M", 39.21, 0.362, 0.668, 0.232, "0%"),
    Reported("qwen2.5-1.5b", "baseline", None, None, 8.47, 0.492, 0.750, 0.358, "80%"),
    Reported("qwen2.5-1.5b", "router", "diverse", "130K", 13.91, 0.382, 0.718, 0.284, "0%"),
    Reported("qwen2.5-1.5b", "l2a_ft", "diverse", "308M", 21.21, None, None, None, "collapsed"),
    Reported("qwen2.5-3b", "router", "WikiText", "65K", 8.00, 0.452, 0.766, 0.354, "80%"),
)
REGIMES = {"baseline": "baseline", "router_strict": "router", "router_only": "router", "l2a_ft": "l2a_ft",
           "l2a_paper": "l2a_ft", "full_ft": "full_ft"}
"""Our regimes as the study's; others have no row there."""


def match(size: str | None, regime: str) -> Reported | None:
    """The study's row for a model size and a regime of ours, where it has one."""
    return next((row for row in ROWS if row.size == size and row.regime == REGIMES.get(regime)), None)
