"""Training: seeds side by side are separate runs, and what is frozen neither moves nor decays."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2a_jax.models.params import map_with_path
from l2a_jax.research.absorption import arm_training, arms
from l2a_jax.research.absorption.definitions import Arm
from tests.research.absorption import cases

STREAM = np.random.default_rng(0).integers(0, cases.CONFIG.vocab_size, 400).astype(np.uint16)
SEEDS = np.array([3, 8], np.uint32)


def starts(seeds, steps):
    """Windows of each seed, whatever seeds run beside it."""
    return np.stack([np.random.default_rng(int(s)).integers(0, 380, (steps, 4)) for s in seeds], 1).astype(np.int32)


def trained(group: list[Arm], seeds=SEEDS, steps=3):
    program = arm_training.Program(group[0].model(cases.CONFIG, 3), group[0].attention, cases.RECIPE)
    numbers = arm_training.member_axis([
        arm_training.arm_numbers(arm, program.config, cases.RECIPE, cases.TOP_K) for arm in group], len(seeds))
    members = np.tile(seeds, len(group))
    state = arm_training.init_members(members, numbers.gate_std, config=program.config)
    before = jax.tree.map(np.asarray, state.trainable)
    state, metrics = arm_training.train_chunk(state, STREAM, starts(members, steps), members, numbers, program=program)
    return before, jax.tree.map(np.asarray, state.trainable), metrics


@pytest.fixture(scope="module")
def soft():
    """Learned, frozen random and constant gates, two seeds each, in one program."""
    return trained([arms.soft_learned, arms.soft_random, arms.soft_constant])


def test_vmapped_members_equal_separate_runs(soft):
    _, together, metrics = soft
    for place, (arm, seed) in ((0, (arms.soft_learned, SEEDS[0])), (3, (arms.soft_random, SEEDS[1]))):
        _, alone, own = trained([arm], np.array([seed], np.uint32))
        np.testing.assert_allclose(own["loss"][:, 0], metrics["loss"][:, place], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(a[0], b[place], rtol=1e-3, atol=2e-5)


def test_arms_of_a_seed_begin_with_the_same_backbone_and_seeds_differ(soft):
    before, _, _ = soft
    embedding = before["embed"]["embedding"]
    np.testing.assert_array_equal(embedding[0], embedding[2])
    assert not np.array_equal(embedding[0], embedding[1])
    np.testing.assert_array_equal(before["layers"]["gate"]["q"]["kernel"][0],
                                  before["layers"]["gate"]["q"]["kernel"][2])
    np.testing.assert_array_equal(before["layers"]["gate"]["k"]["kernel"][4:], 0.0)


def test_frozen_gates_receive_neither_gradient_nor_decay(soft):
    before, after, metrics = soft
    for name in "qk":
        was, now = (tree["layers"]["gate"][name]["kernel"] for tree in (before, after))
        np.testing.assert_array_equal(now[2:], was[2:])  # frozen random, constant
        assert np.abs(now[:2] - was[:2]).max() > 1e-3  # learned
    assert (metrics["gate_grad_norm"][:, 2:4] > 0).all(), "a gradient was there to be refused"


def test_no_gradient_reaches_a_gate_through_hard_top_k():
    before, after, metrics = trained([arms.hard_after])
    np.testing.assert_array_equal(metrics["gate_grad_norm"], 0.0)
    for name in "qk":  # trained, but no gradient: not decayed either
        np.testing.assert_array_equal(after["layers"]["gate"][name]["kernel"], before["layers"]["gate"][name]["kernel"])
    assert np.abs(after["layers"]["attention"]["q"]["kernel"] - before["layers"]["attention"]["q"]["kernel"]).max() > 0


def test_an_indexers_gate_learns_from_the_attention_alone():
    numbers = arm_training.arm_numbers(arms.indexer, cases.CONFIG, cases.RECIPE, cases.TOP_K)
    params, tokens = cases.params(), cases.tokens(rows=2, length=17)

    def gradient(params, arm):
        return jax.grad(lambda p: arm_training.loss(p, tokens, numbers, None, arm_training.Program(
            cases.CONFIG, arm.attention, cases.RECIPE))[0])(params)

    plain, indexed = jax.jit(lambda p: (gradient(p, arms.hard_after), gradient(p, arms.indexer)))(params)
    gate = indexed["layers"].pop("gate")
    assert all((jnp.abs(leaf) > 0).any() for leaf in jax.tree.leaves(gate))
    assert not any(leaf.any() for leaf in jax.tree.leaves(plain["layers"].pop("gate")))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(indexed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_frozen_projections_and_gates_in_one_layer():
    arm = arms.pair("x", gated_layers=(1,), frozen_qkv=(0,))[0]
    before, after, _ = trained([arm, arm, arm])  # as many members as above: no further program
    for name, frozen in (("q", True), ("v", True), ("o", False)):
        was, now = (tree["layers"]["attention"][name]["kernel"] for tree in (before, after))
        assert np.array_equal(now[:, 0], was[:, 0]) is frozen
        assert not np.array_equal(now[:, 1], was[:, 1])
    was, now = (tree["layers"]["gate"]["q"]["kernel"] for tree in (before, after))
    np.testing.assert_array_equal(now[:, 0], was[:, 0])
    assert not np.array_equal(now[:, 1], was[:, 1])


def test_routers_of_experts_are_trained_only_where_learned():
    before, after, _ = trained([*arms.experts()])
    was, now = (tree["layers"]["router"]["kernel"] for tree in (before, after))
    assert not np.array_equal(now[:2], was[:2])
    np.testing.assert_array_equal(now[2:], was[2:])


def test_the_update_is_optax_adamw_with_clipping():
    rng = np.random.default_rng(0)
    params, gradients = ({name: rng.normal(size=shape).astype(np.float32) for name, shape in (("a", (3, 4)), ("b", 5))}
                         for _ in range(2))
    numbers = arm_training.arm_numbers(arms.soft_learned, cases.CONFIG, cases.RECIPE, 3)
    numbers = numbers._replace(trained={"a": 1.0, "b": 1.0}, decayed={"a": 1.0, "b": 1.0}, pace={"a": 1.0, "b": 1.0})
    r = cases.RECIPE
    chain = optax.chain(optax.clip_by_global_norm(r.clip),
                        optax.adamw(lambda count: arm_training.learning_rate(count, r), r.beta1, r.beta2,
                                    weight_decay=r.weight_decay))
    ours, adam = params, optax.scale_by_adam().init(params)
    theirs, state = params, chain.init(params)

    @jax.jit
    def both(step, ours, adam, theirs, state):
        changes, state = chain.update(gradients, state, theirs)
        return arm_training.update(step, ours, adam, gradients, numbers, r), optax.apply_updates(theirs, changes), state

    for step in range(3):
        (ours, adam, norm), theirs, state = both(jnp.asarray(step), ours, adam, theirs, state)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm, optax.tree.norm(gradients), rtol=1e-6)


def test_the_gate_and_the_model_have_rates_of_their_own():
    """A step from zero moments moves a leaf by its rate: twice as far at twice the rate."""
    config, recipe = cases.CONFIG, dataclasses.replace(cases.RECIPE, weight_decay=0.0)
    params = cases.params()
    gradients = jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def after(numbers):
        adam = optax.scale_by_adam().init(params)
        return arm_training.update(jnp.asarray(1), params, adam, gradients, numbers, recipe)[0]

    moved = []
    for arm in (arms.soft_learned, dataclasses.replace(arms.soft_learned, rate=2.0, gate_rate=0.5)):
        numbers = arm_training.arm_numbers(arm, config, recipe, 3)
        moved.append(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *jax.device_get((after(numbers), params))))
    map_with_path(lambda path, one, other: np.testing.assert_allclose(
        other / one, 0.5 if path.startswith("layers/gate") else 2.0, rtol=1e-3), *moved)


def test_learning_rate_rises_and_falls_to_zero():
    rates = [float(arm_training.learning_rate(jnp.asarray(step), cases.RECIPE)) for step in range(6)]
    np.testing.assert_allclose(rates[:2], [5e-3, 1e-2])
    assert rates[1] > rates[2] > rates[3] > rates[4] > rates[5] == 0.0
