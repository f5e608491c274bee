"""The transformer against loops in numpy, its parameter counts, and causality of every mode."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.research.absorption import small_model
from l2a_jax.research.absorption.definitions import CONVENTIONS, DENSE, HARD, SCORES, SELECT, SOFT, SOFT_GATE, Attention
from l2a_jax.research.absorption.definitions import TransformerConfig as Config
from l2a_jax.research.absorption.scoring import with_selector
from tests.research.absorption import cases


def test_parameter_counts_are_the_papers():
    counts = small_model.count_parameters(Config())
    assert (counts["embedding"], counts["backbone"], counts["gates"]) == (12_865_792, 4_864_000, 393_216)
    assert counts["tied"] == 18_123_008  # as the replication logs it
    assert counts["untied"] - counts["gates"] == 30_595_584  # the "31M"
    for tied in (True, False):
        config = Config(tied=tied)
        sizes = jax.tree.leaves(jax.eval_shape(lambda key, c=config: small_model.init_params(c, key),
                                               jax.random.key(0)))
        assert sum(leaf.size for leaf in sizes) == counts["tied" if tied else "untied"]


def literal_forward(params, tokens, soft):
    """One row at a time, one head at a time, float64."""
    c = cases.CONFIG
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, n):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * n["scale"] + n["bias"]

    erf = np.vectorize(math.erf)
    out = []
    for row in np.asarray(tokens):
        x = p["embed"]["embedding"][row] + p["embed"]["positions"][: row.size]
        for layer in range(c.layers):
            q = jax.tree.map(lambda a, layer=layer: a[layer], p["layers"])
            h = norm(x, q["norm_attention"])
            heads = []
            for head in range(c.heads):
                mine, gate = (slice(head * w, (head + 1) * w) for w in (c.head_width, c.gate_width))
                project = lambda name, h=h, q=q, mine=mine: h @ q["attention"][name]["kernel"][:, mine]  # noqa: E731
                s = project("q") @ project("k").T / np.sqrt(c.head_width)
                g = (h @ q["gate"]["q"]["kernel"][:, gate]) @ (h @ q["gate"]["k"]["kernel"][:, gate]).T \
                    / np.sqrt(c.gate_width)
                if soft:
                    s = s / (1 + np.exp(-g))
                s = np.where(np.tril(np.ones_like(s)) > 0, s, -np.inf)
                w = np.exp(s - s.max(-1, keepdims=True))
                heads.append(w / w.sum(-1, keepdims=True) @ project("v"))
            x = x + np.concatenate(heads, -1) @ q["attention"]["o"]["kernel"]
            h = norm(x, q["norm_mlp"]) @ q["mlp"]["up"]["kernel"] + q["mlp"]["up"]["bias"]
            x = x + (h * 0.5 * (1 + erf(h / np.sqrt(2)))) @ q["mlp"]["down"]["kernel"] + q["mlp"]["down"]["bias"]
        out.append(norm(x, p["norm_final"]))
    return np.stack(out)


@pytest.mark.parametrize("attention", (DENSE, SOFT_GATE), ids=("dense", "soft"))
def test_forward_by_loops(attention):
    params, tokens = cases.params(), cases.tokens(rows=4)
    hidden = run(with_selector(params), tokens, attention.indexed())
    np.testing.assert_allclose(hidden, literal_forward(params, tokens, attention is SOFT_GATE), rtol=2e-4, atol=2e-5)


@functools.partial(jax.jit, static_argnames="static")
def _run(params, tokens, attention, gated, static):
    return small_model.hidden_states(params, tokens, cases.CONFIG, static or attention, cases.numbers(gated=gated > 0),
                                     key=jax.random.key(1))[0]


def run(params, tokens, attention, static=None, gated=np.ones(2, int)):  # noqa: B008 (never written to)
    return _run(params, tokens, attention, gated, static)


def two_futures():
    """Rows that agree up to position 9, and differ in every later token."""
    first = cases.tokens(5, rows=4)
    return first, first.at[:, 10:].set((first[:, 10:] + 7) % cases.CONFIG.vocab_size)


def test_every_evaluated_mode_is_causal_but_a_gate_chosen_before_the_mask():
    """The published order lets future keys push past ones out of the top k: which keys are kept tells of the future."""
    params = with_selector(cases.params(), cases.params(3)["layers"]["gate"])
    first, second = two_futures()
    leaky = []
    for soft, select, convention, scores in itertools.product(SOFT, SELECT, CONVENTIONS, SCORES):
        attention = Attention(soft, select, convention, scores)
        a, b = (run(params, tokens, attention.indexed()) for tokens in (first, second))
        same = np.allclose(a[:, :10], b[:, :10], atol=1e-6)
        assert not np.allclose(a[:, 10:], b[:, 10:], atol=1e-3)
        if not same:
            leaky.append(attention)
    assert leaky, "the published order should have leaked somewhere"
    assert all(a.convention == "before" and a.select in ("gate", "selector", "oracle", "used") for a in leaky)


@pytest.mark.parametrize("attention", (HARD._replace(straight_through=True),
                                       Attention("multiplicative", "gate", hard_rows=0.5)), ids=("ste", "closed"))
def test_training_modes_are_causal(attention):
    a, b = (run(cases.params(), tokens, None, static=attention) for tokens in two_futures())
    np.testing.assert_allclose(a[:, :10], b[:, :10], atol=1e-6)


def test_named_and_indexed_choices_agree():
    params, tokens = with_selector(cases.params()), cases.tokens(rows=4)
    for attention in (SOFT_GATE, Attention("additive", "used", "before", "shuffled")):
        np.testing.assert_allclose(run(params, tokens, None, static=attention),
                                   run(params, tokens, attention.indexed()), rtol=1e-5, atol=1e-5)


def test_closed_loop_rows_are_hard_or_soft():
    params, tokens = cases.params(), cases.tokens(rows=4)
    mixed = run(params, tokens, None, static=Attention("multiplicative", "gate", hard_rows=0.5))
    hard, soft = (run(with_selector(params), tokens, attention.indexed()) for attention in (HARD, SOFT_GATE))
    np.testing.assert_allclose(mixed[:2], hard[:2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mixed[2:], soft[2:], rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_not_gated_is_dense():
    params, tokens = cases.params(), cases.tokens(rows=4)
    params = with_selector(params)
    none, one = (run(params, tokens, HARD.indexed(), gated=np.array(gated)) for gated in ([0, 0], [1, 0]))
    dense = run(params, tokens, DENSE.indexed())
    np.testing.assert_allclose(none, dense, rtol=1e-5, atol=1e-5)
    assert not np.allclose(one, dense, atol=1e-3)


def test_experts_by_loops():
    config = Config(vocab_size=19, layers=1, width=16, heads=2, hidden=24, positions=16, dropout=0.0, experts=3)
    layer = jax.tree.map(lambda x: np.asarray(x)[0], cases.params(2, config)["layers"])
    x, tokens = jax.random.normal(jax.random.key(4), (2, 5, 16)), cases.tokens(length=5, rows=2)
    up, down = layer["mlp"]["up"], layer["mlp"]["down"]
    for hashed in (False, True):
        numbers = cases.numbers(config=config)._replace(hashed=jnp.asarray(hashed))
        run = jax.jit(lambda n, layer: small_model.feed_forward(x, layer, tokens, config, n, 0.0, None))
        out, aux = run(numbers, layer)
        load = np.zeros(3)
        for b, t in np.ndindex(2, 5):
            row = np.asarray(x[b, t], np.float64)
            p = np.exp(row @ layer["router"]["kernel"])
            p = p / p.sum()
            e = (int(tokens[b, t]) * 2_654_435_761 % 2**32 >> 16) % 3 if hashed else int(p.argmax())
            load[e] += 0.1
            mine = slice(8 * e, 8 * e + 8)
            h = row @ up["kernel"][:, mine] + up["bias"][mine]
            h = h * 0.5 * (1 + np.vectorize(math.erf)(h / np.sqrt(2)))
            want = (1.0 if hashed else p[e]) * h @ down["kernel"][mine] + down["bias"]
            np.testing.assert_allclose(out[b, t], want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(aux["load"], load, atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("gated", (False, True))
def test_the_same_model_in_pytorch_computes_the_same_logits(gated):
    import torch

    from tests.research.absorption import torch_model

    params, tokens = cases.params(), cases.tokens()
    module = torch_model.make_model(cases.CONFIG, gated)
    torch_model.copy_params(module, params)
    hidden, _ = small_model.hidden_states(params, tokens, cases.CONFIG, SOFT_GATE if gated else DENSE, cases.numbers())
    with torch.no_grad():
        theirs = module(torch.from_numpy(np.array(tokens)).long()).numpy()
    np.testing.assert_allclose(hidden @ small_model.head_kernel(params).T, theirs, rtol=1e-3, atol=1e-4)
