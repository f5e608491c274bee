"""Documents into rows of T tokens: best-fit packing, or plain concatenation.

A plan is a table of pieces (where in the store, how long) sorted by row; the tokens themselves stay where they are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

PACKINGS = ("best_fit", "concat")


class Plan(NamedTuple):
    """P pieces in R rows; row r is pieces `rows[r]:rows[r + 1]`, left to right."""

    starts: Int64[np.ndarray, " P"]
    """First token in the store."""
    lengths: Int32[np.ndarray, " P"]
    ends: Bool[np.ndarray, " P"]
    """The piece holds its document's last token, which has no target."""
    rows: Int64[np.ndarray, " R_plus_1"]

    @property
    def row_count(self) -> int:
        return self.rows.size - 1

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def row_tokens(self) -> Int64[np.ndarray, " R"]:
        """Tokens in each row; the rest is padding."""
        return np.diff(np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])[self.rows])


def some_rows(plan: Plan, chosen: Int64[np.ndarray, " S"]) -> Plan:
    """The chosen rows alone, in their order."""
    counts = np.diff(plan.rows)[chosen]
    rows = np.concatenate([[0], np.cumsum(counts)])
    at = np.repeat(plan.rows[chosen] - rows[:-1], counts) + np.arange(rows[-1])
    return Plan(plan.starts[at], plan.lengths[at], plan.ends[at], rows)


def best_fit(starts: Int64[np.ndarray, " N"], lengths: Int64[np.ndarray, " N"], capacity: int) -> Plan:
    """Packs N documents into rows of `capacity` tokens; O(N log N), the same plan for the same input.

    A document that fits a row is never cut. A longer one is cut into full rows, and only what is left over is packed
    with others: ceil(length / capacity) - 1 cuts, the fewest there can be. A left-over of one token, the end token,
    is dropped: it is still the target of the token before it.
    """
    full, rest = np.divmod(lengths, capacity)
    rest = np.where((rest == 1) & (full > 0), 0, rest)
    document = np.repeat(np.arange(lengths.size), full)
    nth = np.arange(document.size) - np.repeat(np.cumsum(full) - full, full)
    tail = np.flatnonzero(rest)

    piece_starts = np.concatenate([starts[document] + nth * capacity, starts[tail] + full[tail] * capacity])
    piece_lengths = np.concatenate([np.full(document.size, capacity), rest[tail]])
    row = np.concatenate([np.arange(document.size), document.size + best_fit_rows(rest[tail], capacity)])
    whole = (nth + 1) * capacity == lengths[document]
    ends = np.concatenate([whole, np.ones(tail.size, bool)])
    return _table(piece_starts, piece_lengths, ends, row)


def best_fit_rows(lengths: Int64[np.ndarray, " P"], capacity: int) -> Int64[np.ndarray, " P"]:
    """The row of each piece (1 <= length <= capacity): longest first, each into the fullest row that still has room.

    Pieces of one length are placed together, and rows with equal room are one group, so the work goes with the number
    of lengths and groups rather than of pieces.
    """
    row = np.zeros(lengths.size, np.int64)
    order = np.argsort(-lengths, kind="stable")
    sizes, first = np.unique(-lengths[order], return_index=True)
    groups: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # by room left
    occupied = 0  # bit r: some row has room r
    opened = 0

    def put(room: int, rows: np.ndarray) -> None:
        nonlocal occupied
        if room and rows.size:
            groups[room].append(rows)
            occupied |= 1 << room

    for size, begin, end in zip((-sizes).tolist(), first, np.append(first[1:], order.size), strict=False):
        items = order[begin:end]
        while items.size:
            fitting = occupied >> size
            if not fitting:
                fresh = -(-items.size // (capacity // size))
                put(capacity, np.arange(opened, opened + fresh))
                opened += fresh
                continue
            room = size + (fitting & -fitting).bit_length() - 1
            rows = groups[room].pop()
            if not groups[room]:
                occupied &= ~(1 << room)
            taken = min(items.size, rows.size)
            row[items[:taken]] = rows[:taken]
            put(room, rows[taken:])
            put(room - size, rows[:taken])
            items = items[taken:]
    return row


def concatenate(starts: Int64[np.ndarray, " N"], lengths: Int64[np.ndarray, " N"], capacity: int) -> Plan:
    """One long string of the N documents in the order given, cut every `capacity` tokens; the last row may be short."""
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = ends - lengths
    total = int(ends[-1]) if lengths.size else 0
    cuts = np.unique(np.concatenate([begins, np.arange(0, total, capacity)]))
    document = np.searchsorted(begins, cuts, side="right") - 1
    piece_ends = np.append(cuts[1:], total)
    return _table(starts[document] + cuts - begins[document], piece_ends - cuts, piece_ends == ends[document],
                  cuts // capacity)


def _table(starts: np.ndarray, lengths: np.ndarray, ends: np.ndarray, row: np.ndarray) -> Plan:
    order = np.argsort(row, kind="stable")
    rows = np.concatenate([[0], np.cumsum(np.bincount(row) if row.size else np.zeros(0, np.int64))])
    return Plan(starts[order], lengths[order].astype(np.int32), ends[order], rows.astype(np.int64))
