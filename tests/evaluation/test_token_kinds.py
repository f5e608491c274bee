"""Kinds of tokens: forms by hand, repetitions by their definition."""

import numpy as np

from l2a_jax.evaluation.token_kinds import FORMS, form_of, repetitions

PIECES = ["The", " cat", " sat", ".", "\n", "It", " was", " 3", "4", "\n\n", " ", "ing", " Zoë", "\ufffd", "\n  x",
          " +="]
EXPECTED = ["capitalised", "word-initial", "word-initial", "punctuation", "newline", "capitalised", "word-initial",
            "digit", "digit", "newline", "space", "continuation", "capitalised", "other", "newline", "punctuation"]


def decode(ids):
    return "".join(PIECES[i] for i in ids)


def test_forms_by_hand():
    assert [form_of(piece) for piece in PIECES] == EXPECTED
    assert form_of("") == "space" and form_of("x1") == "continuation" and set(EXPECTED) == set(FORMS)


def test_repetitions_by_the_definition():
    rng = np.random.default_rng(0)
    tokens, reach = rng.integers(0, 9, (3, 60)), 5
    found = repetitions(tokens, reach)
    for row in range(3):
        for place in range(60):
            ids = tokens[row].tolist()
            ago = [place - other for other in range(place) if ids[other] == ids[place]]
            pairs = [place - other for other in range(1, place)
                     if ids[other - 1 : other + 1] == ids[place - 1 : place + 1]]
            for kind, distances in (("token", ago), ("pair", pairs)):
                if kind == "pair" and place == 0:
                    expected = [False] * 3
                else:
                    expected = [not distances, bool(distances) and min(distances) < reach,
                                bool(distances) and min(distances) >= reach]
                assert [found[f"{kind} {when}"][row, place] for when in ("new", "seen near", "seen beyond")] == expected
