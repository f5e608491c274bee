"""Training, reading and generation over several GPUs: the numbers of one GPU.

The bounds are ten times those of made-up devices: a GPU sums in the order in which its blocks finish.
"""

from __future__ import annotations

import jax
import pytest

from tests.sharding.steps import CASES

MEASURED = "tests.sharding.gpus"
BOUND = 1e-5

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(len(jax.devices()) < 2, reason="needs several GPUs")]


def test_attention_over_gpus_is_that_of_one(found):
    told = found["attention"]
    for packing in told["operations"].values():
        assert max(packing["apart"].values()) < BOUND, packing["apart"]
    assert max(told["layers"].values()) < BOUND
    assert max(told["prompts"][name] for name in ("logits", "full", "ring")) < BOUND and told["prompts"]["same"]


@pytest.mark.parametrize("name", CASES)
def test_gpus_train_what_one_trains(found, name):
    for axes in found["meshes"]:
        told = found["training"][name][axes]
        assert told["told"] < BOUND and told["gradient"] < BOUND, axes
        assert max(told["gradients"].values()) < 4 * BOUND, (axes, told["gradients"])
        assert max(told["parameters"].values()) < BOUND, (axes, told["parameters"])


def test_what_gpus_read_and_say_is_what_one_does(found):
    for told in found["evaluation"].values():
        assert max(told["windows"][name] for name in ("nll", "entropy", "picked")) < BOUND
        assert max(told[of]["log-probabilities"] for of in ("requests", "texts")) < BOUND
        assert all(part["same"] for part in told.values())
