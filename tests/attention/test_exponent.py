"""What the exponent of the scores must keep: large scores and what is not finite; and every row of the block table."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, on_gpu, value_and_gradients
from test_backends import assert_close, few_programs  # noqa: F401  (a fixture)

from l2a_jax import device
from l2a_jax.attention import pallas, reference
from l2a_jax.attention.kernels import blocks, split
from l2a_jax.attention.kernels.plan import Block, Spec, make_plan

SHIFTED = (
    Case("full", length=67, width=16, heads=2, kv_heads=1), Case("full", length=131, width=32),
    Case("local", length=131, window=9, sinks=4), Case("routed", length=131, rate=0.2),
    Case("local", length=67, window=9, sinks=3, width=128, heads=2, kv_heads=1),
    Case("mixed", length=131, rate=0.3, window=9, sinks=4),
)


@pytest.mark.parametrize("sign", (1, -1))
@pytest.mark.parametrize("root, tolerance", ((2**6, 1e-4), (2**10, 2e-2)))  # all scores are about +-root^2
@pytest.mark.parametrize("backend, case", [("pallas_interpret", SHIFTED[2]), *on_gpu(SHIFTED)], ids=str)
def test_a_number_added_to_all_scores_changes_nothing(backend, case, root, tolerance, sign):
    """The rows to float32's accuracy, since the product with the scale is not rounded; the gradients as well as a
    log-sum-exp of that size, in float32, tells the weights."""
    q, k, v, cotangent, options = case.inputs()
    q, k = (jnp.round(2 * x).at[..., 0].set(0.0) / 2 for x in (q, k))  # so that any order of sums is exact
    expected = value_and_gradients(case, "reference", q, k, v, cotangent, options)
    far = q.at[..., 0].set(root), k.at[..., 0].set(sign * root)
    actual = value_and_gradients(case, backend, *far, v, cotangent, options)
    actual, expected = ([out, d_q[..., 1:], d_k[..., 1:], d_v] for out, d_q, d_k, d_v in (actual, expected))
    assert_close(actual, expected, tolerance)
    error = np.linalg.norm(actual[0] - expected[0]) / np.linalg.norm(expected[0])
    assert error < (3e-6 if backend == "pallas" else tolerance)  # interpret mode rounds the product


@pytest.mark.parametrize("tops", (0.0, 2.0**20))
def test_shares_of_a_tile_join_to_the_digits_of_their_maxima(tops):
    """Here in float64; by log-sum-exps, which float32 rounds to 1/8 there, weights near 2^20 would be 4 % off."""
    rng = np.random.default_rng(17)
    spec = Spec("routed", length=40, heads=2, kv_heads=1, width=16, interpret=True)
    block, rows = Block(16, 16, 4, 1), 10
    plan = make_plan(spec, 1, jnp.arange(40)[None] % 4 == 0, None)
    shapes = [shape.shape for shape in split.part_shapes(spec, block, 1)]
    draws = (rng.standard_normal(shapes[0]), tops + rng.integers(-24, 24, shapes[1]) / 8, rng.uniform(1, 9, shapes[2]))
    inputs = [x.astype(np.float32) for x in draws]
    blank = jnp.zeros((1, 40, 2, 16)), jnp.zeros((1, 2, 40))
    out, joined = split.join(spec, block, plan, *blank, tuple(inputs))

    parts = min(split.places(spec, 1), split.MAX_PARTS)
    values, part_tops, totals = (x[0].astype(np.float64).reshape(2, -1, 16, *x.shape[3:])[:, :parts, :rows]
                                 for x in inputs)
    weights = np.exp2(part_tops - tops)
    total = (weights * totals).sum(1)
    expected = (weights[..., None] * values).sum(1) / total[..., None]
    assert parts > 1
    np.testing.assert_allclose(out[0, ::4].transpose(1, 0, 2), expected, rtol=0, atol=3e-6)
    np.testing.assert_allclose(joined[0, :, :rows], tops + np.log2(total), rtol=2e-7)


BROKEN = (Case("full", length=40, batch=1), Case("local", length=40, batch=1, window=7, sinks=2),
          Case("routed", length=40, batch=1, rate=0.5), Case("mixed", length=40, batch=1, rate=0.3, window=7, sinks=2))


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("backend, case", [
    *((backend, case) for backend in ("xla", "xla_chunked") for case in BROKEN), ("pallas_interpret", BROKEN[1]),
    *on_gpu(BROKEN)], ids=str, indirect=["backend"])
def test_what_is_not_finite_reaches_the_rows_that_see_it_and_no_others(backend, case, value):
    """The kernels' maximum ignores a NaN: it is the exponent that must pass it on."""
    q, k, v, _, options = case.inputs()
    for inputs in ((q.at[0, 30, 1, 3].set(value), k, v), (q, k.at[0, 1, 0, 3].set(value), v)):
        actual, expected = (np.isfinite(case.call(name, *inputs, options)).all(-1) for name in (backend, "reference"))
        assert not expected.all()
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("backend, case", [
    *((backend, case) for backend in ("reference", "xla", "xla_chunked") for case in BROKEN),
    ("pallas_interpret", BROKEN[0]), ("pallas_interpret", BROKEN[3]), *on_gpu(BROKEN)], ids=str, indirect=["backend"])
