"""The autopsy: the faulty attention is faulty, each fault gives its symptoms, and every rule holds on its own side."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.attention.reference import masked_attention
from l2a_jax.config import L2AConfig
from l2a_jax.data.batch import Batch
from l2a_jax.data.recall import RecallCorpus
from l2a_jax.files import plain as as_json
from l2a_jax.research.replication import faulty
from l2a_jax.research.replication.autopsy import Examination, autopsy, format_autopsy, symptoms, task_margin
from l2a_jax.training.optimizer import Dials, OptimizerConfig
from l2a_jax.training.step import Objective
from tests.models.cases import CONFIG, LAYERS, hidden, make_params, make_tokens, packed

LAYER = L2AConfig(window=12, sinks=0, topology="sequential", share_attention=False, leakage=0.1)
STEPS = 24


def test_the_faulty_attention_is_the_band_on_both_sides():
    key = jax.random.key(0)
    q, k, v = (jax.random.normal(jax.random.fold_in(key, i), (2, 24, heads, 8)) for i, heads in enumerate((6, 2, 2)))
    ids = np.asarray(packed())
    index = np.arange(24)
    near = np.abs(index[:, None] - index[None, :]) < 5
    sink = np.zeros((2, 24, 24), bool)
    for row in range(2):
        for i in range(24):
            start = np.flatnonzero(ids[row] == ids[row, i])[0]
            sink[row, i, start] = start <= i
    mask = (near | sink) & (ids[:, :, None] == ids[:, None, :])
    leaky = faulty.LeakyAttention(L2AConfig(window=5, sinks=1), jnp.asarray(ids), "auto", True)
    found, expected = jax.jit(lambda: (leaky.local(q, k, v), masked_attention(q, k, v, jnp.asarray(mask))))()
    np.testing.assert_allclose(np.asarray(found)[ids != 0], np.asarray(expected)[ids != 0], atol=1e-5)


def test_nothing_but_the_window_is_wrong_with_the_faulty_model():
    """Without the fault it must be the library's own model; with it, tokens know of later ones."""
    layer, tokens = LAYERS["sequential"], make_tokens()
    batch, params = Batch(tokens, tokens, jnp.ones(tokens.shape), packed(), None), make_params(layer)
    run = jax.jit(lambda tokens, symmetric: faulty.leaky_hidden_states(
        params, batch._replace(tokens=tokens), jax.random.key(0), symmetric, objective=Objective(CONFIG, layer)))
    own, routed = hidden(params, tokens, CONFIG, layer, segment_ids=packed(), key=jax.random.key(0), train=True)
    found, decided = run(tokens, False)
    real = np.asarray(batch.segment_ids != 0)
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(own)[real], atol=1e-4)
    np.testing.assert_array_equal(decided.decisions, routed.decisions)
    other = tokens.at[:, 18:].set((tokens[:, 18:] + 1) % CONFIG.vocab_size)  # inside row 1's last document, from 15 on
    for symmetric, knows in ((False, False), (True, True)):
        change = np.abs(run(other, symmetric)[0] - run(tokens, symmetric)[0])[:, :18].max()
        assert (change > 1e-2) == knows and (knows or change < 1e-5)


