"""Sampling at the ends of float32, and what `eval/generate.py` refuses before it reads a model."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.inference import stream
from l2a_jax.inference.generate import generate
from l2a_jax.inference.sampling import nucleus, sample
from tests.models.cases import CONFIG, make_params

PROMPTS = [[1, 7, 3], [5]]

SMALLEST = float(np.finfo(np.float32).tiny)
LOGITS = jnp.asarray([[3.0, 8.0, 7.5, -2.0], [-900.0, -1e4, -1e3, -2e3], [0.0, 1e30, 5.0, -1e30]], jnp.float32)


@pytest.mark.parametrize("temperature", (SMALLEST, 1e-37, 1e-30))
@pytest.mark.parametrize("top_p", (None, 0.9, 1.0, SMALLEST))
def test_the_smallest_temperatures_take_the_likeliest_token(temperature, top_p):
    greedy, likelihood = sample(LOGITS, None, 0.0, None)
    for seed in range(3):
        tokens, score = sample(LOGITS, jax.random.key(seed), jnp.float32(temperature), top_p)
        assert tokens.tolist() == greedy.tolist() == [1, 0, 1]
        assert np.array_equal(score, likelihood) and np.isfinite(score).all()


def test_equals_stay_equal_at_the_smallest_temperature():
    logits = jnp.asarray([[4.0, 9.0, 9.0, 8.9]], jnp.float32)
    drawn = {int(sample(logits, jax.random.key(seed), jnp.float32(SMALLEST), 1.0)[0][0]) for seed in range(16)}
    assert drawn == {1, 2}


def test_the_largest_temperature_draws_from_all():
    drawn = {int(sample(LOGITS[:1], jax.random.key(seed), jnp.float32(3e38), None)[0][0]) for seed in range(40)}
    assert drawn == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", (0.7, 1.0, 1e-6))
def test_what_does_not_overflow_is_as_it_was(temperature):
    """Token for token what dividing by the temperature gives."""
    logits = jax.random.normal(jax.random.key(1), (4, 60)) * 5
    for seed in range(5):
        expected = jax.random.categorical(jax.random.key(seed), nucleus(logits / temperature, 0.8), axis=-1)
        assert np.array_equal(sample(logits, jax.random.key(seed), temperature, 0.8)[0], expected)


@pytest.mark.parametrize("settings", [
    {"temperature": 1e-39}, {"temperature": SMALLEST, "key": jax.random.key(2)},
    {"temperature": 0.8, "top_p": SMALLEST, "key": jax.random.key(3)}])
def test_generation_at_the_ends_is_greedy(settings):
    params = make_params(None)
    greedy = generate(params, CONFIG, None, PROMPTS[:2], max_new_tokens=5, backend="xla")
    found = generate(params, CONFIG, None, PROMPTS[:2], max_new_tokens=5, backend="xla", **settings)
    assert np.array_equal(found.tokens, greedy.tokens) and bool(found.finite.all())


def test_a_top_p_that_float32_rounds_to_1_cuts_nothing():
    params, key = make_params(None), jax.random.key(4)
    found, whole = (generate(params, CONFIG, None, PROMPTS[:2], max_new_tokens=5, temperature=5.0, top_p=top_p, key=key,
                             backend="xla") for top_p in (1 - 1e-9, 1.0))
    assert np.array_equal(found.tokens, whole.tokens)


BAD = [
    ({"temperature": float("inf")}, "--temperature is inf; expected at least 0, and finite"),
    ({"temperature": float("nan")}, "--temperature is nan"), ({"temperature": 1e39}, "--temperature is 1e+39"),
    ({"temperature": -0.1}, "--temperature is -0.1"), ({"top_p": 0.0}, "--top-p is 0.0; expected a share"),
    ({"top_p": 1e-39}, "--top-p is 1e-39"), ({"top_p": float("nan")}, "--top-p is nan"), ({"top_p": 1.1}, "--top-p is"),
    ({"max_new_tokens": 0}, "--max-new-tokens is 0"), ({"max_new_tokens": 2**40}, "--max-new-tokens is"),
    ({"seed": -1}, "--seed is -1"), ({"seed": 2**32}, "--seed is 4294967296"), ({"window": 0}, "--window is 0"),
    ({"window": 2**40}, "--window is"), ({"sinks": -1}, "--sinks is -1"), ({"dtype": "int8"}, "--dtype is 'int8'"),
    ({"backend": "flash"}, "--backend is 'flash'; expected one of auto, reference, xla, cudnn, pallas"),
    *([] if jax.default_backend() == "gpu" else [
        ({"backend": "pallas"}, "--backend pallas cannot be used on this machine"),
        ({"backend": "cudnn"}, "--backend cudnn cannot be used on this machine")]),
]


def run(**given):
    stream.run("nowhere", prompt="x", prompt_file=None,
               **{"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "backend": "auto", **given})


@pytest.mark.parametrize(("given", "said"), BAD, ids=str)
def test_flags_are_refused_by_name_before_the_model_is_read(given, said, monkeypatch):
    monkeypatch.setattr(stream, "load_pretrained", lambda *args: pytest.fail("the model was read"))
    with pytest.raises(UserError) as error:
        run(**given)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(("given", "idle"), [
    ({"seed": 3}, ["--seed"]), ({"top_p": 0.5}, ["--top-p"]), ({"seed": 3, "top_p": 0.5, "temperature": 1.0}, [])])
def test_what_greedy_decoding_does_not_use_is_said(given, idle, monkeypatch, caplog):
    monkeypatch.setattr(stream, "load_pretrained", lambda *args: (_ for _ in ()).throw(UserError("enough")))
    with caplog.at_level(logging.WARNING, "l2a_jax"), pytest.raises(UserError, match="enough"):
        run(**given)
    assert [line.split()[0] for line in caplog.messages] == idle


def test_a_text_too_long_is_refused_before_a_word_of_it_is_written(capsys):
    from l2a_jax.sources import TINY

    with pytest.raises(UserError, match="longer than max_positions"):
        stream.run(TINY, prompt="the old river", prompt_file=None, max_new_tokens=5_000, temperature=0.0, top_p=1.0,
                   backend="xla")
    assert capsys.readouterr().out == ""
