"""One suite for all backends: values and gradients against the oracle, causality, determinism."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, PLACED, Case, compiled, on_gpu, oracle, value_and_gradients

from l2a_jax.attention import reference
from l2a_jax.attention.kernels import split
from l2a_jax.sharding import stripes


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """In interpret mode an idle program costs time; a few are enough to share the keys of these few rows."""
    if jax.default_backend() != "gpu":
        monkeypatch.setattr(split, "PROGRAMS", 48)


@pytest.mark.parametrize("case", CASES[17:18], ids=str)
def test_routed_rows_that_do_not_share_their_keys(case, monkeypatch):
    """The tests' few rows share their keys among programs; here too many programs are at work for that."""
    monkeypatch.setattr(split, "PROGRAMS", 2 * case.batch * case.heads)
    assert_close(run(case, "pallas_interpret", *case.inputs()), oracle(case), 3e-6)


def unless_declined(function, *args):
    """The result, or a skip with the reason where cuDNN, which others wrote, declines the call; ours may not."""
    try:
        return function(*args)
    except NotImplementedError as error:
        if "backend 'cudnn'" not in str(error):
            raise
        pytest.skip(str(error))


def run(case, backend, *args):
    """`value_and_gradients`, or a skip."""
    return unless_declined(functools.partial(value_and_gradients, case, backend), *args)


def assert_close(actual, expected, tolerance):
    """Relative errors in the 2-norm. The floor is for gradients that are exactly 0 (a window of one key)."""
    floor = 0.1 * np.linalg.norm(np.asarray(expected[0], np.float64)) + 1e-6
    for name, one, other in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.isfinite(one).all(), name
        error = np.linalg.norm(one - other) / max(np.linalg.norm(other), floor)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


# Interpreting a kernel takes seconds: what another case covers as well is left to the GPU.
COVERED = (0, 3, 5, 6, 16, 18, 20, 21, 22)


def suite():
    """(backend, case), those of a case beside each other: they share the oracle's answer."""
    for index, case in enumerate(CASES):
        yield from (("xla", case), ("cudnn", case))
        if index % 4 == 1:
            yield "xla_chunked", case
        if index not in COVERED:
            yield "pallas_interpret", case
    for index, case in enumerate(PLACED):
        yield "xla", case
        if index % 3 == 1:
            yield "xla_chunked", case
        if case.width == 16:
            yield "pallas_interpret", case
    yield from on_gpu(CASES + PLACED)


