"""A tokenizer as the data sees it: texts in, arrays of ids out, and a hash of what it does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from l2a_jax.config import END_OF_TEXT
from l2a_jax.errors import UserError


@dataclass(frozen=True)
class Encoder:
    """`encode`: texts -> int64 ids, no special tokens added; `end_id` closes a document; ids are below `vocabulary`."""

    encode: Callable[[Sequence[str]], list[np.ndarray]]
    end_id: int
    vocabulary: int
    fingerprint: str


def make_encoder(tokenizer: Any, end_id: int | None = None) -> Encoder:
    """Wraps a `tokenizers.Tokenizer`, ours, a transformers tokenizer (each tokenises on all cores), or anything with
    `encode(text, add_special_tokens=)`, which runs on one.

    `end_id` closes each document; None takes `<|endoftext|>`, else the tokenizer's `eos_token_id`. Raises UserError
    where there is no such id, or the tokenizer cannot encode.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
    if not hasattr(fast, "encode_batch_fast"):
        fast = None
    if not callable(getattr(tokenizer, "encode", None)):
        raise UserError(f"the tokenizer is a {type(tokenizer).__name__}; expected one with encode(text)")
    names = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    if end_id is None:
        end_id = names.get(END_OF_TEXT, getattr(tokenizer, "eos_token_id", None))
    if end_id is None:
        raise UserError(f"the tokenizer has neither {END_OF_TEXT} nor eos_token_id; expected an id to end documents")
    known = max(names.values(), default=getattr(tokenizer, "vocab_size", 2**31) - 1)
    if fast is None:
        identity = json.dumps([type(tokenizer).__qualname__, sorted(names.items()), repr(tokenizer)])

        def encode(texts: Sequence[str]) -> list[np.ndarray]:
            return [np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int64) for text in texts]

    else:
        fast = _whole(fast)
        identity = fast.to_str()

        def encode(texts: Sequence[str]) -> list[np.ndarray]:
            found = fast.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.asarray(encoding.ids, np.int64) for encoding in found]

    return Encoder(
        encode, int(end_id), max(known, int(end_id)) + 1, hashlib.sha256(f"{end_id} {identity}".encode()).hexdigest()
    )


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int, where: str) -> None:
    """UserError where the model's embedding has no row for one of `ids`: a gather would take its last row instead.

    What counts is what occurs in the text: many a tokenizer has ids beyond the embedding that no text uses.
    """
    if not len(ids):
        return
    for worst in (int(np.min(ids)), int(np.max(ids))):
        if not 0 <= worst < vocab_size:
            raise UserError(f"the tokenizer gives id {worst} for {where}, but the model's vocabulary has {vocab_size} "
                            "rows; is it this model's tokenizer?")


def _whole(fast):
    """The same tokenizer without truncation and padding, which somebody may have left on."""
    if fast.truncation is None and fast.padding is None:
        return fast
    copy = type(fast).from_str(fast.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy
