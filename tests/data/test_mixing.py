"""The order of rows: shares that hold at every point, permutations that never change."""

import numpy as np
import pytest

from l2a_jax.data.mixing import interleave, make_mix, permutation


def test_every_prefix_has_the_shares_within_one_item_of_each_domain():
    counts = [700, 200, 99, 1]
    order = interleave(counts, [float(c) for c in counts], seed=3)
    for d, count in enumerate(counts):
        so_far = np.cumsum(order == d)
        expected = np.arange(1, 1001) * count / 1000
        assert so_far[-1] == count and np.abs(so_far - expected).max() <= len(counts)


@pytest.mark.parametrize("rates", [[1.0] * 4, [0.7, 0.2, 0.1], [0.999, 0.001], [1.0]])
def test_the_stream_counts_its_own_rows(rates):
    mix = make_mix(np.array(rates, float), 1000, seed=0)
    size = mix.domains.size
    np.testing.assert_allclose(mix.counts / size, np.array(rates) / sum(rates), atol=2 / size)
    seen = [0] * len(rates)
    for row in [*range(300), *range(size - 50, size + 300)]:
        domain, nth = mix.locate(row)
        if row in (300, size - 50):
            seen = mix.used(row)
        assert nth == seen[domain]
        seen[domain] += 1
    assert mix.used(size + 300) == seen


def test_natural_rates_make_an_epoch_of_the_mix_an_epoch_of_each_domain():
    mix = make_mix(np.array([30.0, 7.0, 3.0]), 40, seed=0)
    assert (mix.counts % [30, 7, 3] == 0).all()
    np.testing.assert_allclose(mix.used(40), [30, 7, 3], atol=1)


def test_permutations_are_those_of_today():
    """Values written down once: a new numpy must not reorder anybody's data."""
    assert permutation(0, "code", 0, 8).tolist() == [0, 6, 3, 7, 5, 2, 1, 4]
    assert sorted(permutation(1, "code", 5, 1000).tolist()) == list(range(1000))
    orders = [permutation(s, n, e, 50).tolist() for s in (0, 1) for n in ("a", "b") for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 8
