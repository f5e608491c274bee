"""Text that repeats itself: spans of a row copied further on in the same document.

Packed text seldom asks a token to look far back, so a router that is trained on it under a penalty learns that it need
not: the needle is lost though the perplexity is not. An echo asks for it, with text's own tokens and in no form that a
test has: after a few tokens of a copied span the rest can be read off its first occurrence, however far back that is.
The first echo of a row repeats its document's beginning: routers that were trained without lose that part first, even
those that leave a quarter of all decisions global.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32, UInt64

from l2a_jax.attention.reference import real_tokens
from l2a_jax.data.batch import Batch
from l2a_jax.data.mixing import raw_random

SPAN = 32
"""Tokens that are repeated at a time."""
COUNT = 4
"""Echoes drawn in a row; one that would break another is given up."""


def echo_row(tokens: Int32[np.ndarray, " T"], segments: Int32[np.ndarray, " T"] | None,
             draws: UInt64[np.ndarray, "COUNT 2"]) -> Int32[np.ndarray, " T"]:
    """The row with up to `COUNT` spans overwritten by earlier spans of the same document: the later index uniform over
    those with room for both, the earlier one uniform over what lies before it in its document; of the first echo, over
    the first `SPAN` tokens of it.

    `segments` None: the row is one document; 0 is padding. `draws` are random numbers, one pair an echo.
    """
    index = np.arange(tokens.size)
    segments = np.ones_like(tokens) if segments is None else segments
    begins = np.maximum.accumulate(np.where(np.diff(segments, prepend=-1) != 0, index, 0))
    starts = index[: max(tokens.size - SPAN + 1, 0)]
    starts = starts[(starts - begins[starts] >= SPAN) & (segments[starts] == segments[starts + SPAN - 1])
                    & real_tokens(segments, segments.shape)[starts]]
    out, free = tokens.copy(), np.ones(tokens.size, bool)
    for number, (first, second) in enumerate(draws if starts.size else ()):
        later = int(starts[int(first) % starts.size])
        begin = int(begins[later])
        room = later - SPAN - begin
        earlier = begin + int(second) % (min(room, SPAN - 1 if number == 0 else room) + 1)
        here, there = slice(later, later + SPAN), slice(earlier, earlier + SPAN)
        if free[here].all() and free[there].all():
            out[here], free[here], free[there] = tokens[there], False, False
    return out


def with_echoes(batch: Batch, rows: range, share: float, seed: int) -> Batch:
    """The batch with echoes in a `share` of its rows (fewer where documents are shorter than two spans); `rows` are
    their numbers in the whole stream, which with the seed decide everything, so that a resumed run sees the same."""
    tokens, targets = batch.tokens.copy(), batch.targets.copy()
    for b, row in enumerate(rows):
        chance, *draws = raw_random(f"echo {seed} {row}", 1 + 2 * COUNT)
        if int(chance) >= share * 2.0**64:
            continue
        segments = None if batch.segment_ids is None else batch.segment_ids[b]
        tokens[b] = echo_row(batch.tokens[b], segments, np.array(draws).reshape(COUNT, 2))
        changed = np.flatnonzero(tokens[b, 1:] != batch.tokens[b, 1:])
        targets[b, changed] = tokens[b, changed + 1]
    return batch._replace(tokens=tokens, targets=targets)
