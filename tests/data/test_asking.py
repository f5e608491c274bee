"""Rows that ask about themselves: every answer was said before, nothing else is changed, and a row decides its own."""

import re

import numpy as np
import pytest

from l2a_jax.data.asking import KINDS, asked_row, with_questions
from l2a_jax.data.encoder import make_encoder
from l2a_jax.errors import UserError

T = 6_000
QUESTION = re.compile(r"\n(?:As said above, the .+ of the (?P<a>.+) is|Asked which .+ the (?P<b>.+) has, one answers:"
                      r"|Q: .+ of the (?P<c>.+)\? A:|(?P<d>[a-z][a-z ]+), [a-z ]+:) (?P<value>.+)")


@pytest.fixture
def encode(tokenizer):
    return make_encoder(tokenizer).encode


@pytest.fixture
def prose(encode, texts):
    return encode(["\n".join(texts(60, 100, 150))])[0][:T].astype(np.int32)


def read(row, tokenizer):
    return tokenizer.decode(row.tolist())


def test_every_answer_was_said_before_it_is_asked_for(prose, encode, tokenizer):
    found = set()
    for seed in range(40):
        text = read(asked_row(prose, f"t{seed}", encode), tokenizer)
        for match in QUESTION.finditer(text):
            subject = next(filter(None, match.groups()[:4]))
            before = text[: match.start()]
            for value in match["value"].rstrip(".").split(", "):
                assert re.search(rf"{re.escape(subject)}\b[^.]*{re.escape(value)}", before), (seed, match[0])
            found.add("note")
        for match in re.finditer(r"\nAll that stand for (.+): (.+)\.", text):
            value, chain = match[1], match[2].split(", ")
            for name, source in zip(chain, [value, *chain], strict=False):
                assert re.search(rf"{name}\b.*\b{source}|{source}\b.*\b{name}", text[: match.start()]), (seed, name)
            found.add("names")
        for match in re.finditer(r"\nHow often the list holds (\w+) was counted: (\d+) times", text):
            listed = re.split(r"\nThe words that came again", text)[0]
            assert len(re.findall(rf"\b{match[1]}\b", listed)) == int(match[2])
            found.add("tally")
    assert found == {"note", "names", "tally"}


def test_a_row_keeps_its_length_and_its_text_in_order(prose, encode, tokenizer):
    kept = 0
    for seed in range(40):
        row = asked_row(prose, f"t{seed}", encode)
        assert row.shape == prose.shape and row.dtype == prose.dtype and (row != prose).any()
        np.testing.assert_array_equal(row, asked_row(prose, f"t{seed}", encode))
        words = read(prose, tokenizer).split()
        if read(row, tokenizer).startswith(words[0]):
            there = iter(words)
            mine = [word for word in read(row, tokenizer).split() if word in set(words)]
            kept += sum(word in there for word in mine[:50]) >= 45
    assert kept >= 5, "text of the row in which things are said"
    for short in (1, 7, 15):
        assert asked_row(prose[:short], "t0", encode) is None, "no room"
    assert {asked_row(prose[:900], f"t{seed}", encode).shape for seed in range(20)} == {(900,)}


def test_questions_come_with_targets_and_one_document(opened, write, texts):
    path = write("a.jsonl", texts(60, 100, 400))
    plain, asks, again = (opened(path, held_out=0.2, ask=share) for share in (0.0, 0.5, 0.5))
    assert plain.fingerprint != asks.fingerprint == again.fingerprint and asks.describe()["ask"] == 0.5
    asked = []
    for i in range(24):
        was, now = plain.batch(i), asks.batch(i)
        np.testing.assert_array_equal(now.tokens, again.batch(i).tokens)
        for b in range(was.tokens.shape[0]):
            asked.append((now.tokens[b] != was.tokens[b]).any())
            if not asked[-1]:
                assert all((x[b] == y[b]).all() for x, y in zip(was, now, strict=True))
                continue
            np.testing.assert_array_equal(now.targets[b, :-1], now.tokens[b, 1:])
            assert (now.weights[b, :-1] == 1).all() and now.weights[b, -1] == 0 and (now.segment_ids[b] == 1).all()
            np.testing.assert_array_equal(now.positions[b], np.arange(now.tokens.shape[1]))
    assert 0.2 < np.mean(asked) < 0.8
    for one, two in zip(plain.held_out(), asks.held_out(), strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
    batch = plain.batch(0)
    whole = with_questions(batch, range(4, 4 + len(batch.tokens)), 0.5, 3, asks.encoder.encode)
    part = with_questions(type(batch)(*(x[1:] for x in batch)), range(5, 4 + len(batch.tokens)), 0.5, 3,
                          asks.encoder.encode)
    np.testing.assert_array_equal(part.tokens, whole.tokens[1:])  # by place in the stream, however it is divided
    with pytest.raises(UserError, match="ask is 2; expected a share"):
        opened(path, ask=2)


def test_all_kinds_occur(prose, encode, monkeypatch):
    met = []
    for kind, make in list(KINDS.items()):
        monkeypatch.setitem(KINDS, kind, lambda *given, kind=kind, make=make: met.append(kind) or make(*given))
    rows = {asked_row(prose, f"t{seed}", encode).tobytes() for seed in range(12)}
    assert {*met} == {*KINDS} and len(KINDS) == 4 and len(rows) == 12
