"""Windows that are no text's own: those of requests, and the first or last of others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from l2a_jax.evaluation.loglikelihood import Request
from l2a_jax.evaluation.perplexity import Windows


def of_requests(requests: Sequence[Request], length: int, name: str) -> Windows:
    """A window of `length` tokens for each request; the places that predict its continuation are scored."""
    shape = (len(requests), length)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    scored, real = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, (context, continuation) in enumerate(requests):
        whole = np.array([*context, *continuation], np.int32)
        end = len(whole) - 1
        tokens[row, :end], targets[row, :end] = whole[:-1], whole[1:]
        real[row, :end], scored[row, end - len(continuation) : end] = True, True
    return Windows(tokens, targets, scored, real, {"name": name})


def some(windows: Windows, chosen: slice) -> Windows:
    """Some of the windows, whose text is said to be the whole one's."""
    w = windows
    return Windows(w.tokens[chosen], w.targets[chosen], w.scored[chosen], w.real[chosen], w.about)
