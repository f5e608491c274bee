"""Least squares on data with known effects, the chosen cells' design, and what is refused."""

import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.research.replication import damage, effects
from l2a_jax.research.replication.effects import Interaction

TRUE = {"topology": {"sequential": 0.7}, "sinks": {"1": 0.1, "0": 0.5}, "rope": {"theta:5": 0.0, "linear:5": 0.9},
        "window": {"1024": 0.2, "256": 0.4}, "leakage": {"0.1": -0.3}}


def answers(cells, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return [2.0 + sum(TRUE[f].get(str(level), 0.0) for f, level in cell.items()) + noise * rng.standard_normal()
            for cell in cells]


def test_the_sixteen_cells_can_tell_every_effect_apart():
    cells = damage.cells()
    assert len({tuple(cell.items()) for cell in cells}) == damage.RUNS == 16 and len(damage.factorial()) == 108
    for terms, columns, worst in (((), 9, 1.1), (damage.INTERACTIONS, 11, 3.0)):
        made = effects.design(cells, damage.FACTORS, terms)
        assert np.linalg.matrix_rank(made.matrix) == columns == made.matrix.shape[1]
        assert max(effects.inflation(made).values()) < worst
    for factor, levels in damage.FACTORS.items():  # as balanced as sixteen can be
        counts = [sum(cell[factor] == level for cell in cells) for level in levels]
        assert min(counts) >= 16 / len(levels) - 1.5, (factor, counts)


def d_optimal(candidates, runs, factors, interactions, seed, starts):
    """Indices of `runs` different candidates whose X'X has the largest determinant found by row exchange (Fedorov,
    1972) from random starts."""
    matrix = effects.design(candidates, factors, interactions).matrix
    rng = np.random.default_rng(seed)
    best, chosen = -np.inf, None
    for _ in range(starts):
        rows = rng.choice(len(candidates), runs, replace=False)
        value = _log_det(matrix[rows])
        improved = True
        while improved:
            improved = False
            for place in range(runs):
                for other in np.setdiff1d(np.arange(len(candidates)), rows):
                    trial = rows.copy()
                    trial[place] = other
                    found = _log_det(matrix[trial])
                    if found > value + 1e-9:
                        rows, value, improved = trial, found, True
        if value > best:
            best, chosen = value, rows
    return sorted(int(row) for row in chosen)


def _log_det(rows):
    sign, value = np.linalg.slogdet(rows.T @ rows)
    return float(value) if sign > 0 else -np.inf


def test_the_cells_are_what_the_search_finds():
    everything = damage.factorial()
    found = d_optimal(everything, damage.RUNS, damage.FACTORS, damage.INTERACTIONS, seed=2, starts=6)
    assert tuple(found) == damage.CHOSEN
    rng = np.random.default_rng(0)

    def value(rows):
        matrix = effects.design([everything[i] for i in rows], damage.FACTORS, damage.INTERACTIONS).matrix
        return np.linalg.det(matrix.T @ matrix)

    assert all(value(rng.choice(108, 16, replace=False)) < value(damage.CHOSEN) for _ in range(200))


def test_known_effects_are_recovered_exactly_without_noise():
    found = effects.fit(damage.cells(), answers(damage.cells()), damage.FACTORS)
    assert found["residual_df"] == 7 and found["coefficients"] == 9 and found["residual_sd"] < 1e-12
    assert found["mean_at_reference"] == pytest.approx(2.0)
    for factor, levels in TRUE.items():
        for level, true in levels.items():
            assert found["terms"][factor]["levels"][level]["difference"] == pytest.approx(true, abs=1e-12)


def test_intervals_cover_as_often_as_they_say():
    """400 noisy experiments: 95 % intervals of one coefficient of every factor."""
    cells = damage.cells()
    inside = total = 0
    for seed in range(400):
        found = effects.fit(cells, answers(cells, 0.2, seed), damage.FACTORS)
        for factor, levels in TRUE.items():
            for level, true in levels.items():
                low, high = found["terms"][factor]["levels"][level]["interval"]
                inside, total = inside + (low <= true <= high), total + 1
    assert abs(inside / total - 0.95) < 0.015


def test_pairs_differ_in_one_factor_and_need_no_model():
    cells = [*damage.cells(), *damage.follow_up()]
    written = [{factor: str(level) for factor, level in cell.items()} for cell in cells]
    values = answers(cells)
    values = [value + 5.0 * (cell["sinks"] == 0 and cell["window"] == 256)
              for cell, value in zip(cells, values, strict=True)]
    found = damage.pairs([*written, written[0]], [*values, values[0] + 2.0])  # a repeat is averaged: + 1
    sequential = [one["difference"] for one in found["topology"]["sequential"]]
    assert len(sequential) >= 11 and sequential[0] == pytest.approx(0.7 - 1.0)
    assert sequential[1:] == pytest.approx([0.7] * len(sequential[1:]))
    small = found["window"]["256"]
    assert small[0]["difference"] == pytest.approx(0.4) and small[-1]["difference"] == pytest.approx(5.4)
    assert small[-1]["where"]["sinks"] == "0" and set(small[-1]["where"]) == set(damage.FACTORS) - {"window"}


def test_against_numpy_by_hand():
    """A two-level factor in a one-way layout is the two-sample t test, worked out here."""
    cells = [{"a": level} for level in (0, 0, 0, 1, 1, 1, 1)]
    y = np.array([1.0, 2.0, 4.0, 3.0, 5.0, 6.0, 8.0])
    found = effects.fit(cells, y, {"a": (0, 1)})["terms"]["a"]
    first, second = y[:3], y[3:]
    pooled = (np.square(first - first.mean()).sum() + np.square(second - second.mean()).sum()) / 5
    error = np.sqrt(pooled * (1 / 3 + 1 / 4))
    level = found["levels"]["1"]
    assert level["difference"] == pytest.approx(second.mean() - first.mean())
    assert level["error"] == pytest.approx(error)
    assert level["interval"][1] == pytest.approx(level["difference"] + 2.570581835636314 * error)  # t(0.975, 5)
    assert found["F"] == pytest.approx((level["difference"] / error) ** 2)


def test_repeats_give_pure_error_and_lack_of_fit():
    cells = [*damage.cells(), *(damage.cells()[i] for i in damage.REPLICATED)]
    y = np.array(answers(cells))
    y[-2:] += (0.1, -0.3)
    levels = [{factor: str(level) for factor, level in cell.items()} for cell in cells]
    found = damage.analyse(levels, y)
    pure = found["main_effects"]["pure_error"]
    assert (found["main_effects"]["residual_df"], pure["df"], pure["lack_of_fit_df"]) == (9, 2, 7)
    assert pure["sd"] == pytest.approx(np.sqrt((0.1**2 + 0.3**2) / 2 / 2))
    assert found["with_interactions"]["residual_df"] == 7


def test_an_interaction_is_found_where_main_effects_miss_it():
    cells = damage.cells()
    y = np.array(answers(cells)) + [3.0 * (c["sinks"] == 0 and c["window"] == 256) for c in cells]
    found = effects.fit(cells, y, damage.FACTORS, damage.INTERACTIONS)
    term = found["terms"]["no sink and a window of 256"]["levels"]["True"]
    assert term["difference"] == pytest.approx(3.0) and found["residual_sd"] < 1e-10
    assert effects.fit(cells, y, damage.FACTORS)["residual_sd"] > 0.3


def test_what_cannot_be_told_is_refused():
    two = {"a": (0, 1), "b": (0, 1)}
    same = [{"a": i, "b": i} for i in (0, 1, 0, 1, 1)]
    with pytest.raises(UserError, match="cannot be told apart"):
        effects.fit(same, range(5), two)
    assert np.isinf(effects.inflation(effects.design(same, two))["a"])
    with pytest.raises(UserError, match="no degree of freedom"):
        effects.fit([{"a": 0}, {"a": 1}], [1.0, 2.0], {"a": (0, 1)})
    with pytest.raises(UserError, match="cell 1 has a response"):
        effects.fit([{"a": 0}, {"a": 1}, {"a": 1}], [1.0, np.nan, 2.0], {"a": (0, 1)})
    with pytest.raises(UserError, match="expected one of 0, 1"):
        effects.design([{"a": 2}], {"a": (0, 1)}, (Interaction("x", {"a": 2}),))
    assert damage.empirical_logit(0, 10) == -damage.empirical_logit(10, 10) == pytest.approx(np.log(0.5 / 10.5))
