"""Text that repeats itself: spans of a row copied to later places of the same document.

Packed text seldom asks a token to look far back, so a router that is trained on it under a penalty learns that it need
not: the needle is lost though the perplexity is not. An echo asks for it, with text's own tokens and in no form that a
test has: after a few tokens of a copied span the rest can be read off its first occurrence, however far back that is.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from l2a_jax.data.batch import Batch

SPAN = 32
"""Tokens that are repeated at a time."""
COUNT = 4
"""Places drawn in a row with echoes; a draw that would leave its document is given up."""


def echo_row(tokens: Int32[np.ndarray, " T"], segments: Int32[np.ndarray, " T"] | None,
             rng: np.random.Generator) -> Int32[np.ndarray, " T"]:
    """The row with up to `COUNT` spans overwritten by earlier spans of the same document, the later place uniform over
    the row and the earlier one over what lies before it. `segments` None: the row is one document; 0 is padding."""
    out = tokens.copy()
    for _ in range(COUNT if tokens.size >= 2 * SPAN else 0):
        later = int(rng.integers(SPAN, tokens.size - SPAN + 1))
        earlier = int(rng.integers(0, later - SPAN + 1))
        if segments is None or segments[earlier] == segments[later + SPAN - 1] != 0:
            out[later : later + SPAN] = out[earlier : earlier + SPAN]
    return out


def with_echoes(batch: Batch, rows: range, share: float, seed: int) -> Batch:
    """The batch with echoes in a `share` of its rows; `rows` are their places in the whole stream, which with the seed
    decide everything, so that a resumed run sees the same text."""
    tokens, targets = batch.tokens.copy(), batch.targets.copy()
    for b, row in enumerate(rows):
        rng = np.random.default_rng([seed, row])
        if rng.random() >= share:
            continue
        tokens[b] = echo_row(batch.tokens[b], None if batch.segment_ids is None else batch.segment_ids[b], rng)
        changed = np.flatnonzero(tokens[b, 1:] != batch.tokens[b, 1:])
        targets[b, changed] = tokens[b, changed + 1]
    return batch._replace(tokens=tokens, targets=targets)
