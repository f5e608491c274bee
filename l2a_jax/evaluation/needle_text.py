"""What a needle, its question and the hay are made of, as tokens.

Two kinds: English prose with access codes for a real model, and the synthetic recall corpus, whose facts are needles
already, for the embedded one. A form draws facts (key, answer), no two alike, and wrong answers like the first one's;
it says a fact, the question after the hay up to where the answer begins, and the answer's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from l2a_jax.data import recall
from l2a_jax.data.files import SUFFIXES, find, once
from l2a_jax.data.recipes import Domain
from l2a_jax.data.text import fragments, pieces
from l2a_jax.errors import UserError
from l2a_jax.weights.tokenizer import Tokenizer

RECALL = "recall"
"""The haystack that stands for the synthetic recall corpus."""
SURPLUS = 8
"""A haystack is read until it is so many times the longest context: every seed cuts its hay elsewhere."""

ADJECTIVES = "amber brass coral distant eastern frozen granite hollow ivory lonely marble northern quiet silver".split()
PLACES = "archive bakery bridge chapel cottage factory garden harbour library lighthouse mill museum tavern".split()
OPENING = "Somewhere in the text below, access codes are given. Remember them: a question about one follows at the " \
          "end.\n\n"
NEEDLE = "\nThe access code for the {key} is {answer}.\n"
QUESTION = "\n\nQuestion: What is the access code for the {key}, as given in the text above?\nAnswer: " \
           "The access code for the {key} is"


class Haystack:
    """Hay as token ids, and where a sentence ends: needles go between sentences."""

    def __init__(self, tokens: Int[np.ndarray, " S"], ends: Bool[np.ndarray, " S"], name: str):
        self.tokens, self.ends, self.name = tokens, ends, name

    def cut(self, count: int, rng: np.random.Generator) -> tuple[Int[np.ndarray, " count"], Int[np.ndarray, " P"]]:
        """`count` tokens from a random place, from a sentence's start where there is one, and the places between
        sentences: 0, `count`, and after every sentence's end."""
        last = self.tokens.size - count
        starts = np.append(0, np.flatnonzero(self.ends[:last]) + 1)
        start = int(starts[rng.integers(starts.size)])
        places = np.flatnonzero(self.ends[start : start + count]) + 1
        return self.tokens[start : start + count], np.unique(np.concatenate([[0], places, [count]]))


@dataclass(frozen=True)
class CodeForm:
    """Access codes of `digits` digits for places with two-word names, in English."""

    tokenizer: Tokenizer
    digits: int

    @property
    def opening(self) -> list[int]:
        """Says what is coming, as a reader would be told."""
        return self._encode(OPENING)

    def draw(self, rng, needles, wrong):
        """Codes never begin with 0; all of one prompt differ."""
        low, high = 10 ** (self.digits - 1), 10**self.digits
        codes = [str(low + int(code)) for code in rng.choice(high - low, needles + wrong, replace=False)]
        keys = rng.choice(len(ADJECTIVES) * len(PLACES), needles, replace=False)
        names = [f"{ADJECTIVES[key // len(PLACES)]} {PLACES[key % len(PLACES)]}" for key in keys.tolist()]
        return list(zip(names, codes, strict=False)), codes[needles:]

    def needle(self, key, answer):
        """On a line of its own."""
        return self._encode(NEEDLE.format(key=key, answer=answer))

    def question(self, key):
        """Up to what all answers share: how a tokenizer splits ` 1` differs, and the shared part is no knowledge."""
        return self._split(key, "")[0]

    def answer(self, key, answer):
        """The code's own tokens."""
        return self._split(key, answer)[1]

    def _split(self, key: str, answer: str) -> tuple[list[int], list[int]]:
        question = QUESTION.format(key=key)
        probes = [self._encode(f"{question} {digit * self.digits}") for digit in "123456789"]
        shared = next(i for i, ids in enumerate(zip(*probes, strict=False)) if len(set(ids)) > 1)
        return probes[0][:shared], self._encode(f"{question} {answer}")[shared:] if answer else []

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


@dataclass(frozen=True)
class RecallForm:
    """`keep metal copper .` in the hay, `tell metal` at the end: one word to answer, eight it could be."""

    tokenizer: Tokenizer

    opening = ()

    def draw(self, rng, needles, wrong):
        """Every subject is a key; the wrong answers are the subject's other values."""
        subjects = [str(one) for one in rng.choice(recall.SUBJECTS, needles, replace=False)]
        values = [[str(one) for one in rng.permutation(recall.FACTS[subject].split())] for subject in subjects]
        return [(subject, value[0]) for subject, value in zip(subjects, values, strict=True)], values[0][1 : 1 + wrong]

    def needle(self, key, answer):
        """A fact as the corpus states it."""
        return [recall.KEEP, recall.IDS[key], recall.IDS[answer], recall.STOP]

    def question(self, key):
        """A question as the corpus asks it."""
        return [recall.TELL, recall.IDS[key]]

    def answer(self, key, answer):
        """One word."""
        return [recall.IDS[answer]]


def recall_haystack(count: int) -> Haystack:
    """At least `count` tokens of the recall corpus's ordinary sentences: hay without facts."""
    rng = np.random.default_rng((0, 2))
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += recall._sentence(rng)
    ids = np.asarray(tokens, np.int32)
    return Haystack(ids, ids == recall.STOP, RECALL)


def text_haystack(places: Sequence[str], tokenizer: Tokenizer, longest: int, join: str | None) -> Haystack:
    """Files, folders and globs as hay, read until there is enough. Raises UserError if there is too little of it.

    `longest`: tokens of hay in the longest context; `join`: the field whose equal neighbours form one document.
    """
    parts, total = [], 0
    for text in hay_texts(places, join):
        parts.append(np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32))
        total += parts[-1].size
        if total >= SURPLUS * longest:
            break
    named = ", ".join(places)
    if not total:
        raise UserError(f"the haystack {named} holds no text")
    if total < longest:
        raise UserError(f"the haystack {named} holds {total} tokens; the longest context needs {longest}: give more "
                        "text or shorter lengths")
    tokens = np.concatenate(parts)
    unique, inverse = np.unique(tokens, return_inverse=True)
    texts = (tokenizer.decode([token]).rstrip(' "\n\u201d') for token in unique.tolist())
    ends = np.array([text.endswith((".", "!", "?")) for text in texts])
    return Haystack(tokens, ends[inverse], named)


def hay_texts(places: Sequence[str], join: str | None) -> Iterator[str]:
    """The texts of files, folders and globs, a blank line after each document. Raises UserError where one is none."""
    files = once(path for place in places for path in _files(place))
    domain = Domain("haystack", "haystack", files=files, join=join)
    for piece in pieces(fragments(domain)):
        if piece.text:
            yield piece.text + "\n\n" if piece.ends else piece.text


def _files(place: str) -> list[Path]:
    found = find(place, f"the haystack {place}")
    if not found:
        raise UserError(f"the haystack {place} is no file, folder or pattern that holds {', '.join(SUFFIXES)} text")
    return found
