"""Echoes: what is copied where, what the model is asked for there, and who never hears one."""

import numpy as np
import pytest

from l2a_jax.data.batch import Batch
from l2a_jax.data.echo import COUNT, SPAN, echo_row, with_echoes
from l2a_jax.data.mixing import raw_random
from l2a_jax.errors import UserError

T = 256


def row_of(*lengths):
    """Distinct tokens, and documents of these lengths; the rest of the row is padding."""
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.arange(T, dtype=np.int32), np.pad(segments, (0, T - segments.size)).astype(np.int32)


def draws(seed):
    return raw_random(f"test {seed}", 2 * COUNT).reshape(COUNT, 2)


@pytest.mark.parametrize("seed", range(20))
def test_spans_repeat_what_came_before_in_the_same_document(seed):
    tokens, segments = row_of(40, 120, 70)
    heard = echo_row(tokens, segments, draws(seed))
    assert (heard <= tokens).all() and (tokens == np.arange(T)).all(), "from the past; the input is left alone"
    np.testing.assert_array_equal(segments[heard], segments)
    np.testing.assert_array_equal(heard[230:], tokens[230:])  # padding
    np.testing.assert_array_equal(heard[:40], tokens[:40])  # a document too short for two spans
    changed = np.flatnonzero(heard != tokens)
    assert changed.size in range(SPAN, COUNT * SPAN + 1, SPAN)
    for span in changed.reshape(-1, SPAN):  # whole, in order, and its first occurrence is still there
        np.testing.assert_array_equal(np.diff(heard[span]), 1)
        np.testing.assert_array_equal(heard[heard[span]], heard[span])


def test_places_are_drawn_from_all_there_are():
    tokens, segments = row_of(T)
    heard = np.array([echo_row(tokens, segments, draws(seed)) for seed in range(200)])
    assert (heard[:, SPAN:] != tokens[SPAN:]).any(axis=0).all() and (heard[:, :SPAN] == tokens[:SPAN]).all()
    first = np.array([echo_row(tokens, segments, draws(seed)[:1]) for seed in range(50)])
    assert {int(row[row != tokens][0]) for row in first} <= set(range(SPAN)), "the document's beginning"
    reached = {int(heard[row, place]) for row, place in zip(*np.nonzero(heard != tokens), strict=True)}
    assert min(reached) == 0 and max(reached) > T - 2 * SPAN - 10


def test_one_echo_by_hand():
    tokens = np.arange(2 * SPAN, dtype=np.int32)  # the only place that is left for it
    np.testing.assert_array_equal(echo_row(tokens, None, draws(0)), np.tile(tokens[:SPAN], 2))
    for short in (2 * SPAN - 1, SPAN - 1, 1):
        np.testing.assert_array_equal(echo_row(tokens[:short], None, draws(0)), tokens[:short])


def test_the_target_is_the_next_token_that_is_seen():
    tokens, segments = row_of(200)
    targets = np.where(np.arange(T) < 200, np.arange(T) + 1, 0).astype(np.int32)
    batch = Batch(np.tile(tokens, (8, 1)), np.tile(targets, (8, 1)), np.tile((segments > 0).astype(np.float32), (8, 1)),
                  np.tile(segments, (8, 1)), np.tile(np.arange(T, dtype=np.int32), (8, 1)))
    heard = with_echoes(batch, range(40, 48), 0.5, seed=1)
    echoed = (heard.tokens != batch.tokens).any(axis=1)
    assert 1 <= echoed.sum() <= 7
    np.testing.assert_array_equal(heard.targets[:, :199], heard.tokens[:, 1:200])
    np.testing.assert_array_equal(heard.targets[:, 199:], batch.targets[:, 199:])
    assert heard.weights is batch.weights and heard.segment_ids is batch.segment_ids
    part = with_echoes(Batch(*(a[5:] for a in batch)), range(45, 48), 0.5, seed=1)
    np.testing.assert_array_equal(part.tokens, heard.tokens[5:])  # by place in the stream, however it is divided
    np.testing.assert_array_equal(with_echoes(batch, range(8), 0.0, seed=1).tokens, batch.tokens)
    assert (with_echoes(batch, range(8), 1.0, seed=1).tokens != batch.tokens).any(axis=1).all()


@pytest.mark.parametrize("packing", ("best_fit", "concat"))
def test_data_with_echoes(opened, write, texts, packing):
    path = write("a.jsonl", texts(60, 100, 400))
    plain, heard, again = (opened(path, held_out=0.2, packing=packing, echo=share) for share in (0.0, 0.5, 0.5))
    assert plain.fingerprint != heard.fingerprint == again.fingerprint and heard.describe()["echo"] == 0.5
    changed = [(plain.batch(i).tokens != heard.batch(i).tokens).any(axis=1) for i in range(8)]
    assert 0.2 < np.mean(changed) < 0.8
    for i in range(8):
        np.testing.assert_array_equal(heard.batch(i).tokens, again.batch(i).tokens)
    for one, two in zip(plain.held_out(), heard.held_out(), strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
    with pytest.raises(UserError, match="echo is 2; expected a share"):
        opened(path, echo=2)
