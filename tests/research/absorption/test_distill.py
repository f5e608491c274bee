"""Distilled gates: the KL by hand, where its gradient goes, and that distillation finds the oracle's keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from l2a_jax.research.absorption import distill, scoring
from l2a_jax.research.absorption.definitions import DENSE
from l2a_jax.research.absorption.masks import f1
from tests.research.absorption import cases


def test_kl_by_hand():
    s, g = jax.random.normal(jax.random.key(0), (2, 3, 4, 4))
    total = 0.0
    for row in range(3):
        for query in range(4):
            p, q = (np.exp(np.asarray(x[row, query, : query + 1], np.float64)) for x in (s, g))
            p, q = p / p.sum(), q / q.sum()
            total += (p * np.log(p / q)).sum()
    np.testing.assert_allclose(distill.kl(s, g), total / 12, rtol=1e-5)


def test_distillation_raises_f1_and_lowers_the_kl():
    seeds = np.array([1, 2], np.uint32)
    members = [cases.params(seed) for seed in (1, 2)]
    # Larger queries: attention that has a choice to copy.
    params = jax.tree.map(lambda *x: jnp.stack(x), *members)
    params["layers"]["attention"]["q"]["kernel"] *= 2
    stream = np.random.default_rng(0).integers(0, cases.CONFIG.vocab_size, 2_000).astype(np.uint16)
    rng = np.random.default_rng(1)
    windows = rng.integers(0, 1_900, (cases.RECIPE.distill_steps * 4, 2, 4)).astype(np.int32)
    fresh = distill.fresh_selector(seeds, config=cases.CONFIG)
    start = jax.tree.map(np.asarray, fresh)
    selector, _, values = distill.distill_chunk(
        fresh, distill.initial_adam(fresh), params, stream, windows, cases.numbers(), DENSE.indexed(), seeds,
        jnp.asarray(0), config=cases.CONFIG, recipe=cases.RECIPE)
    assert values[-5:].mean() < 0.6 * values[:5].mean()

    def score(selector):
        found = scoring.layer_statistics(
            scoring.with_selector(params, selector), stream, windows[:2, 0], cases.numbers(), DENSE.indexed(),
            np.array([3], np.int32), config=cases.CONFIG, dtype="float32", length=16)
        return f1(np.asarray(found["agreement"])[:, :, 0, 3:6].sum(axis=1))

    assert (score(selector) > score(start) + 0.1).all()


def test_statistics_by_hand():
    """Top-k mass and the oracle's F1 with itself, from one layer's matrices."""
    params = jax.tree.map(np.asarray, cases.params())
    stacked = jax.tree.map(lambda x: x[None], params)
    # As many members, batches and ids as above: no further program.
    stacked = jax.tree.map(lambda x: np.concatenate([x, x]), stacked)
    tokens = np.resize(np.asarray(cases.tokens(rows=4)), 2_000).astype(np.uint16)
    starts = np.tile(np.arange(4, dtype=np.int32) * 16, (2, 1))
    found = scoring.layer_statistics(
        scoring.with_selector(stacked), tokens, starts, cases.numbers(), DENSE.indexed(), np.array([3], np.int32),
        config=cases.CONFIG, dtype="float32", length=16)
    x = params["embed"]["embedding"][tokens[:64].reshape(4, 16)] + params["embed"]["positions"]
    norm = jax.tree.map(lambda leaf: leaf[0], params["layers"]["norm_attention"])
    h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
    mass, gate = [], []
    for b in range(4):
        for head in range(2):
            q, k = (h[b] @ params["layers"]["attention"][n]["kernel"][0][:, 8 * head : 8 * head + 8] for n in "qk")
            gq, gk = (h[b] @ params["layers"]["gate"][n]["kernel"][0][:, 4 * head : 4 * head + 4] for n in "qk")
            for query in range(16):
                gate += list(1 / (1 + np.exp(-np.asarray(gk[: query + 1] @ gq[query]) / 2)))
                if query >= 3:
                    e = np.exp(np.asarray(k[: query + 1] @ q[query]) / np.sqrt(8))
                    mass.append(np.sort(e)[-3:].sum() / e.sum())
    np.testing.assert_allclose(found["mass"][0, 0, 0], np.mean(mass), rtol=1e-4)
    np.testing.assert_allclose(found["gate_mean"][0, 0], np.mean(gate), rtol=1e-4)
    np.testing.assert_allclose(found["gate_sd"][0, 0], np.std(gate), rtol=1e-3)