@pytest.fixture(scope="module")
def rows(plain, windows):
    dials = Dials(1e-2, 5e-3, STEPS, 3, penalty=0.01, penalty_warmup=3, penalty_ramp=STEPS // 2)
    asked = Examination(windows, [row[:24].tolist() for row in windows.tokens[:2]], new_tokens=32,
                        extra=lambda model: {"needle": 0.0, "task_margin": 0.1})
    report = autopsy(plain, RecallCorpus(128, 4), asked, objective=Objective(plain.config, LAYER), dials=dials,
                     optimizer=OptimizerConfig("l2a_ft"))
    json.dumps(as_json(report), allow_nan=False)
    assert "NaN router" in format_autopsy(report)
    return {row["fault"]: row for row in report["rows"]}


def test_a_sound_run_shows_none_of_it(rows):
    row = rows["none"]
    assert row["finite_losses"] == 1 and row["weights_not_finite"] == 0 and 0.3 < row["logged_loss"] < 2
    assert not any(row["symptoms"][name] for name in ("zero training loss", "100 % sparsity"))
    assert rows["plain model"]["perplexity_ratio"] == 1 and rows["untrained"]["sparsity"] == 0


def test_nan_weights_give_loss_zero_full_sparsity_and_one_repeated_token(rows):
    row = rows["NaN weights"]
    assert row["symptoms"] | {"tasks above chance": None, "needle lost": None} == {
        "zero training loss": True, "100 % sparsity": True, "text loops": True, "finite, bad perplexity": False,
        "tasks above chance": None, "needle lost": None}
    assert row["logged_loss"] == 0 and row["logged_sparsity"] == 1 and math.isnan(row["perplexity"])
    assert row["generation"]["greedy"]["distinct_1"] == pytest.approx(1 / 32) and row["verdict"] == "non-finite"
    assert row["finite_losses"] == pytest.approx((STEPS // 2 + 1) / STEPS)  # the poisoned step's own loss still is
    before = rows["NaN weights, evaluated before"]
    assert before["weights_not_finite"] == 0 and before["perplexity"] < 6 and before["logged_loss"] == 0
    assert before["symptoms"]["zero training loss"] and before["symptoms"]["tasks above chance"]


def test_a_nan_router_leaves_a_finite_local_model(rows, plain):
    """Loss zero and sparsity 100 % beside a finite perplexity: a decision is `z >= 0`, which is False for NaN."""
    row = rows["NaN router"]
    assert row["logged_loss"] == 0 and row["logged_sparsity"] == 1 and row["sparsity"] == 1
    assert row["weights_not_finite"] == plain.config.num_layers * plain.config.hidden_size  # the router alone
    assert row["perplexity"] > rows["NaN router, evaluated before"]["perplexity"] and math.isfinite(row["perplexity"])


def test_a_leak_trains_below_what_the_text_allows(rows):
    leak, sound = rows["leak"], rows["none"]
    assert leak["logged_loss"] < 0.75 * sound["logged_loss"] and leak["perplexity"] > 1.1 * sound["perplexity"]
    assert math.log(leak["perplexity"]) > leak["logged_loss"] + 0.5 and leak["future_seen"] < 1e-5


def test_an_overgrown_penalty_closes_every_router(rows):
    assert rows["penalty"]["symptoms"]["100 % sparsity"] and not rows["penalty"]["symptoms"]["zero training loss"]
    assert rows["penalty"]["finite_losses"] == 1


def test_pure_bfloat16_loses_updates_and_nothing_becomes_nan(rows):
    row = rows["bfloat16"]
    assert row["finite_losses"] == 1 and row["updates_lost"] > 0.2 and row["logged_loss"] < row["loss_curve"][0]
    assert not any(row["symptoms"][name] for name in ("zero training loss", "100 % sparsity"))


def test_too_large_a_learning_rate_diverges_and_stays_finite(rows):
    row = rows["learning rate"]
    assert row["finite_losses"] == 1 and row["weights_not_finite"] == 0 and row["updates_lost"] < 0.01
    assert row["logged_loss"] > row["loss_curve"][0] and row["perplexity"] > 2 * rows["untrained"]["perplexity"]


def test_every_symptom_on_both_sides_of_its_threshold():
    healthy = {"logged_loss": 1.0, "logged_sparsity": 0.9, "greedy_ends_in_loop": 0.5, "perplexity_ratio": 1.9,
               "task_margin": -0.01, "needle": 0.5}
    reported = {"logged_loss": 0.0, "logged_sparsity": 1.0, "greedy_ends_in_loop": 0.6, "task_margin": 0.01,
                "perplexity_ratio": 39.21 / 11.52, "needle": 0.0}
    assert not any(symptoms(healthy).values()) and all(symptoms(reported).values())
    assert symptoms({**reported, "perplexity_ratio": 6.1})["finite, bad perplexity"] is False
    assert symptoms({**reported, "perplexity_ratio": math.nan})["finite, bad perplexity"] is False
    assert symptoms({**reported, "task_margin": None})["tasks above chance"] is None
    assert symptoms({})["text loops"] is None
    for low, high in ((60.83, 11.52), (39.21, 11.52), (21.21, 8.47)):  # the study's own collapsed rows
        assert symptoms({"perplexity_ratio": low / high})["finite, bad perplexity"]


def test_task_margin():
    scores = {"hellaswag": (0.368, 0.0215), "piqa": (0.674, 0.021), "arc_challenge": (0.236, 0.019)}
    assert task_margin(scores) == pytest.approx(0.368 - 0.25 - 0.043)
    assert task_margin({"piqa": (0.6, 0.02)}) is None