@pytest.mark.parametrize("backend, case", [*suite()], ids=str, indirect=("backend",))
def test_values_and_gradients_are_the_oracles(backend, case):
    """... and the same, bit for bit, in a second run."""
    *inputs, options = case.inputs()
    function = compiled(case, backend, options)
    actual = unless_declined(function, *inputs)
    assert_close(actual, oracle(case), 3e-6)
    for one, other in zip(actual, function(*inputs), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("case", (*CASES[3::6], *PLACED[3::6]), ids=str)
@pytest.mark.parametrize("backend", ("xla", "cudnn", pytest.param("pallas", marks=pytest.mark.gpu)), indirect=True)
def test_bfloat16_stays_near_the_float32_oracle(backend, case):
    q, k, v, cotangent, options = case.inputs(dtype=jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in (q, k, v, cotangent)]
    actual = run(case, backend, q, k, v, cotangent, options)
    assert all(x.dtype == jnp.bfloat16 for x in actual)
    assert_close([x.astype(jnp.float32) for x in actual], value_and_gradients(case, "reference", *exact, options), 1e-2)


PROBES = (
    Case("full", length=40, batch=1), Case("local", length=40, batch=1, window=7, sinks=2),
    Case("routed", length=40, batch=1, rate=0.5), Case("mixed", length=40, batch=1, rate=0.3, window=7, sinks=2),
    Case("local", length=40, batch=1, window=7, sinks=2, packing=((13, 20),)),
    Case("mixed", length=40, batch=1, rate=0.3, window=7, sinks=2, packing=((13, 20),), places="random"),
)


@pytest.mark.parametrize("backend, case", [
    *itertools.product(("xla",), PROBES), *itertools.product(("pallas_interpret",), PROBES[4:5]),
    *on_gpu(PROBES),
], ids=str, indirect=("backend",))
def test_a_changed_token_is_seen_exactly_where_the_mask_allows_it(backend, case):
    """Perturb the key and value of one token: only rows that may see it change, and those all do."""
    q, k, v, cotangent, options = case.inputs(seed=int(np.random.default_rng().integers(2**31)))
    token = 15
    changed = [x.at[:, token].add(1.0) for x in (k, v)]
    function = compiled(case, backend, options)
    before, *gradients = unless_declined(function, q, k, v, cotangent)
    after = function(q, *changed, cotangent)[0]
    moved = np.asarray(jnp.any(before != after, axis=(2, 3)))[0]
    shape, packed, places = k.shape[:2], options.get("segment_ids"), options.get("places")
    mask = reference.at_places(reference.causal_mask(packed, shape), places)
    if case.window is not None:
        near = reference.local_mask(packed, shape, window=case.window, sinks=case.sinks)
        near = reference.at_places(near, places)
        mask = jnp.where(options["decisions"][:, :, None], mask, near) if case.operation == "mixed" else near
    if case.operation == "routed":
        mask = mask & options["decisions"][:, :, None]
    mask = np.asarray(mask)[0]
    np.testing.assert_array_equal(moved, mask[:, token])
    # A row without keys gives exactly nothing back, and a key that no row sees receives exactly nothing.
    assert not np.any(np.asarray(gradients[0])[0, ~mask.any(1)])
    assert not np.any(np.asarray(gradients[1])[0, ~mask.any(0)])


# Long enough for every block of the table to have interior tiles, ragged ends and several documents.
LONG = (
    Case("full", length=1_100, batch=1, heads=14, kv_heads=2),
    Case("local", length=1_100, heads=14, kv_heads=2, window=300, sinks=4),
    Case("local", length=1_100, batch=1, heads=6, kv_heads=2, width=128, window=129, sinks=20,
         packing=((500, 3, 2, 400),)),
    Case("routed", length=1_300, heads=14, kv_heads=2, rate="uneven"),
    Case("routed", length=1_300, heads=6, kv_heads=2, width=128, rate=0.3, packing=((700, 600), (20, 1_000))),
    Case("mixed", length=1_100, heads=14, kv_heads=2, rate=0.2, window=200, sinks=4),
    Case("mixed", length=1_100, heads=6, kv_heads=2, width=128, rate=0.2, window=64, sinks=4,
         packing=((700, 400), (20, 1_000))),
    Case("local", length=1_104, heads=14, kv_heads=2, window=300, sinks=4, places="stripes"),
    Case("routed", length=1_300, heads=6, kv_heads=2, width=128, rate=0.3, packing=((700, 600), (20, 1_000)),
         places="random"),
    Case("mixed", length=1_104, heads=14, kv_heads=2, rate=0.2, window=64, sinks=4, packing=((700, 400), (20, 1_000)),
         places="stripes"),
)


def test_rows_of_some_tokens_are_those_rows_of_all():
    """By the oracle's own definition; and what the parts of a row's tokens give back to its keys is the whole."""
    case = Case("mixed", length=24, width=16, rate=0.4, window=5, sinks=2, packing=((9, 12), (24,)))
    q, k, v, cotangent, options = case.inputs()
    whole = value_and_gradients(case, "reference", q, k, v, cotangent, options)
    parts = []
    for shard in range(3):
        places = stripes.places(24, 3, shard)
        take = lambda x, places=places: x[:, places]  # noqa: E731
        call = options | {"decisions": take(options["decisions"]), "places": places}
        parts.append(value_and_gradients(case, "reference", take(q), k, v, take(cotangent), call))
        for part, all_rows in zip(parts[-1][:2], whole[:2], strict=True):
            np.testing.assert_allclose(part, take(all_rows), rtol=1e-5, atol=1e-6)
    for of_keys, found in zip(whole[2:], list(zip(*parts, strict=True))[2:], strict=True):
        np.testing.assert_allclose(sum(found), of_keys, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", ((jnp.float32, 3e-6), (jnp.bfloat16, 1e-2)), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_rows_on_the_device(case, dtype, tolerance):
    q, k, v, cotangent, options = case.inputs(dtype=dtype)
    exact = [x.astype(jnp.float32) for x in (q, k, v, cotangent)]
    actual = [x.astype(jnp.float32) for x in run(case, "pallas", q, k, v, cotangent, options)]
    assert_close(actual, value_and_gradients(case, "reference", *exact, options), tolerance)


def test_padding_rows_are_zero_and_give_nothing_back():
    case = Case("local", window=9, sinks=4, packing=((30, 1, 25), (3, 3, 3, 60)))
    q, k, v, cotangent, options = case.inputs()
    padding = np.asarray(options["segment_ids"]) == 0
    for value in run(case, "pallas" if jax.default_backend() == "gpu" else "xla", q, k, v, cotangent, options):
        assert not np.any(np.asarray(value)[padding])


@pytest.mark.parametrize("backend", ("reference", "xla", "xla_chunked", "pallas_interpret",
                                     pytest.param("pallas", marks=pytest.mark.gpu)), indirect=True)
def test_an_id_that_returns_after_another_document_is_a_document_of_its_own(backend):
    case = Case("local", window=9, sinks=4, packing=((30, 1, 25), (3, 3, 3, 60)))
    *inputs, options = case.inputs()
    ids = options.pop("segment_ids")
    one, other = (value_and_gradients(case, backend, *inputs, options | {"segment_ids": x})
                  for x in (ids, jnp.where(ids == 3, 1, ids)))
    for x, y in zip(one, other, strict=True):
        np.testing.assert_array_equal(x, y)
