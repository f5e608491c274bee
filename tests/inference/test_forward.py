"""The parts of generation by themselves: the prefill's logits, what the compiled loop copies, sampling, the ring."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.inference import generate as module
from l2a_jax.inference.cache import layout_of, ring_of, ring_reads, ring_slot
from l2a_jax.inference.forward import decode_params, decode_step, prefill
from l2a_jax.inference.sampling import nucleus, sample
from l2a_jax.models.transformer import probe_layers
from tests import compiler
from tests.inference.cases import QUICK, whole
from tests.models.cases import CONFIG, LAYERS, make_params, make_tokens


def test_prefill_logits_and_decisions_are_the_forward_passs():
    layer = LAYERS["parallel post_local"]
    params, tokens = make_params(layer), make_tokens(2, 48)
    lengths = jnp.array([48, 31], jnp.int32)
    run = jax.jit(functools.partial(prefill, config=CONFIG, l2a_config=layer, layout=layout_of(CONFIG, layer, 60),
                                    backend="reference"), compiler_options=QUICK)
    logits, cache, decisions = run(params, tokens, lengths)
    sequences = [row[:length].tolist() for row, length in zip(np.asarray(tokens), (48, 31), strict=True)]
    scores, routed = whole(params, sequences, layer)
    for row, length in enumerate((48, 31)):
        np.testing.assert_allclose(jax.nn.log_softmax(logits[row]), scores[row, length - 1], atol=2e-5)
        np.testing.assert_array_equal(decisions[:, row, :length], routed.decisions[:, row, :length])
        assert not np.asarray(decisions[:, row, length:]).any()  # padding is never routed
    assert cache.full.k.shape == (3, 2, 60, 2, 8) and cache.ring.k.shape == (3, 2, 6, 2, 8)


def test_no_step_copies_the_cache():
    """In the compiled loops, over layers and over tokens, caches are written in place: nothing of their size is
    copied or transposed there."""
    layer = dataclasses.replace(LAYERS["parallel"], pruned_layers=(1,), window=30)
    tokens, lengths, options, settings = module.request(CONFIG, layer, [[1] * 90, [2] * 70], max_new_tokens=16)
    lowered = jax.jit(module._generate.__wrapped__, static_argnames=("options", "room")).lower(
        make_params(layer), tokens, lengths, settings, options, 16)
    text = lowered.compile({**(QUICK or {}), **compiler.AS_USERS}).as_text()
    loops, entry = text[: text.index("\nENTRY")], text[text.index("\nENTRY") :]
    assert entry.count(" while(") == 2
    layout = options.layout
    for layers, slots in ((layout.full_layers, layout.slots), (layout.ring_layers, layout.ring_slots)):
        shape = re.escape(f"f32[{layers},2,{slots},2,8]") + r"\S* "
        assert re.search(shape + r"scatter\(", loops), "the cache is not written in the loop"
        assert not re.search(shape + r"(?:copy|copy-start|transpose)\(", loops), shape


def test_the_ring_holds_the_sinks_and_the_last_window():
    window, sinks, slots = 5, 2, 7
    rows = jnp.asarray(np.broadcast_to(np.arange(40, dtype=np.float32)[None, :, None, None], (3, 40, 1, 1)))
    lengths = jnp.array([4, 7, 33], jnp.int32)
    held, reads = jax.jit(lambda rows, lengths: (
        ring_of(rows, lengths, window, sinks, slots)[:, :, 0, 0],
        ring_reads(lengths, lengths > 0, window, sinks, slots)))(rows, lengths)
    held = np.asarray(held)
    for row, length in enumerate(lengths.tolist()):
        seen = {int(held[row, s]) for s in range(reads.end[row]) if s != int(reads.slot[row]) or s >= length}
        want = {p for p in range(length) if p < sinks or p > length - window}
        assert seen == want, (length, seen, want)
        assert int(ring_slot(lengths[row], window, sinks)) == int(reads.slot[row])


def test_sampling_draws_from_the_nucleus_alone():
    cut, draw = (jax.jit(function, compiler_options=QUICK) for function in (nucleus, sample))
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]))
    for top_p, kept in ((0.5, [[0], [2, 3]]), (0.6, [[0, 1], [2, 3]]), (0.99, [[0, 1, 2, 3], [0, 1, 2, 3]])):
        finite = np.isfinite(np.asarray(cut(logits, top_p)))
        assert [np.flatnonzero(row).tolist() for row in finite] == kept, top_p
    assert np.isfinite(np.asarray(cut(jnp.zeros((2, 4)), 0.1))).all()  # equals are all kept
    tokens, scores = draw(logits, None, 0.0, None)
    assert tokens.tolist() == [0, 3]
    np.testing.assert_allclose(scores, np.log([0.5, 0.4]), rtol=1e-6)
    many = jnp.broadcast_to(logits[:1], (4_000, 4))
    drawn, scores = draw(many, jax.random.key(0), 0.5, 0.99)
    expected = np.square([0.5, 0.25, 0.15, 0.1])  # temperature 0.5 squares the probabilities
    share = np.bincount(np.asarray(drawn), minlength=4) / 4_000
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.03)
    np.testing.assert_allclose(scores, np.asarray(logits)[0][np.asarray(drawn)], rtol=1e-5)
    assert set(np.asarray(draw(many, jax.random.key(1), 1.0, 0.6)[0]).tolist()) == {0, 1}


@pytest.mark.parametrize("name", ["shared", "parallel post_local", "sequential"])
def test_layers_pruned_by_numbers_are_those_that_the_configuration_prunes(name):
    """In every pass that takes decisions, and against forced ones too; only the cache keeps what it need not."""
    params, tokens, lengths = make_params(LAYERS[name]), make_tokens(2, 24), jnp.array([24, 17], jnp.int32)
    chosen = jax.random.bernoulli(jax.random.key(3), 0.5, (3, 2, 25))

    def passes(layer, pruned, decisions):
        layout = layout_of(CONFIG, layer, 30)
        before, now = (None, None) if decisions is None else (decisions[:, :, :24], decisions[:, :, 24])
        stream = probe_layers(params, tokens, CONFIG, layer, probe=lambda x: x, decisions=before, pruned=pruned)
        logits, cache, prompt = prefill(params, tokens, lengths, CONFIG, layer, layout, decisions=before, pruned=pruned)
        step, _, routed = decode_step(decode_params(params), tokens[:, 0], lengths, lengths > 0, cache, CONFIG, layer,
                                      layout, decisions=now, pruned=pruned)
        return stream, logits, step, prompt, routed

    for decisions in (None, chosen):
        own = jax.jit(functools.partial(passes, dataclasses.replace(LAYERS[name], pruned_layers=(1,)), None),
                      compiler_options=QUICK)(decisions)
        given = jax.jit(functools.partial(passes, LAYERS[name]), compiler_options=QUICK)(
            jnp.array([False, True, False]), decisions)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), own, given)
        assert not np.asarray(given[3])[1].any() and not np.asarray(given[4])[1].any()
