"""A batch as a person reads it: for `--dry-run`, to see that documents are whole, apart, and the right language."""

from __future__ import annotations

from typing import Any

import numpy as np

from l2a_jax.data.batch import Batch


def decode_row(batch: Batch, row: int, tokenizer: Any, characters: int = 300) -> str:
    """One row as text: a header for each document in it, then its first and last `characters / 2` characters."""
    tokens = np.asarray(batch.tokens[row])
    segments = np.ones(tokens.size, int) if batch.segment_ids is None else np.asarray(batch.segment_ids[row])
    lines = []
    for segment in range(1, int(segments.max(initial=0)) + 1):
        where = np.flatnonzero(segments == segment)
        text = tokenizer.decode(tokens[where].tolist(), skip_special_tokens=False)
        half = characters // 2
        if len(text) > characters:
            text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
        counted = int(np.asarray(batch.weights[row])[where].sum())
        lines.append(f"--- document {segment}: {where.size} tokens from {where[0]}, {counted} of them with a target")
        lines.append(text)
    lines.append(f"--- padding: {int((segments == 0).sum())} tokens")
    return "\n".join(lines)
