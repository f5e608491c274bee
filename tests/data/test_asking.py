"""Rows that ask about themselves: every answer was said before, nothing else is changed, and a row decides its own."""

import re

import numpy as np
import pytest

from l2a_jax.data.asking import (
    ASKED,
    GROUPED,
    KINDS,
    NOTED,
    QUALITIES,
    THINGS,
    _Draws,
    asked_row,
    with_questions,
)
from l2a_jax.data.batch import decode_row
from l2a_jax.data.curriculum import Curriculum, Stage
from l2a_jax.data.encoder import make_encoder
from l2a_jax.errors import UserError

T = 6_000
SUBJECT = re.compile(rf"\b(?:{'|'.join(QUALITIES)}) (?:{'|'.join(THINGS)})\b(?: (?:[bdfgklmnprstv][aeo]){{3,4}}\b)?")


@pytest.fixture
def encode(tokenizer):
    return make_encoder(tokenizer).encode


@pytest.fixture
def prose(encode, texts):
    return encode(["\n".join(texts(60, 100, 150))])[0][:T].astype(np.int32)


def read(row, tokenizer):
    return tokenizer.decode(row.tolist())


def made(kind, seed, room=4_000):
    return KINDS[kind](_Draws(f"test {seed}"), room)


@pytest.mark.parametrize("kind", ["notes", "register"])
def test_every_answer_was_said_of_what_is_asked_for(kind):
    """All values of every subject of a question, in its order; some questions ask for several subjects."""
    several = values = 0
    for seed in range(60):
        said, asked = made(kind, seed)
        for question, answer in asked:
            subjects = SUBJECT.findall(question)
            parts = answer.rstrip('."}').split("; ")
            assert len(parts) == len(subjects) > 0, (question, answer)
            several += len(subjects) > 1
            for subject, part in zip(subjects, parts, strict=True):
                found = part.split(", ")
                mine = [text for text in said if subject in text and any(value in text for value in found)]
                assert len(mine) == len(found), (subject, part)
                assert all(value in text for value, text in zip(found, mine, strict=True)), (part, mine)
                values += len(found) > 1
    assert several > 5 and (values > 5 or kind == "register")


def test_names_lead_to_their_value_and_lists_are_counted():
    for seed in range(40):
        said, asked = made("names", seed)
        for (question, answer), (last, value) in zip(asked[::2], asked[1::2], strict=True):
            chain, value = answer.removesuffix(".").split(", "), value.removesuffix(".")
            assert chain[-1] in last and value in question
            for name, source in zip(chain, [value, *chain], strict=False):
                assert any(re.search(rf"\b{name}\b", text) and re.search(rf"\b{source}\b", text) for text in said)
        said, asked = made("tally", seed)
        words = [re.sub(r"^(?:, |\n- |; | )", "", text) for text in said]
        often = asked[0][1].removesuffix(".").split(", ")
        assert len({*often}) == len(often) and min(map(words.count, often)) >= 8
        for question, answer in asked[1:]:
            word = re.search(r"list holds (\w+) was", question)[1]
            assert answer == f"{words.count(word)} times." and word in often


