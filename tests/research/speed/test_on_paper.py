"""A step on paper: the page's table is what the arithmetic gives, and the arithmetic is right where it can be checked.

`PYTHONPATH=. python tests/research/speed/test_on_paper.py` writes the table anew.
"""

from __future__ import annotations

import pathlib
import re

import pytest

from l2a_jax.config import MODELS, L2AConfig
from l2a_jax.models.params import abstract_params
from l2a_jax.research.speed.on_paper import CASES, LAYER, MODEL, SEQ_LEN, Case, operations, plan, table
from l2a_jax.sharding.axes import Axes
from l2a_jax.training.regimes import count_parameters, regime_mask

PAGE = pathlib.Path(__file__).resolve().parents[3] / "l2a_jax/SCALE.md"
TABLE = re.compile(r"(<!-- table: on_paper -->\n)(.*?)(<!-- end of table -->)", re.S)
CONFIG = MODELS[MODEL]


def with_table(text):
    return TABLE.sub(lambda match: f"{match[1]}\n{table()}\n\n{match[3]}", text)


def test_the_page_has_the_table_that_is_computed():
    text = PAGE.read_text()
    assert TABLE.search(text) and with_table(text) == text, "run this file: see its head"
    assert len(text.splitlines()) <= 120


def planned(axes, regime="full_ft", rows=1, **case):
    return plan(Case("", regime, axes, rows, **case), CONFIG, LAYER, seq_len=SEQ_LEN)


def test_operations_of_a_model_that_is_trained_in_full_are_eight_a_weight():
    """Six, and two for computing anew; of the output matrix six."""
    whole = abstract_params(CONFIG, L2AConfig())
    products, attention = operations(CONFIG, LAYER, regime_mask(whole, "full_ft"), seq_len=SEQ_LEN, routed=1.0)
    head = CONFIG.vocab_size * CONFIG.hidden_size
    assert products == pytest.approx(8 * (count_parameters(whole) - 2 * head) + 6 * head, rel=1e-3)
    strict, same = operations(CONFIG, LAYER, regime_mask(whole, "router_strict"), seq_len=SEQ_LEN, routed=1.0)
    assert strict == pytest.approx(products * 0.75, rel=0.01) and same == attention
    assert attention == 4 * 28 * 128 * 28 * (1_028 + SEQ_LEN / 2) * 4.5


def test_what_moves_is_all_but_what_a_device_has():
    one, eight = planned(Axes(1, 1)), planned(Axes(1, 8))
    assert one.moved == (0, 0, 0, 0)
    weights = 2 * count_parameters(abstract_params(CONFIG, LAYER))
    ends = 2 * 2 * CONFIG.vocab_size * CONFIG.hidden_size  # come once: the layers' are not kept for the backward pass
    assert eight.moved.weights == pytest.approx((2 * weights - ends) * 7 / 8, rel=1e-3)
    assert eight.moved.gradients == pytest.approx(2 * weights * 7 / 8, rel=1e-3)  # summed in float32
    # 235 MB a layer and direction.
    assert eight.moved.keys == pytest.approx(3 * 28 * 234_881_024, rel=1e-6) and eight.moved.copies == 0
    assert eight.seconds.products == one.seconds.products / 8


def test_what_no_dimension_divides_is_on_every_card():
    spread, grouped = planned(Axes(128, 8), rows=128), planned(Axes(128, 8), rows=128, shards=8)
    assert spread.whole > 80e9 and grouped.whole < 1e6
    assert grouped.held == planned(Axes(1, 8)).held and grouped.moved.copies > 0


def test_what_the_page_says_of_its_table():
    plans = [plan(case, CONFIG, LAYER, seq_len=SEQ_LEN) for case in CASES]
    assert [found.held.total < 80e9 for found in plans] == [True, True, False, True, True]
    for found, received in zip(plans, (47, 71), strict=False):
        assert round(sum(found.moved) / 1e9) == received and sum(found.moved[:2]) > received * 1e9 / 2
        assert sum(found.seconds[2:]) < found.seconds.products / 10
    dense, kept = (plan(CASES[1], CONFIG, LAYER, seq_len=SEQ_LEN, **given)
                   for given in ({"routed": 1.0}, {"remat": "mlp"}))
    assert 4.5 < dense.seconds.attention / plans[1].seconds.attention < 5
    assert dense.seconds.attention > dense.seconds.products and kept.held.total < 80e9
    assert 0.45 < sum(plans[3].seconds[2:]) / plans[3].seconds.least < 0.5


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
