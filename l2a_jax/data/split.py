"""Which documents are held out: decided by a hash of their text, so it never moves and copies stay together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt64

ENOUGH = 10
"""A domain of at least this many different documents holds out at least one, whatever the fraction above 0."""


def held_out_identities(domains: Sequence[UInt64[np.ndarray, " _"]], fraction: float) -> UInt64[np.ndarray, " H"]:
    """The identities held out, over all domains together: a text in two domains is on one side in both.

    In each domain, those with a hash in the lowest `fraction` of all hashes, but never its last one (a domain of one
    document is trained on), and its lowest one always if there are `ENOUGH`.
    """
    chosen = [np.zeros(0, np.uint64)]
    for identities in domains:
        unique = np.unique(identities)
        if fraction > 0 and unique.size:
            below = int(np.searchsorted(unique, np.uint64(min(int(fraction * 2.0**64), 2**64 - 1)), side="left"))
            chosen.append(unique[: min(max(below, int(unique.size >= ENOUGH)), unique.size - 1)])
    return np.unique(np.concatenate(chosen))
