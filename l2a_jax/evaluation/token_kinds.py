"""What kind of token a token is, by its text and by what stood before it in the same window.

    form         what the token is: each token is in exactly one
    repetition   whether the token, or the pair of it and the token before, stood before; and if so, whether its last
                 occurrence is within `reach` tokens (local attention sees it) or beyond
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

FORMS = ("newline", "space", "digit", "punctuation", "capitalised", "word-initial", "continuation", "other")


def form_of(text: str) -> str:
    """The one class of `FORMS` that a token's text belongs to; `other` are bytes that are no character of their own."""
    word = text.lstrip(" ")
    if "\n" in text or "\r" in text:
        return "newline"
    if not text.strip():
        return "space"
    if "\ufffd" in text:
        return "other"
    if all(letter.isdigit() for letter in word):
        return "digit"
    if not any(letter.isalnum() for letter in word):
        return "punctuation"
    first = next(letter for letter in word if letter.isalnum())
    if unicodedata.category(first) in ("Lu", "Lt"):
        return "capitalised"
    return "word-initial" if text.startswith(" ") else "continuation"


def forms(tokens: Int[np.ndarray, "B T"], decode: Callable[[Sequence[int]], str]) -> dict[str, Bool[np.ndarray, "B T"]]:
    """Where each form stands; every distinct token is decoded once, alone."""
    ids, where = np.unique(tokens, return_inverse=True)
    found = np.array([form_of(decode([int(token)])) for token in ids])[where.reshape(tokens.shape)]
    return {form: found == form for form in FORMS}


def repetitions(tokens: Int[np.ndarray, "B T"], reach: int) -> dict[str, Bool[np.ndarray, "B T"]]:
    """Where a token, or a pair of tokens, is new in its window, last seen within `reach` tokens, or seen beyond."""
    out = {f"{kind} {when}": np.zeros(tokens.shape, bool)
           for kind in ("token", "pair") for when in ("new", "seen near", "seen beyond")}
    for row, ids in enumerate(tokens.tolist()):
        last: dict[Any, int] = {}
        for place, token in enumerate(ids):
            units = {"token": token} | ({"pair": (ids[place - 1], token)} if place else {})
            for kind, unit in units.items():
                before = last.get(unit)
                when = "new" if before is None else "seen near" if place - before < reach else "seen beyond"
                out[f"{kind} {when}"][row, place] = True
                last[unit] = place
    return out
