"""Saliency: what a decision is worth, the fit to it, and that one backward pass does both."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.attention.reference import segment_starts
from l2a_jax.errors import UserError
from l2a_jax.models.transformer import hidden_states, unembed
from l2a_jax.nn import routing
from l2a_jax.runs.plan import compile_run, make_plan
from l2a_jax.training import settings
from l2a_jax.training.memory import checkpoint_policy
from tests import compiler
from tests.models.cases import CONFIG, LAYERS, make_params
from tests.training.test_step import OBJECTIVE, make_batch, set_up

WARM = {"temperature": 5.0, "threshold": 0.6}
NAMES = ("shared", "shared post_local")


def literal(kernel, params, batch, layer, share, weight, key):
    """A step's fit in two passes: worth by moving the gate of every decision, then the loss of the logits."""
    params = {**params, "layers": {**params["layers"], "router": {"kernel": kernel}}}
    layers = CONFIG.num_layers
    price = weight * batch.weights.sum() / (layers * (batch.segment_ids != 0).sum())

    def one(given):
        index, micro = given
        decisions = routing.random(jax.random.fold_in(key, index), jnp.full(layers, share), *micro.tokens.shape)
        call = functools.partial(hidden_states, tokens=micro.tokens, config=CONFIG, l2a_config=layer,
                                 segment_ids=micro.segment_ids, decisions=decisions)

        def nll(nudge):
            hidden, _ = call(jax.lax.stop_gradient(params), nudge=nudge)
            log_p = jax.nn.log_softmax(unembed(params, hidden, CONFIG))
            picked = jnp.take_along_axis(log_p, micro.targets[..., None], axis=-1)[..., 0]
            return -jnp.sum(micro.weights * picked)

        gain = jnp.clip(-jax.grad(nll)(jnp.zeros(decisions.shape)) - price, -1, 1)
        _, routed = call(params)  # with decisions given, no router hears of another
        margin = routed.logits / layer.temperature - np.log(layer.threshold / (1 - layer.threshold))
        each, real = jnp.abs(gain) * jnp.log1p(jnp.exp(-jnp.sign(gain) * margin)), micro.segment_ids != 0
        return jnp.sum(jnp.where(real, each, 0.0)), jnp.sum(jnp.where(real, jnp.abs(gain), 0.0))

    losses, weights = jax.lax.map(one, (jnp.arange(len(batch.tokens)), batch))
    return losses.sum() / jax.lax.stop_gradient(weights.sum())


# One compilation a layer.
_literal = jax.jit(jax.value_and_grad(literal), static_argnames="layer")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("share", "unroll", "remat"), [(1.0, False, False), (0.4, False, True),
                                                       (0.4, True, checkpoint_policy("elementwise"))])
def test_a_step_takes_the_gradient_of_the_fit(name, share, unroll, remat):
    """In one backward pass, over three micro-batches of unequal token counts."""
    layer = dataclasses.replace(LAYERS[name], **WARM)
    objective = OBJECTIVE._replace(l2a_config=layer, minimised="saliency", unroll=unroll, remat=remat)
    params, state, frozen, step = set_up("router_strict", objective, make_params(layer), saliency_share=share)
    batch, key = make_batch(3), jax.random.key(7)
    state = state._replace(step=jnp.asarray(1, jnp.int32))  # where the price has its full weight
    updated, metrics = step(state, frozen, batch, key)
    value, wanted = _literal(params["layers"]["router"]["kernel"], params, batch, layer=layer, share=share, weight=0.5,
                             key=jax.random.fold_in(key, 1))
    assert float(metrics["saliency"]) == pytest.approx(float(value), rel=1e-4)
    assert float(metrics["grad_norm"]) == pytest.approx(float(jnp.linalg.norm(wanted)), rel=1e-3)
    # The first update of Adam goes against the sign of each gradient.
    moved = updated.trainable["layers"]["router"]["kernel"] - state.trainable["layers"]["router"]["kernel"]
    clear = np.abs(wanted) > 1e-3 * np.abs(wanted).max()
    assert (np.sign(moved) == -np.sign(wanted))[clear].all() and clear.mean() > 0.9
    assert bool(metrics["healthy"]) and "weights" not in metrics


