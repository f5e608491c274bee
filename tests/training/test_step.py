"""One optimiser step: what moves, how micro-batches count, and what happens to numbers that are not finite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2a_jax.data.batch import Batch
from l2a_jax.models.params import stacked
from l2a_jax.models.transformer import hidden_states
from l2a_jax.nn import routing
from l2a_jax.training.diagnose import first_non_finite
from l2a_jax.training.loss import cross_entropy
from l2a_jax.training.memory import checkpoint_policy
from l2a_jax.training.optimizer import Dials, OptimizerConfig, make_optimizer
from l2a_jax.training.regimes import partition, regime_mask
from l2a_jax.training.step import Objective, compute_params, initial_state, split_params, train_step
from tests import compiler
from tests.models.cases import CONFIG, LAYERS, hidden, make_params, make_tokens, packed

LAYER = LAYERS["shared"]
OBJECTIVE = Objective(CONFIG, LAYER)
DIALS = Dials(1e-2, 1e-2, 20, penalty=0.5)


def make_batch(micro, seed=0, segments=True):
    """`micro` micro-batches of unequal token counts."""
    parts = []
    for index in range(micro):
        tokens = make_tokens(seed=seed + index)
        ids = packed() if segments and index % 2 == 0 else jnp.ones_like(tokens)
        weights = (ids != 0).astype(jnp.float32) * (jnp.arange(tokens.shape[1]) % (index + 2) > 0)
        parts.append(Batch(tokens, jnp.roll(tokens, -1, axis=1), weights, ids, None))
    return jax.tree.map(lambda *x: jnp.stack(x), *parts)


@functools.cache
def step_of(objective, rule):
    """One program for all runs that differ in numbers alone."""
    return jax.jit(functools.partial(train_step, objective=objective, optimizer=rule))


def set_up(regime="l2a_ft", objective=OBJECTIVE, params=None, **dials):
    params = make_params(objective.l2a_config) if params is None else params
    rule, dials = OptimizerConfig(regime), DIALS._replace(**dials)
    trainable, frozen = partition(params, regime_mask(params, regime))
    step = functools.partial(step_of(objective, rule), dials=dials)
    return params, initial_state(trainable, make_optimizer(rule, dials), jnp.float32), frozen, step


def test_frozen_leaves_stay_and_the_loss_falls():
    _, state, frozen, step = set_up()
    before = jax.tree.map(np.asarray, frozen)
    losses = []
    for _ in range(8):
        state, metrics = step(state, frozen, make_batch(1), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    assert losses[-1] < losses[0] - 0.1 and int(state.step) == 8


def read_beyond(ids, window, sinks):
    """Of each token, the keys of its document that are neither in its window nor sinks, one by one; [B, T]."""
    ids, found = np.asarray(ids), np.zeros(ids.shape)
    for row, at in np.argwhere(ids != 0):
        own = [key for key in range(at + 1) if ids[row, key] == ids[row, at]]
        found[row, at] = len(set(own) - set(own[-window:]) - set(own[:sinks]))
    return found


@pytest.mark.parametrize("cost", ["tokens", "keys"])
def test_accumulated_gradients_are_those_of_all_tokens_at_once(cost, monkeypatch):
    """Three micro-batches of different token counts against one loss written over all of them."""
    params, state, frozen, _ = set_up("full_ft")
    batch = make_batch(3)
    real = batch.segment_ids != 0
    assert len({int(w.sum()) for w in batch.weights}) == 3
    costs = np.ones(real.shape)
    if cost == "keys":
        costs = np.stack([read_beyond(ids, LAYER.window, LAYER.sinks) for ids in batch.segment_ids])
        costs *= real.sum() / costs.sum()
        assert 0 < (costs[real] == 0).sum() < real.sum() and costs.max() > 2

    def whole(params):
        def one(given):
            micro, costs = given
            states, routed = hidden_states(params, micro.tokens, CONFIG, LAYER, segment_ids=micro.segment_ids,
                                           train=True)
            nll = cross_entropy(params, states, micro.targets, micro.weights, CONFIG).nll
            return nll, jnp.sum(jnp.where(micro.segment_ids != 0, costs * routed.probabilities**2, 0.0))

        nll, squares = (sums.sum() for sums in jax.lax.map(one, (batch, costs)))
        return nll / batch.weights.sum() + 0.5 * squares / (CONFIG.num_layers * real.sum())

    # At step 1 of a ramp of 1 the penalty has its full weight.
    state = state._replace(step=jnp.asarray(1, jnp.int32))
    seen = {}

    def spy(updates, state, params=None):
        seen["gradients"] = updates
        return updates, state

    monkeypatch.setattr("l2a_jax.training.step.make_optimizer", lambda *_: optax.GradientTransformation(None, spy))
    step = functools.partial(train_step, dials=DIALS, objective=OBJECTIVE._replace(cost=cost),
                             optimizer=OptimizerConfig("full_ft"))
    found = jax.jit(lambda *given: (step(*given), seen["gradients"])[1])(
        state._replace(optimizer=optax.EmptyState()), frozen, batch, jax.random.key(0))
    expected = jax.jit(jax.grad(whole))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-3), found, expected)


def test_metrics_mean_what_they_say():
    _, state, frozen, step = set_up()
    batch = make_batch(2)
    _, metrics = step(state, frozen, batch, jax.random.key(0))
    real, unrouted = batch.segment_ids != 0, 0
    for index in range(2):
        _, routed = hidden(make_params(LAYER), batch.tokens[index], CONFIG, LAYER,
                           segment_ids=batch.segment_ids[index])
        unrouted += np.asarray(routing.sparsity(routed.decisions, real[index])) * real[index].sum()
    np.testing.assert_allclose(metrics["sparsity_per_layer"], unrouted / real.sum(), rtol=1e-5)
    assert int(metrics["tokens"]) == real.sum()


@pytest.mark.parametrize("leakage", [0.3, 1.0])
def test_rematerialisation_changes_no_gradient(leakage):
    layer = dataclasses.replace(LAYER, leakage=leakage)
    results = []
    for remat in (False, True):
        _, state, frozen, step = set_up(objective=OBJECTIVE._replace(l2a_config=layer, remat=remat))
        state, metrics = step(state, frozen, make_batch(2), jax.random.key(3))
        results.append((state.trainable, metrics["grad_norm"]))
    assert float(results[0][1]) == pytest.approx(float(results[1][1]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), results[0][0], results[1][0])


def test_bfloat16_compute_keeps_float32_masters_and_router():
    _, state, frozen, step = set_up(objective=OBJECTIVE._replace(dtype=jnp.bfloat16))
    state, metrics = step(state, frozen, make_batch(1), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.float32)}
    params = compute_params(state.trainable, {}, jnp.bfloat16)
    assert params["layers"]["router"]["kernel"].dtype == jnp.float32
    assert params["layers"]["attention"]["q"]["kernel"].dtype == jnp.bfloat16
    assert bool(metrics["healthy"])


def test_a_step_that_is_not_finite_is_withheld_and_so_is_every_later_one():
    _, state, frozen, step = set_up(lr=1e-3)
    state, _ = step(state, frozen, make_batch(1), jax.random.key(0))
    poisoned = make_batch(1)._replace(weights=np.full((1, 2, 24), np.inf, np.float32))
    after, metrics = step(state, frozen, poisoned, jax.random.key(0))
    assert not bool(metrics["healthy"]) and int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.trainable, state.trainable)
    later, metrics = step(after, frozen, make_batch(1), jax.random.key(0))
    assert not bool(metrics["healthy"])
    jax.tree.map(np.testing.assert_array_equal, later.trainable, state.trainable)


def test_the_diagnosis_names_the_parameter_the_layer_or_the_gradient():
    _, state, frozen, _ = set_up("router_only")
    batch, key = make_batch(1), jax.random.key(0)
    spoil = jax.tree.map(lambda x: x, frozen)
    spoil["layers"]["mlp"]["down"]["kernel"] = frozen["layers"]["mlp"]["down"]["kernel"].at[1, 0, 0].set(jnp.nan)
    said = first_non_finite(state.trainable, spoil, batch, key, OBJECTIVE)
    assert "layers/mlp/down/kernel of layer 1" in said
    spoil["layers"]["mlp"]["down"]["kernel"] = frozen["layers"]["mlp"]["down"]["kernel"].at[1].set(1e38)
    assert "after layer 1" in first_non_finite(state.trainable, spoil, batch, key, OBJECTIVE)


@pytest.mark.parametrize("regime", ["router_only", "l2a_ft", "full_ft"])
def test_an_unrolled_step_takes_frozen_layers_one_by_one(regime):
    """The same numbers, and no copy of the stack: what is stacked is taken apart again before anything runs."""
    config = dataclasses.replace(CONFIG, intermediate_size=40)  # no other leaf has this width
    objective = OBJECTIVE._replace(config=config, unroll=True, remat=checkpoint_policy("elementwise"), backend="xla")
    params, state, frozen, step = set_up(regime, objective, make_params(LAYER, config))
    trainable, apart = split_params(params, regime_mask(params, regime), True)
    jax.tree.map(np.testing.assert_array_equal, trainable, partition(params, regime_mask(params, regime))[0])
    jax.tree.map(np.testing.assert_array_equal, stacked(apart), frozen)
    batch, key = make_batch(1), jax.random.key(0)
    one_by_one = step.func.lower(state, apart, batch, key, **step.keywords).compile(compiler.AS_USERS)
    (one, _), (other, _) = step(state, frozen, batch, key), one_by_one(state, apart, batch, key, **step.keywords)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.trainable, other.trainable)
    text = one_by_one.as_text()
    shape = "f32[{},{},{}]".format(*params["layers"]["mlp"]["down"]["kernel"].shape)
    assert (shape in text) == (regime == "full_ft"), "a stack of frozen kernels was made"


@pytest.mark.parametrize("backend, layer, steps", [
    ("xla", "shared", 4), ("xla", "sequential", 4),
    *(pytest.param("pallas", name, 12, marks=pytest.mark.gpu, id=f"pallas-{name}") for name in LAYERS),
])
def test_training_with_the_kernels_is_training_with_the_reference(backend, layer, steps):
    """The same losses, step by step, unrolled and rematerialised as a GPU does it, in float32; leakage as the layer's
    preset has it, so the path that learns decisions from one backward pass is among them."""
    config = dataclasses.replace(LAYERS[layer], leakage=1.0 if LAYERS[layer].share_attention else 0.5)
    wide, losses = dataclasses.replace(CONFIG, head_dim=64), {}  # a width that the kernels have
    for name, mode in ((backend, "elementwise"), ("reference", "none")):
        objective = OBJECTIVE._replace(config=wide, l2a_config=config, backend=name, remat=checkpoint_policy(mode),
                                       unroll=mode != "none")
        _, state, frozen, step = set_up(objective=objective, params=make_params(config, wide), lr=1e-3, router_lr=1e-3)
        losses[name] = []
        # A GPU's default for products of float32 is TF32, with 11 bits: the two programs would differ by that.
        with jax.default_matmul_precision("highest"):
            for index in range(steps):
                state, metrics = step(state, frozen, make_batch(1, seed=index), jax.random.key(0))
                losses[name].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[backend], losses["reference"], rtol=1e-4)
