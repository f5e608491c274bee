"""bfloat16 masters train: what is smaller than their last place is kept on average, and moments are not lost."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2a_jax.models.params import map_with_path
from l2a_jax.training.optimizer import Dials, OptimizerConfig, make_optimizer, narrowed, round_stochastically
from l2a_jax.training.regimes import partition, regime_mask
from l2a_jax.training.step import initial_state, train_step
from tests.models.cases import make_params
from tests.training.test_step import OBJECTIVE, make_batch

DRAWS = 4_096
DIALS = Dials(5e-5, 3e-4, steps=1, warmup=3, penalty=0.5)


@pytest.mark.parametrize("value", [1 + 2**-12, -(1 + 2**-9), 3e-5, -7.3, 1e-30, 3e38])
def test_rounding_is_right_on_average_and_never_further_than_a_neighbour(value):
    """Literally: the two bfloat16 around the value, and its place between them as the share of the farther one."""
    low = np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)
    below, above = low.view(np.float32), (low + np.uint32(0x10000)).view(np.float32)
    found = round_stochastically(jnp.full(DRAWS, value, jnp.float32), jax.random.key(0))
    found = np.asarray(found.astype(jnp.float32), np.float64)
    assert set(np.unique(found)) <= {float(below), float(above)}
    share = (np.float32(value).astype(np.float64) - below) / (np.float64(above) - below)
    assert abs(np.mean(found == float(above)) - share) < 4 * np.sqrt(share * (1 - share) / DRAWS) + 1e-12


def test_what_a_bfloat16_holds_stays_and_what_is_no_number_stays_none():
    exact = jnp.asarray([0.0, -0.0, 1.0, -2.5, 2.0**-120, jnp.inf, -jnp.inf], jnp.float32)
    np.testing.assert_array_equal(round_stochastically(exact, jax.random.key(1)).astype(jnp.float32), exact)
    assert bool(jnp.isnan(round_stochastically(jnp.asarray([jnp.nan]), jax.random.key(2)))[0])


def test_leaves_in_float32_are_not_rounded_and_draws_differ_between_leaves():
    stored = {"a": jnp.zeros(512, jnp.bfloat16), "b": jnp.zeros(512, jnp.bfloat16), "c": jnp.zeros(512)}
    updated = dict.fromkeys(stored, jnp.full(512, 1 + 2**-9))
    kept = narrowed(updated, stored, jax.random.key(3))
    np.testing.assert_array_equal(kept["c"], updated["c"])
    assert kept["a"].dtype == jnp.bfloat16 and bool((kept["a"] != kept["b"]).any())


@functools.cache
def trained(master_dtype, steps, regime="router_only", micro=1, **rule):
    momentum = None if master_dtype == jnp.float32 else master_dtype
    rule, dials = OptimizerConfig(regime, momentum_dtype=momentum, **rule), DIALS._replace(steps=steps)
    params = make_params(OBJECTIVE.l2a_config)
    trainable, frozen = partition(params, regime_mask(params, regime))
    state = initial_state(trainable, make_optimizer(rule, dials), master_dtype)
    step = jax.jit(functools.partial(train_step, dials=dials, objective=OBJECTIVE, optimizer=rule))
    before = state.trainable
    for index in range(steps):
        batch = jax.tree.map(lambda x: jnp.repeat(x, micro, axis=0), make_batch(1, seed=index))
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        assert bool(metrics["healthy"])
    return before, state


def moments_of(state):
    nodes = jax.tree.leaves(state.optimizer, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
    return [node for node in nodes if isinstance(node, optax.ScaleByAdamState)]


def test_at_the_default_rate_every_norm_scale_moves_as_in_float32():
    """60 steps of 5e-5 move a scale by about 1e-3, less than bfloat16's 1/128 at 1: norms and router stay float32."""
    moves = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        before, state = trained(dtype, 60)
        moves[dtype] = (state.trainable["layers"]["norm_attention"]["scale"]
                        - before["layers"]["norm_attention"]["scale"])
    assert float(jnp.abs(moves[jnp.float32]).max()) < 2**-8, "the case must be one that rounding would lose"
    assert bool((moves[jnp.bfloat16] != 0).all())
    np.testing.assert_allclose(moves[jnp.bfloat16], moves[jnp.float32], atol=2e-5)  # their momentum is rounded


