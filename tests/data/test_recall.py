"""The recall corpus: reproducible, in its vocabulary, and its ground truth is what it says."""

import numpy as np
import pytest

from l2a_jax.config import MODELS
from l2a_jax.data.batch import TrainingData
from l2a_jax.data.recall import IDS, KEEP, TELL, VOCABULARY, RecallCorpus, needs_memory
from l2a_jax.errors import UserError
from l2a_jax.sources import recall_tokenizer

CORPUS = RecallCorpus(256, 8, seed=3)


def test_batches_are_a_function_of_the_seed_and_the_index():
    again = RecallCorpus(256, 8, seed=3)
    for index in (5, 0, 5):
        np.testing.assert_array_equal(CORPUS.batch(index).tokens, again.batch(index).tokens)
    assert (CORPUS.batch(0).tokens != CORPUS.batch(1).tokens).any()
    assert (CORPUS.batch(0).tokens != RecallCorpus(256, 8, seed=4).batch(0).tokens).any()
    assert isinstance(CORPUS, TrainingData)


def test_held_out_text_is_the_same_for_every_seed_and_never_trained_on():
    held = next(iter(CORPUS.held_out(1)))
    np.testing.assert_array_equal(held.tokens, next(iter(RecallCorpus(256, 8, seed=9).held_out(1))).tokens)
    trained = {row.tobytes() for index in range(50) for row in CORPUS.batch(index).tokens}
    assert not trained & {row.tobytes() for row in held.tokens}


def test_every_answer_was_stated_once_before_and_at_least_the_distance_ago():
    asked = 0
    for index in range(5):
        batch = CORPUS.batch(index)
        np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        for row, column in zip(*np.nonzero(needs_memory(batch.tokens)), strict=True):
            tokens, subject = batch.tokens[row], batch.tokens[row, column]
            earlier = np.flatnonzero(tokens[:column] == subject)
            assert tokens[column - 1] == TELL and tokens[earlier[0] - 1] == KEEP
            assert {int(tokens[at + 1]) for at in earlier} == {int(batch.targets[row, column])}
            assert column - earlier[-1] > CORPUS.distance
            asked += 1
    assert asked > 200


def test_what_is_kept_cannot_be_guessed_from_the_subject():
    answers = {}
    for index in range(20):
        batch = CORPUS.batch(index)
        needed = needs_memory(batch.tokens)
        for subject, answer in zip(batch.tokens[needed], batch.targets[needed], strict=True):
            answers.setdefault(int(subject), []).append(int(answer))
    for given in answers.values():
        assert np.bincount(given).max() / len(given) < 0.35  # eight equally likely values


def test_emphasis_weighs_the_answers_alone():
    batch = RecallCorpus(256, 2, emphasis=5.0).batch(0)
    np.testing.assert_array_equal(batch.weights, np.where(needs_memory(batch.tokens), 5.0, 1.0))
    assert (next(RecallCorpus(256, 2, emphasis=5.0).held_out(1)).weights == 1).all()


def test_tokenizer_and_vocabulary():
    assert len(VOCABULARY) == len(set(VOCABULARY)) <= MODELS["tiny"].vocab_size
    tokenizer, text = recall_tokenizer(), "the quiet river . keep metal iron . tell metal iron ."
    assert tokenizer.encode(text) == [IDS[word] for word in text.split()]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_row_too_short_for_the_distance_is_refused():
    with pytest.raises(UserError, match="--seq-len of at least"):
        RecallCorpus(128, 4, distance=64)
