"""The cut of a router: as near as bisection comes, in fewer passes."""

import numpy as np
import pytest

from l2a_jax.research.rivals.cut import FURTHEST, cut_at

NEAR = 0.002
DENSITIES = (0.4, 0.2, 0.1, 0.05, 0.02)
SPREADS = {
    "logistic": lambda rng, width: rng.logistic(0, width, 20_000),
    "shifted": lambda rng, width: rng.logistic(-1.5 * width, width, 20_000),
    "normal": lambda rng, width: rng.normal(width, 1.8 * width, 20_000),
    "layers": lambda rng, width: np.concatenate([
        rng.logistic(place * width, scale * width, 2_500)
        for place, scale in zip(np.linspace(-3, 2, 8), rng.uniform(0.5, 2, 8), strict=True)]),
    "skewed": lambda rng, width: width * (rng.exponential(1.5, 20_000) - 1),
}


class Router:
    """The share of these logits that a cut routes, and how often it was asked."""

    def __init__(self, logits):
        self.logits, self.asked = np.sort(logits), 0

    def __call__(self, cut):
        self.asked += 1
        return 1 - np.searchsorted(self.logits, np.float32(cut)) / len(self.logits)


def bisected(density, share_of, rounds=18):
    """The nearest share that bisection comes to."""
    low, high, cut, found = -FURTHEST, FURTHEST, 0.0, []
    for _ in range(rounds):
        found.append(share_of(cut))
        if abs(found[-1] - density) <= NEAR:
            break
        low, high = (cut, high) if found[-1] > density else (low, cut)
        cut = (low + high) / 2
    return min(found, key=lambda share: abs(share - density))


@pytest.mark.parametrize("width", [0.02, 0.1, 0.5, 2.0, 8.0, 20.0])
@pytest.mark.parametrize("spread", SPREADS)
def test_few_passes_find_the_cut(spread, width):
    router, tried = Router(SPREADS[spread](np.random.default_rng(0), width)), {}
    for place, density in enumerate(DENSITIES):
        before, oracle = router.asked, bisected(density, Router(router.logits))
        cut = cut_at(density, router, tried)
        assert router.asked - before <= (6 if place == 0 else 5), density
        assert tried[cut] == Router(router.logits)(cut) and router.asked == len(tried)
        assert abs(tried[cut] - density) <= max(NEAR, abs(oracle - density)), density


def test_a_router_that_is_nearly_the_same_says_where_to_begin():
    rng, known = np.random.default_rng(1), {}
    logits = rng.normal(0.3, 0.2, 20_000)
    for density in DENSITIES:
        cut_at(density, Router(logits), known)
    asked = []
    for density in DENSITIES:
        router, tried = Router(logits + 0.01), {}
        assert abs(tried[cut_at(density, router, tried, like=known)] - density) <= NEAR
        asked.append(router.asked)
    assert max(asked) <= 3 and sum(asked) <= 2 * len(asked)


@pytest.mark.parametrize("logits", [
    np.zeros(10), np.full(10, 0.7), np.full(10, -3.0), np.repeat([-1.0, 0.25, 0.3], [2, 5, 3]),
    np.repeat([-40.0, 0.0, 40.0], [3, 4, 3]), np.repeat([-500.0, 900.0], [4, 6]), np.linspace(-60, 60, 9),
], ids=str)
def test_equal_logits_are_cut_as_near_as_can_be(logits):
    tried = {}
    for density in (0.9, 0.45, 0.2, 0.01):
        router = Router(logits)
        cut = cut_at(density, router, tried)
        assert router.asked <= 18 and abs(cut) <= FURTHEST
        assert abs(tried[cut] - density) <= abs(bisected(density, Router(logits)) - density), density


def test_a_share_that_rises_once_ends_all_the_same():
    tried = {0.0: 0.6, 1.0: 0.2, 2.0: 0.5}
    cut = cut_at(0.3, lambda cut: float(np.interp(cut, [0, 1, 2], [0.6, 0.2, 0.5])), tried)
    assert abs(tried[cut] - 0.3) <= NEAR


def test_what_is_known_is_not_asked_again():
    assert cut_at(0.3, lambda _: pytest.fail("asked"), {0.5: 0.3, 0.1: 0.6}) == 0.5
    assert cut_at(0.3, lambda _: pytest.fail("asked"), {0.5: 0.1, 0.50001: 0.6, 0.49999: 0.6}) == 0.5


def test_a_flat_curve_foretells_nothing():
    flat, tried = {0.0: 0.6, 1.0: 0.6, 2.0: 0.6}, {}
    router = Router(np.random.default_rng(0).logistic(0, 1, 20_000))
    assert abs(tried[cut_at(0.3, router, tried, like=flat)] - 0.3) <= NEAR
