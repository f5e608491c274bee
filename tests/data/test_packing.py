"""Plans: every token once, documents cut only where they must be, rows full."""

import numpy as np
import pytest

from l2a_jax.data.packing import best_fit, best_fit_rows, concatenate


def documents(lengths):
    lengths = np.asarray(lengths, np.int64)
    return np.cumsum(lengths) - lengths, lengths


def covered(plan, total):
    seen = np.zeros(total, int)
    for start, length in zip(plan.starts, plan.lengths, strict=True):
        seen[start : start + length] += 1
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_best_fit_places_every_token_once_and_cuts_only_long_documents(seed):
    rng = np.random.default_rng(seed)
    starts, lengths = documents(rng.integers(1, 300, 500))
    plan = best_fit(starts, lengths, 128)
    seen = covered(plan, lengths.sum())
    left_over = (lengths % 128 == 1) & (lengths > 128)  # a lone end token is only ever a target
    assert np.flatnonzero(seen != 1).tolist() == (starts + lengths - 1)[left_over].tolist() and seen.max() == 1
    assert plan.row_tokens.max() <= 128 and plan.row_tokens.min() > 0
    assert plan.row_tokens.sum() / (plan.row_count * 128) > 0.97
    pieces = np.bincount(np.searchsorted(starts, plan.starts, side="right") - 1, minlength=lengths.size)
    np.testing.assert_array_equal(pieces, -(-(lengths - left_over) // 128))
    np.testing.assert_array_equal(plan.ends, np.isin(plan.starts + plan.lengths, starts + lengths))


def test_best_fit_is_best_fit_decreasing():
    """Against the textbook algorithm, one document at a time."""
    lengths = np.random.default_rng(0).integers(1, 65, 400)
    rows = best_fit_rows(lengths, 64)
    room: list[int] = []
    for size in sorted(lengths.tolist(), reverse=True):
        fitting = [(r, i) for i, r in enumerate(room) if r >= size]
        if fitting:
            room[min(fitting)[1]] -= size
        else:
            room.append(64 - size)
    assert rows.max() + 1 == len(room)
    assert sorted(64 - np.bincount(rows, weights=lengths).astype(int)) == sorted(room)


def test_best_fit_is_deterministic_and_quick_for_a_million_documents():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 1_000_000).astype(np.int64) + 1
    starts = np.cumsum(lengths) - lengths
    first, second = best_fit(starts, lengths, 2048), best_fit(starts, lengths, 2048)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.row_tokens.sum() / (first.row_count * 2048) > 0.999


@pytest.mark.parametrize("lengths", [[128], [129], [127], [1], [256, 128], [257], []])
def test_lengths_at_the_edges(lengths):
    starts, lengths = documents(lengths)
    plan = best_fit(starts, lengths, 128)
    assert plan.row_count == sum(max(1, -(-(n - 1) // 128)) for n in lengths.tolist()) or lengths.size > 1
    assert plan.rows[-1] == plan.starts.size and (plan.row_tokens <= 128).all()


def test_concatenation_is_one_string_cut_at_every_row():
    starts, lengths = documents([5, 1, 20, 8, 3])
    plan = concatenate(starts, lengths, 8)
    assert plan.row_tokens.tolist() == [8, 8, 8, 8, 5]
    order = np.concatenate([np.arange(s, s + n) for s, n in zip(plan.starts, plan.lengths, strict=True)])
    np.testing.assert_array_equal(order, np.arange(37))
    np.testing.assert_array_equal((plan.starts + plan.lengths)[plan.ends], starts + lengths)
    assert concatenate(starts[:0], lengths[:0], 8).row_count == 0
