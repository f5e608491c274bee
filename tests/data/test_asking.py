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
        text = read(asked_row(prose, f"t{seed}", encode).tokens, tokenizer)
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
        row = asked_row(prose, f"t{seed}", encode).tokens
        assert row.shape == prose.shape and row.dtype == prose.dtype and (row != prose).any()
        np.testing.assert_array_equal(row, asked_row(prose, f"t{seed}", encode).tokens)
        words = read(prose, tokenizer).split()
        if read(row, tokenizer).startswith(words[0]):
            there = iter(words)
            mine = [word for word in read(row, tokenizer).split() if word in set(words)]
            kept += sum(word in there for word in mine[:50]) >= 45
    assert kept >= 5, "text of the row in which things are said"
    for short in (1, 7, 15):
        assert asked_row(prose[:short], "t0", encode) is None, "no room"
    assert {asked_row(prose[:900], f"t{seed}", encode).tokens.shape for seed in range(20)} == {(900,)}


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
    rows = {asked_row(prose, f"t{seed}", encode).tokens.tobytes() for seed in range(12)}
    assert {*met} == {*KINDS} and len(KINDS) == 4 and len(rows) == 12


def test_answers_are_what_the_row_says_after_its_questions(prose, encode, tokenizer):
    """All tokens of answers and no other: read one by one they are the ends of lines that begin as a question does."""
    starts = ("As said above, ", "Asked which ", "Q: ", "All that stand for ", "In the end ",
              "The words that came again", "How often the list holds ")
    for seed in range(12):
        row = asked_row(prose, f"t{seed}", encode)
        assert row.answers.shape == row.tokens.shape and 0 < row.answers.mean() < 0.2
        edges = np.flatnonzero(np.diff(np.r_[0, row.answers.astype(int), 0]))
        for begin, end in edges.reshape(-1, 2):
            before = read(row.tokens[:begin], tokenizer).rpartition("\n")[2]
            answer = read(row.tokens[begin:end], tokenizer)
            assert before.startswith(starts) or re.fullmatch(r"[a-z]+ [a-z]+(?: [a-z]+)?, [a-z]+:", before), before
            assert answer.endswith("\n") and answer.strip()
            assert not QUESTION.match("\n" + before + answer) or QUESTION.match("\n" + before + answer)["value"] \
                == answer.strip()


def test_answers_have_their_weight_and_nothing_else_changes(opened, write, texts):
    path = write("a.jsonl", texts(60, 100, 400))
    one, four = (opened(path, held_out=0.2, ask=1.0, **given) for given in ({}, {"answer_weight": 4.0}))
    assert one.fingerprint != four.fingerprint and four.describe()["answer_weight"] == 4
    assert "answer_weight" not in one.describe()
    weighted = 0
    for i in range(6):
        was, now = one.batch(i), four.batch(i)
        for name in ("tokens", "targets", "segment_ids", "positions"):
            np.testing.assert_array_equal(getattr(was, name), getattr(now, name))
        assert {*np.unique(now.weights)} <= {0, 1, 4}
        np.testing.assert_array_equal(np.minimum(now.weights, 1), was.weights)
        weighted += (now.weights == 4).sum()
    assert weighted
