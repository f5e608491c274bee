"""Prunable layers: the numbers are those of the pruning task, on a router whose closed layers are known."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation import perplexity, pruning_cost
from l2a_jax.inference.cache import cache_bytes
from l2a_jax.inference.pruning import pruned
from l2a_jax.research.replication.prunable import format_prunable, prunable


@pytest.fixture(scope="module")
def model(with_layer):
    """Layer 0 routes everything; layers 1 and 2 route by a random direction with a threshold that few tokens pass."""
    base = with_layer()
    router = np.random.default_rng(0).normal(size=(3, base.config.hidden_size)).astype(np.float32) * 0.05
    router[0] = 0
    return base._replace(params={**base.params, "layers": {**base.params["layers"],
                                                           "router": {"kernel": jnp.asarray(router)}}})


def test_the_report(model, windows, monkeypatch):
    monkeypatch.setattr("l2a_jax.research.replication.prunable.CACHE_TOKENS", 1_024)
    perplexity.score_windows(model, windows)
    programs = perplexity._score._cache_size()
    report = prunable(model, windows, windows, thresholds=(0.1, 0.999))
    sparsity = [row["sparsity"] for row in report["layers"]]
    assert sparsity[0] == 0 and "cost" not in report["layers"][0] and all(0.1 < value < 0.999 for value in sparsity[1:])
    first = max((1, 2), key=lambda layer: sparsity[layer])
    rows = report["cumulative"]
    assert [row["pruned"] for row in rows] == [[], [first], [1, 2]] and rows[0]["cost"] == 0
    assert report["layers"][first]["cost"] == rows[1]["cost"]
    # The pruning task of eval/run.py, on the same set.
    own = pruning_cost.report(model, pruned(model, [1, 2]), windows)
    assert rows[2]["cost"] == pytest.approx(own["cost"], abs=1e-9)
    assert rows[2]["perplexity"] == pytest.approx(own["perplexity_after"])
    assert rows[2]["cache_bytes"] == own["cache_bytes_after"] == cache_bytes(
        model.config, pruned(model, [1, 2]).l2a_config, 1, 1_024, jnp.float32)
    assert rows[0]["cache_bytes"] == own["cache_bytes_before"] > rows[1]["cache_bytes"] > rows[2]["cache_bytes"]
    low, high = report["thresholds"]
    assert low["pruned"] == [1, 2] and low["cost"] == rows[2]["cost"]
    assert high["pruned"] == [] and high["cost"] == 0
    assert "> 0.999: 0" in format_prunable(report)
    assert perplexity._score._cache_size() == programs, "a choice of layers compiles nothing"


def test_what_cannot_be_pruned(plain, model, windows):
    with pytest.raises(UserError, match="plain model"):
        prunable(plain, windows, windows)
    with pytest.raises(UserError, match="expected a share"):
        prunable(model, windows, windows, thresholds=(1.5,))
    with pytest.raises(UserError, match="at least one threshold"):
        prunable(model, windows, windows, thresholds=())
    beyond = model._replace(l2a_config=dataclasses.replace(model.l2a_config, pruned_layers=(30,)))
    with pytest.raises(ValueError, match="do not exist"):
        perplexity.score_windows(beyond, windows)
