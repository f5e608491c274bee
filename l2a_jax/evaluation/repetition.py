"""How repetitive a text is: distinct n-grams, the longest loop, and whether it ends in one. Over token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_PERIOD = 64
TIMES, TOKENS = 3, 16
"""A loop: a unit of at most `MAX_PERIOD` tokens at least `TIMES` times in a row, `TOKENS` tokens in all or more."""


class Loop(NamedTuple):
    """`length` tokens from `start` on that repeat with `period`; 0 tokens where there is no loop."""

    start: int
    length: int
    period: int


def distinct(tokens: Sequence[int], n: int) -> float | None:
    """Different n-grams over all n-grams (Li et al., 2016); None for a text shorter than n."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Entropy of the text's own token frequencies, in nats: 0 for one token over and over."""
    counts = np.array(list(Counter(tokens).values()), np.float64)
    return float(-(counts / counts.sum() * np.log(counts / counts.sum())).sum()) if len(counts) else 0.0


def longest_loop(tokens: Sequence[int]) -> Loop:
    """The longest loop anywhere in the text, its shortest period first."""
    return max(_loops(tokens), key=lambda loop: (loop.length, -loop.period), default=Loop(0, 0, 0))


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether a loop reaches the end of the text, its last unit perhaps unfinished."""
    return any(loop.start + loop.length == len(tokens) for loop in _loops(tokens))


def _loops(tokens):
    x = np.asarray(tokens)
    for period in range(1, min(MAX_PERIOD, len(x) // TIMES) + 1):
        same = np.concatenate([[False], x[period:] == x[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1]).reshape(-1, 2)
        for begin, end in edges:  # x[begin : end + period] repeats with this period
            length = int(end - begin) + period
            if length >= max(TIMES * period, TOKENS):
                yield Loop(int(begin), length, period)


def describe(generations: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The means over generations (those long enough for each number; None where none is)."""

    def mean(values):
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    usable = [tokens for tokens in generations if len(tokens) >= TOKENS]
    return {
        "generations": len(generations), "too_short": len(generations) - len(usable),
        "mean_length": mean([len(tokens) for tokens in generations]),
        **{f"distinct_{n}": mean([distinct(tokens, n) for tokens in usable]) for n in (1, 2, 3, 4)},
        "unigram_entropy": mean([unigram_entropy(tokens) for tokens in usable]),
        "longest_loop": max((longest_loop(tokens).length for tokens in usable), default=0),
        "ends_in_loop": mean([float(ends_in_loop(tokens)) for tokens in usable]),
        "loop_rule": f"a unit of up to {MAX_PERIOD} tokens {TIMES} times or more, {TOKENS} tokens in all or more",
    }