def test_a_row_whose_every_score_is_minus_infinity_is_no_number(backend, case):
    """Not a mean of what it may not see. The rows after it see finite scores too, and stay finite."""
    q, k, v, _, options = case.inputs()
    q = q.at[..., 3].set(-1.0)
    options |= {"decisions": jnp.ones((1, 40), bool)} if case.operation == "routed" else {}
    finite = np.isfinite(case.call(backend, q, k.at[0, 0, 0, 3].set(jnp.inf), v, options)).all(-1)
    np.testing.assert_array_equal(finite[0], [[token > 0 or head > 1 for head in range(4)] for token in range(40)])


TABLE = {
    "window": Case("local", length=1_100, batch=1, window=300, sinks=20),
    "long": Case("local", length=1_100, batch=1, window=300, sinks=4),
    "most": Case("local", length=1_100, batch=2, window=800, sinks=4),
    "routed": Case("routed", length=1_300, batch=1, rate=0.3),
    "mixed": Case("mixed", length=1_100, batch=1, rate=0.2, window=200, sinks=4),
    "whole": Case("full", length=1_100, batch=1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16), ids=("bfloat16", "float16"))
@pytest.mark.parametrize("width", blocks.WIDTHS)
@pytest.mark.parametrize("arch, loop", [(arch, loop) for arch in blocks.SHARED_MEMORY for loop in blocks.LOOPS])
def test_every_row_of_the_table_on_the_device(arch, loop, width, dtype):
    """At a length that a test can afford, whatever row such a call would take by itself."""
    if arch == "sm_90" and device.capability() < 9:
        pytest.skip("tiles for Hopper do not fit an Ada card")
    case = dataclasses.replace(TABLE[loop], width=width)
    q, k, v, cotangent, options = case.inputs(dtype=dtype)
    exact = [x.astype(jnp.float32) for x in (q, k, v, cotangent)]
    call = functools.partial(getattr(pallas, case.operation), table=blocks.table(arch, width, 2, loop), **options)

    @jax.jit
    def run(q, k, v, cotangent):
        out, pull = jax.vjp(call, q, k, v)
        return (out, *pull(cotangent))

    actual = [x.astype(jnp.float32) for x in run(q, k, v, cotangent)]
    assert_close(actual, value_and_gradients(case, "reference", *exact, options), 1e-2)


def test_a_masked_softmax_by_hand():
    """A row of two, one that may see nothing, one that sees only minus infinity; and their gradients."""
    scores = jnp.array([[0.0, np.log(3.0)], [5.0, 7.0], [-jnp.inf, 1.0]])
    mask = jnp.array([[True, True], [False, False], [True, False]])
    np.testing.assert_allclose(reference.masked_softmax(scores, mask), [[0.25, 0.75], [0, 0], [np.nan, 0]], rtol=1e-6)
    slopes = jax.grad(lambda scores: reference.masked_softmax(scores, mask)[:2, 0].sum())(scores)
    np.testing.assert_allclose(slopes[:2], [[0.1875, -0.1875], [0, 0]], rtol=1e-6)