@pytest.mark.parametrize("leaf", ["q", "o"])
def test_at_the_default_rate_matrices_move_where_float32_moves_them(leaf):
    """Rounded to the nearest, entries above 1/32 would never move: here all together do, as they should."""
    before, exact = trained(jnp.float32, 20, "l2a_ft")
    _, rounded = trained(jnp.bfloat16, 20, "l2a_ft")

    def kernel(tree):
        return np.asarray(tree["layers"]["attention"][leaf]["kernel"].astype(jnp.float32), np.float64).ravel()

    start = np.asarray(jnp.asarray(kernel(before)).astype(jnp.bfloat16).astype(jnp.float32), np.float64)
    asked, made = kernel(exact.trainable) - kernel(before), kernel(rounded.trainable) - start
    large = np.abs(start) > 2**-5
    assert np.abs(asked[large]).max() < 2**-13 * 20 and large.sum() > 100
    # How far they went along the direction that float32 took, in units of its own way.
    share = (made[large] @ asked[large]) / (asked[large] @ asked[large])
    error = np.sqrt(np.var(made[large]) / (asked[large] @ asked[large]))
    assert error < 0.4 and abs(share - 1) < 4 * error


def test_many_steps_of_one_small_update_arrive():
    """The kind itself, literally: 2,000 times 2**-12 onto 1; to the nearest the sum stays 1."""
    value = {"a": jnp.ones(256, jnp.bfloat16)}
    step = jax.jit(lambda v, key: narrowed({"a": v["a"].astype(jnp.float32) + 2.0**-12}, v, key))
    for index in range(2_000):
        value = step(value, jax.random.fold_in(jax.random.key(4), index))
    assert abs(float(value["a"].astype(jnp.float32).mean()) - (1 + 2_000 * 2**-12)) < 0.01
    assert float(jnp.ones((), jnp.bfloat16) + jnp.asarray(2.0**-12, jnp.bfloat16)) == 1.0


def test_matrices_alone_are_bfloat16_and_no_second_moment_is():
    _, state = trained(jnp.bfloat16, 20, "l2a_ft")
    moments = moments_of(state)
    assert {leaf.dtype.name for m in moments for leaf in jax.tree.leaves(m.nu)} == {"float32"}
    assert {leaf.dtype.name for m in moments for leaf in jax.tree.leaves(m.mu)} == {"bfloat16"}
    found = {}
    map_with_path(lambda path, leaf: found.setdefault(path, leaf.dtype.name), state.trainable)
    narrow = {path for path, name in found.items() if name == "bfloat16"}
    assert narrow == {path for path in found if path.endswith("kernel") and "router" not in path} != set()


def test_second_moments_in_bfloat16_would_be_wrong():
    """Why they are not kept so: after a gradient 10 times larger ends, beta2 0.999 cannot forget it in bfloat16."""
    def moments(dtype):
        nu = jnp.zeros((), dtype)
        for value in [10.0] * 300 + [1.0] * 3_000:
            nu = (0.999 * nu.astype(jnp.float32) + 0.001 * value**2).astype(dtype)
        return float(nu)

    exact = sum(0.001 * (100.0 if i < 300 else 1.0) * 0.999 ** (3_299 - i) for i in range(3_300))
    assert abs(moments(jnp.float32) - exact) < 0.01 * exact
    assert moments(jnp.bfloat16) > 2 * exact


def test_micro_batches_are_summed_in_float32():
    """The same micro-batch 64 times is the micro-batch once; in bfloat16 the sum would stop growing on the way."""
    shared = {"master_dtype": jnp.bfloat16, "steps": 1, "regime": "l2a_ft", "clip": 1e9}
    (_, once), (_, often) = trained(**shared), trained(**shared, micro=64)
    for one, many in zip(moments_of(once), moments_of(often), strict=True):
        for a, b in zip(jax.tree.leaves(one.nu), jax.tree.leaves(many.nu), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(a.max()))
