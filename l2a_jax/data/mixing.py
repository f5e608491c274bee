"""Which documents are held out, and which row comes when: domains interleaved by share, their rows shuffled each epoch.

What is held out is decided by a hash of a document's text, so it never moves and copies stay together.

All else is a function of the seed and the row of the stream. Random numbers are raw Philox output, which numpy
guarantees never to change, unlike its `shuffle` and `permutation`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, UInt64

CYCLE = 1 << 16
"""Least number of rows after which the pattern of domains repeats: resolves shares of 1 in 65,536."""
ENOUGH = 10
"""A domain of at least this many different documents holds out at least one, whatever the share above 0."""


def raw_random(key: str, count: int) -> UInt64[np.ndarray, " count"]:
    """Numbers of 64 bits that follow from the key alone, with every version of numpy."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)


@lru_cache(maxsize=16)
def permutation(seed: int, name: str, epoch: int, count: int) -> Int64[np.ndarray, " count"]:
    """The order of a domain's rows in an epoch; read-only, because it is kept for the next call."""
    order = np.argsort(raw_random(f"rows {seed} {epoch} {name}", count), kind="stable")
    order.flags.writeable = False
    return order


def interleave(counts: Sequence[int], rates: Sequence[float], seed: int) -> Int64[np.ndarray, " sum"]:
    """An order of `counts[d]` items of each domain d in which every prefix has the domains in proportion to `rates`.

    Item i of domain d stands at (i + u) / rate, u uniform: within one item of the exact share at any point, until a
    domain runs out, and without a beat between domains and batches.
    """
    keys = [(np.arange(count) + (raw_random(f"mix {seed} {d}", count) >> np.uint64(11)) / 2.0**53) / rate
            for d, (count, rate) in enumerate(zip(counts, rates, strict=True))]
    domains = np.repeat(np.arange(len(counts)), counts)
    return domains[np.argsort(np.concatenate(keys), kind="stable")]


def ranks(domains: Int64[np.ndarray, " M"], count: int) -> Int64[np.ndarray, " M"]:
    """How many items of the same domain (of `count`) stand before each item."""
    result = np.zeros(domains.size, np.int64)
    for d in range(count):
        mine = np.flatnonzero(domains == d)
        result[mine] = np.arange(mine.size)
    return result


class Mix(NamedTuple):
    """An endless stream of rows: M rows that repeat, `domains[r]` and how many of that domain came before in them."""

    domains: Int64[np.ndarray, " M"]
    ranks: Int64[np.ndarray, " M"]
    counts: Int64[np.ndarray, " D"]
    """Rows of each domain in a cycle."""

    def locate(self, row: int) -> tuple[int, int]:
        """Row of the stream -> (domain, which of that domain's rows, counted from 0 without end)."""
        cycle, row = divmod(row, self.domains.size)
        domain = int(self.domains[row])
        return domain, cycle * int(self.counts[domain]) + int(self.ranks[row])

    def used(self, rows: int) -> list[int]:
        """Rows of each domain among the first `rows` of the stream."""
        cycles, rest = divmod(rows, self.domains.size)
        return (cycles * self.counts + np.bincount(self.domains[:rest], minlength=self.counts.size)).tolist()


def make_mix(rates: Float64[np.ndarray, " D"], rows: int, seed: int) -> Mix:
    """The stream for relative row rates of D domains, all above 0, that hold `rows` rows together.

    A cycle is a whole number of passes over all rows, so that with rates in proportion to each domain's rows an epoch
    of the mix is an epoch of every domain.
    """
    length = rows * -(-CYCLE // rows)
    exact = rates / rates.sum() * length
    counts = np.maximum(np.floor(exact + 1e-6).astype(np.int64), 1)
    short = length - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[: max(short, 0)]] += 1  # largest remainders
    domains = interleave(counts.tolist(), counts.astype(float).tolist(), seed)
    return Mix(domains, ranks(domains, counts.size), counts)


def held_out_identities(domains: Sequence[UInt64[np.ndarray, " _"]], share: float) -> UInt64[np.ndarray, " H"]:
    """The identities held out, over all domains together: a text in two domains is on one side in both.

    In each domain, those with a hash in the lowest `share` of all hashes, but never its last one (a domain of one
    document is trained on), and its lowest one always if there are `ENOUGH`.
    """
    chosen = [np.zeros(0, np.uint64)]
    for identities in domains:
        unique = np.unique(identities)
        if share > 0 and unique.size:
            below = int(np.searchsorted(unique, np.uint64(min(int(share * 2.0**64), 2**64 - 1)), side="left"))
            chosen.append(unique[: min(max(below, int(unique.size >= ENOUGH)), unique.size - 1)])
    return np.unique(np.concatenate(chosen))