def test_wordings_differ_and_say_all_there_is_to_say():
    for wordings, parts in ((NOTED, ("subject", "attribute", "value")), (ASKED, ("subject", "attribute", "value")),
                            (GROUPED, ("things", "value"))):
        assert len({*wordings}) == len(wordings)
        assert all(wording.count(f"{{{part}}}") == 1 for wording in wordings for part in parts)
    assert all(wording.startswith("\n") for wording in (*ASKED, *GROUPED))


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
    plain, asks, again = (opened(path, held_out=0.2, ask=share, seq_len=512) for share in (0.0, 0.5, 0.5))
    assert plain.fingerprint != asks.fingerprint == again.fingerprint and asks.describe()["ask"] == 0.5
    assert asks.describe()["asking"] == 2 and "asking" not in plain.describe()
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
    assert 0.35 < np.mean(asked) < 0.65
    for one, two in zip(plain.held_out(), asks.held_out(), strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
    batch = plain.batch(0)
    whole = with_questions(batch, range(4, 4 + len(batch.tokens)), 0.5, 3, asks.encoder.encode)
    part = with_questions(type(batch)(*(x[1:] for x in batch)), range(5, 4 + len(batch.tokens)), 0.5, 3,
                          asks.encoder.encode)
    np.testing.assert_array_equal(part.tokens, whole.tokens[1:])  # by place in the stream, however it is divided
    with pytest.raises(UserError, match="ask is 2; expected a share"):
        opened(path, ask=2)


@pytest.mark.parametrize("seq_len", [120, 256])
def test_tokens_are_counted_as_they_are_read(seq_len, opened, write, texts):
    """By domain, also where a row has no room to ask; a stage of a curriculum reads on where it stands."""
    spec = [f"a={write('a.jsonl', texts(60, 5, 90))}", f"b={write('b.jsonl', texts(40, 20, 60, seed=1))}"]
    plain, data = (opened(spec, ask=share, seq_len=seq_len) for share in (0.0, 0.6))
    tokens, asking = dict.fromkeys("ab", 0), 0
    for index in range(12):
        batch = data.batch(index)
        asking += int((batch.tokens != plain.batch(index).tokens).any(axis=1).sum())
        for row, count in enumerate((batch.segment_ids > 0).sum(axis=1).tolist(), index * data.batch_size):
            tokens[data.parts[data.mix.locate(row)[0]].domain.name] += count
    used = data.usage(12)
    assert {name: domain["tokens"] for name, domain in used["domains"].items()} == tokens
    assert data.tokens_read(12) == used["tokens"] == sum(tokens.values()) > plain.tokens_read(12)
    assert data.tokens_per_batch == plain.tokens_per_batch, "a budget of tokens is as many steps"
    assert 0 < asking < 15 if seq_len == 120 else asking > 20
    staged = Curriculum(data, (Stage(seq_len, 0.5, plain, 2, 3), Stage(seq_len, 0.5, data, 1, 8)), 2)
    assert staged.tokens_read(16) == plain.tokens_read(6) + data.tokens_read(8) - data.tokens_read(3)
    assert staged.tokens_read(4) == plain.tokens_read(4)


def test_all_kinds_occur(prose, encode, monkeypatch):
    met = []
    for kind, make in list(KINDS.items()):
        monkeypatch.setitem(KINDS, kind, lambda *given, kind=kind, make=make: met.append(kind) or make(*given))
    rows = {asked_row(prose, f"t{seed}", encode).tokens.tobytes() for seed in range(12)}
    assert {*met} == {*KINDS} and len(KINDS) == 4 and len(rows) == 12


def test_answers_are_what_the_row_says_after_its_questions(prose, encode, tokenizer):
    """The tokens that are marked are, one answer after the other, all that the row's questions are answered with."""
    for seed in range(12):
        row = asked_row(prose, f"t{seed}", encode)
        assert row.answers.shape == row.tokens.shape and 0 < row.answers.mean() < 0.2
        edges = np.flatnonzero(np.diff(np.r_[0, row.answers.astype(int), 0])).reshape(-1, 2)
        kind = _Draws(f"t{seed}").of(tuple(KINDS))
        found = sorted(read(row.tokens[begin:end], tokenizer).strip() for begin, end in edges)
        tries = [KINDS[kind](_Draws(f"t{seed} {attempt}"), T >> attempt)[1] for attempt in range(4)]
        assert found in [sorted(answer.strip() for _, answer in asked) for asked in tries]


def test_answers_have_their_weight_and_nothing_else_changes(opened, write, texts, tokenizer):
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
        assert decode_row(now, 0, tokenizer) == decode_row(was, 0, tokenizer)
    assert weighted
