"""What the training loop asks of any source of data: a batch, and random access to batches by index.

A position in the data is one integer, the index of the next micro-batch. It is all a checkpoint has to keep:
the same index gives the same batch in every process, before and after a restart, in the first epoch and the tenth.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32


class Batch(NamedTuple):
    """One micro-batch as numpy arrays; B rows of T tokens.

    `segment_ids` is None where rows are whole (plain concatenation); then `positions` is None too, meaning 0..T-1.
    """

    tokens: Int32[np.ndarray, "B T"]
    """Token ids; padding holds a valid id that counts nowhere."""
    targets: Int32[np.ndarray, "B T"]
    """The next token of the same document, also where a row ends before the document does."""
    weights: Float32[np.ndarray, "B T"]
    """1 where the target counts in the loss; 0 at padding and at the last token of a document."""
    segment_ids: Int32[np.ndarray, "B T"] | None = None
    """1, 2, ... for each document of the row, contiguous; 0 is padding, always at the end of the row."""
    positions: Int32[np.ndarray, "B T"] | None = None
    """Position inside the segment: restarts at 0 with each segment."""


@runtime_checkable
class TrainingData(Protocol):
    """Batches by index, held-out batches, and a description of both."""

    fingerprint: str
    """Hash of everything that determines `batch(i)`; a checkpoint keeps it, and another one on resume is an error."""

    def batch(self, index: int) -> Batch:
        """Micro-batch `index` (0, 1, 2, ... without end: epochs follow each other), this process's rows of it."""
        ...

    def held_out(self, batches: int | None = None) -> Iterator[Batch]:
        """The held-out documents in a fixed order, at most `batches` batches of the same shapes; may be empty."""
        ...

    def of_process(self, index: int, count: int) -> TrainingData:
        """The same data, of whose micro-batches (not held-out ones) the `index`-th of `count` equal shares of rows is
        read: a process's."""
        ...

    def tokens_read(self, batches: int) -> int:
        """Tokens in the first `batches` micro-batches over all processes, padding not counted: what the records of
        steps add up to (they count the end of an epoch's last row in plain concatenation too, which is not filled)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Documents, tokens, unique tokens, domains with their shares, packing efficiency; plain JSON values."""
        ...


def decode_row(batch: Batch, row: int, tokenizer: Any, characters: int = 300,
               documents: int | None = None) -> str:
    """One row as text: a header for each document in it (the first `documents`, or all), then the document's first and
    last `characters / 2` characters."""
    tokens = np.asarray(batch.tokens[row])
    segments = np.ones(tokens.size, int) if batch.segment_ids is None else np.asarray(batch.segment_ids[row])
    lines = []
    count = int(segments.max(initial=0))
    kept = count if documents is None else min(documents, count)
    for segment in range(1, kept + 1):
        where = np.flatnonzero(segments == segment)
        text = tokenizer.decode(tokens[where].tolist(), skip_special_tokens=False)
        half = characters // 2
        if len(text) > characters:
            text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
        counted = np.count_nonzero(np.asarray(batch.weights[row])[where])
        lines.append(f"--- document {segment}: {where.size} tokens from {where[0]}, {counted} of them with a target")
        lines.append(text)
    if kept < count:
        lines.append(f"--- {count - kept} more documents")
    lines.append(f"--- padding: {int((segments == 0).sum())} tokens")
    return "\n".join(lines)
