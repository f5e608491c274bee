"""Decode attention: every backend against the oracle, the oracle against whole-sequence attention, and the lowering."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.attention import decode, reference
from l2a_jax.attention.api import Call, why_not
from l2a_jax.attention.decode import KV, Reads, attend_cache
from l2a_jax.attention.kernels import decode as kernel
from l2a_jax.errors import Unsupported
from l2a_jax.research.speed.compiled import lower_for_cuda

LAYERS, BATCH, SLOTS = 2, 5, 600
# Rows: everything; a window; an almost empty cache (the first token); a wrapped ring (a hole at its slot); not seen.
READS = Reads(jnp.array([0, 344, 0, 0, 0], jnp.int32), jnp.array([599, 599, 0, 600, 300], jnp.int32),
              jnp.array([599, 599, 0, 123, 300], jnp.int32), jnp.array([True, True, True, True, False]))


def make(heads, kv_heads, width, dtype=jnp.float32, batch=BATCH, slots=SLOTS):
    rng = np.random.default_rng((heads, width))
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    cache = KV(*(draw(LAYERS, batch, slots, kv_heads, width) for _ in range(2)))
    return draw(batch, heads, width), draw(batch, kv_heads, width), draw(batch, kv_heads, width), cache


@functools.partial(jax.jit, static_argnames=("sinks", "write", "backend", "layer"))
def run(q, k, v, cache, reads, **options):
    return attend_cache(q, k, v, cache, reads=reads, **options)


@pytest.fixture
def many_parts(monkeypatch):
    """Small caches, all the same shared among several programs of several blocks."""
    monkeypatch.setattr(kernel, "MIN_KEYS", 64)


ON_GPU = pytest.param("pallas", marks=pytest.mark.gpu)


@pytest.mark.parametrize("backend", ["xla", "pallas_interpret", ON_GPU])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "dtype", "tolerance"), [
    (14, 2, 64, jnp.float32, 2e-6), (12, 2, 128, jnp.bfloat16, 1e-2)])
def test_every_backend_gives_the_oracles_rows_and_cache(heads, kv_heads, width, dtype, tolerance, backend, many_parts):
    q, k, v, cache = make(heads, kv_heads, width, dtype)
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    want, _ = run(*exact, KV(*(x.astype(jnp.float32) for x in cache)), READS, layer=1, sinks=4, backend="reference")
    rows, stored = run(q, k, v, cache, READS, layer=1, sinks=4, backend=backend)
    assert rows.dtype == dtype and bool(jnp.isfinite(rows).all())
    error = jnp.linalg.norm(rows.astype(jnp.float32) - want, axis=(1, 2)) / (jnp.linalg.norm(want, axis=(1, 2)) + 1e-9)
    assert error.max() < tolerance, error
    assert not np.any(np.asarray(rows[4], np.float32))  # a row that is not seen
    for store, before, new in zip(stored, cache, (k, v), strict=True):  # written in its slot, and nowhere else
        expected = np.array(before)
        expected[1, np.arange(BATCH), READS.slot] = new
        np.testing.assert_array_equal(np.asarray(store), expected)


@pytest.mark.parametrize("backend", ["xla", "pallas_interpret", ON_GPU])
def test_a_second_look_writes_nothing(backend):
    q, k, v, cache = make(6, 6, 16, slots=40)  # one query head a key head
    reads = Reads(*(jnp.full((BATCH,), n, jnp.int32) for n in (30, 39, 39)), jnp.ones((BATCH,), bool))
    want, _ = run(q, k, v, cache, reads, layer=0, backend="reference")
    rows, stored = run(q, k, v, cache, reads, layer=0, write=False, backend=backend)
    np.testing.assert_allclose(rows, want, atol=1e-5)
    for store, before in zip(stored, cache, strict=True):
        np.testing.assert_array_equal(store, before)


@pytest.mark.parametrize("backend", ["reference", "xla", "pallas_interpret", ON_GPU])
def test_a_query_is_taken_in_the_caches_dtype(backend):
    q, k, v, cache = make(4, 2, 16)
    half, cache = q.astype(jnp.bfloat16), KV(*(x.astype(jnp.bfloat16) for x in cache))
    rows, _ = run(q, k, v, cache, READS, layer=0, backend=backend)
    same, _ = run(half, k, v, cache, READS, layer=0, backend=backend)
    assert rows.dtype == jnp.float32 and same.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows.astype(jnp.bfloat16), same)


@pytest.mark.parametrize("backend", ["xla", "pallas_interpret", ON_GPU])
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_what_is_not_finite_reaches_the_rows_that_see_it_and_no_others(backend, value, many_parts):
    q, k, v, cache = make(4, 2, 16)
    q, k, v = (jnp.concatenate([x[:2]] * 2 + [x[:1]]) for x in (q, k, v))
    q = q.at[:, 1, 3].set(-1.0)  # the score of an infinite key: weight 0
    keys = cache.k.at[1, 0, 300, 0, 3].set(value)  # everything is seen, and a part is shared
    keys = keys.at[1, 1, 300, 0, 3].set(value)  # outside the window
    keys = keys.at[1, 3, :, 0, 3].set(value)  # every score but the token's own
    k = k.at[2, 0, 3].set(value)  # the token itself, alone
    options = {"layer": 1, "sinks": 4}
    expected, actual = (np.isfinite(run(q, k, v, KV(keys, cache.v), READS, backend=name, **options)[0]).all(-1)
                        for name in ("reference", backend))
    assert expected[1].all() and expected[4].all() and not expected[2, 1]
    assert expected[3, 1] == expected[0, 1] == (value == float("inf"))
    np.testing.assert_array_equal(actual, expected)


def test_the_oracle_is_one_row_of_whole_sequence_attention():
    """The last row of `attention.reference`, full and local, over the same keys."""
    length, window, sinks = 50, 9, 3
    rng = np.random.default_rng(7)
    q, k, v = (jnp.asarray(rng.standard_normal((2, length, heads, 16)), jnp.float32) for heads in (6, 2, 2))
    cache = KV(*(jnp.full((1, 2, 64, 2, 16), jnp.nan).at[0, :, : length - 1].set(x[:, :-1]) for x in (k, v)))
    cache = KV(*(jnp.nan_to_num(x, nan=1e4) for x in cache))  # slots that must not be read
    last = jnp.array([length - 1] * 2, jnp.int32)
    seen = jnp.ones((2,), bool)
    for begin, whole in ((0, reference.full(q, k, v)),
                         (length - window, reference.local(q, k, v, window=window, sinks=sinks))):
        reads = Reads(jnp.full_like(last, begin), last, last, seen)
        rows, _ = run(q[:, -1], k[:, -1], v[:, -1], cache, reads, layer=0, sinks=sinks, backend="reference")
        np.testing.assert_allclose(rows, whole[:, -1], atol=1e-5)


def test_a_row_has_as_many_programs_as_its_own_range_needs():
    """What a row that sees its window costs does not depend on the length of the cache."""
    for slots in (1_024, 32_768, 131_072):
        places = kernel.max_parts(slots)
        end = jnp.array([slots - 1, slots - 1, 0])
        each, parts = kernel.share(jnp.array([0, slots - 256, 0]), end, places, 64)
        assert parts[1] == parts[2] == 1 and each[1] == 256
        assert parts[0] <= places and parts[0] * each[0] >= slots - 1  # every slot has a program
    assert places == kernel.MAX_PARTS


@pytest.mark.parametrize(("heads", "width", "dtype"), [(14, 64, jnp.bfloat16), (12, 128, jnp.bfloat16),
                                                       (14, 64, jnp.float32), (12, 128, jnp.float32)])
@pytest.mark.parametrize("write", [True, False])
def test_the_kernel_lowers_for_cuda(heads, width, dtype, write):
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
    ints = jax.ShapeDtypeStruct((3,), jnp.int32)
    reads = Reads(ints, ints, ints, jax.ShapeDtypeStruct((3,), jnp.bool_))

    def call(q, k, v, cache, reads):
        return kernel.decode(q, k, v, *cache, 5, reads, sinks=4, write=write, interpret=False)

    cache = KV(*(shape(24, 3, 33_000, 2, width) for _ in range(2)))
    text = lower_for_cuda(call, shape(3, heads, width), shape(3, 2, width), shape(3, 2, width), cache, reads).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 2
    assert ("output_operand_alias" in text) == write  # in place: the cache is not copied


def test_a_backend_without_a_decode_step_is_refused(monkeypatch):
    monkeypatch.delitem(decode.LOOKS, "xla")
    with pytest.raises(Unsupported, match="'xla' has no decode step; expected one of pallas"):
        attend_cache(*make(4, 2, 16, slots=40), 0, READS, backend="xla")


def test_bad_calls_are_refused():
    q, k, v, cache = make(4, 2, 16, slots=40)
    with pytest.raises(NotImplementedError, match="cuDNN has no per-row range"):
        attend_cache(q, k, v, cache, 0, READS, backend="cudnn")
    with pytest.raises(ValueError, match="do not fit the cache"):
        attend_cache(q[:3], k[:3], v[:3], cache, 0, READS)
    with pytest.raises(ValueError, match="layer 2 of the cache"):
        attend_cache(q, k, v, cache, 2, READS)
    with pytest.raises(ValueError, match="expected one of"):
        why_not("cuda", Call("decode", 1, 8, 2, 1, 64, "float32"))
    assert "none of" in why_not("pallas_interpret", Call("decode", 1, 8, 2, 1, 24, "float32"))