def test_the_fit_reaches_the_router_alone_and_leaves_the_worth_as_it_is():
    layer = dataclasses.replace(LAYERS["shared"], **WARM)
    params, batch = make_params(layer), jax.tree.map(lambda x: x[0], make_batch(1))
    shape = (CONFIG.num_layers, *batch.tokens.shape)
    cotangent = jax.random.normal(jax.random.key(1), (*batch.tokens.shape, CONFIG.hidden_size))

    def loss(params, nudge, price):
        hidden, routed = hidden_states(params, batch.tokens, CONFIG, layer, segment_ids=batch.segment_ids, nudge=nudge,
                                       price=price, decisions=jnp.ones(shape, bool))
        return jnp.sum(hidden * cotangent), routed.logits

    # Two programs that must round alike.
    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True), compiler_options=compiler.AS_USERS)
    plain, fitted = (gradient(params, jnp.zeros(shape), price)[0] for price in (None, jnp.full(shape, 0.3)))
    np.testing.assert_allclose(fitted[1], plain[1], atol=1e-5)
    kernels = [gradients["layers"].pop("router")["kernel"] for gradients, _ in (plain, fitted)]
    assert (kernels[0] == 0).all() and np.abs(kernels[1]).min(axis=1).max() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain[0], fitted[0])
    # Where a window covers the past, and at padding, a decision is worth nothing.
    within = np.arange(shape[2]) - np.asarray(segment_starts(batch.segment_ids, shape[1:])) < layer.window
    real = np.asarray(batch.segment_ids) != 0
    np.testing.assert_allclose(np.where(within | ~real, fitted[1], 0), 0, atol=1e-5)


def test_the_margin_that_fits_best_is_positive_where_the_mean_gain_is():
    """Of many noisy gains that the router cannot tell apart, most below zero but a few far above."""
    rng = np.random.default_rng(0)
    for mean in (-0.05, 0.05):
        gains = np.where(rng.random(4_000) < 0.1, 0.9, -0.1 + mean).astype(np.float32)
        gains -= gains.mean() - mean
        margins = np.linspace(-3, 3, 601)
        best = margins[np.argmin(routing.fit_loss(*jnp.broadcast_arrays(gains, margins[:, None])).mean(axis=1))]
        want = np.log(gains[gains > 0].sum() / -gains[gains < 0].sum())
        assert best == pytest.approx(want, abs=0.02) and (best > 0) == (mean > 0)
    found = routing.advantage(jnp.asarray([5.0, -5.0, 0.25]), jnp.full(3, 0.125))
    np.testing.assert_array_equal(found, [1.0, -1.0, 0.125])


def test_worth_at_random_decisions_is_a_number_of_the_step():
    run = compile_run(make_plan(settings.resolve("router_strict", {"objective": "saliency", "saliency_share": 0.5})))
    assert run.dials.saliency_share == np.float32(0.5) and run.objective.minimised == "saliency"


def test_a_fit_needs_a_router_alone_and_a_shared_layer():
    for regime, given in (("router_only", {}), ("router_strict", {"share_attention": False})):
        with pytest.raises(UserError, match=r"--objective saliency .*expected --"):
            make_plan(settings.resolve(regime, {"objective": "saliency", **given}))
    with pytest.raises(ValueError, match="a price is for what a nudge finds"):
        params, batch = make_params(LAYERS["shared"]), jax.tree.map(lambda x: x[0], make_batch(1))
        hidden_states(params, batch.tokens, CONFIG, LAYERS["shared"], price=jnp.zeros((3, 2, 24)))
