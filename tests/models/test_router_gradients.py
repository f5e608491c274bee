"""The gradient of a decision: the inner product it should be, and exactly zero where nothing was computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from l2a_jax.attention.reference import segment_starts
from l2a_jax.models import layer as l2a
from l2a_jax.models.transformer import hidden_states
from l2a_jax.nn import routing
from l2a_jax.training.memory import checkpoint_policy
from l2a_jax.training.tables import KEPT
from tests.models.cases import CONFIG, LAYERS, hidden, make_params, make_tokens, packed

# So warm that no sigmoid saturates: at 0.1 a sure token's p (1 - p) is exactly 0 in float32, and proves nothing.
WARM = 5.0


def informed(layer, length, starts=0):
    """Tokens whose window and sinks do not cover their whole past: with shared attention both paths see the same keys
    before that, and a decision that changes nothing has no gradient."""
    reach = layer.window + layer.sinks if layer.share_attention else 0
    return np.arange(length) - starts >= reach


def cotangent(tokens):
    return jax.random.normal(jax.random.key(9), (*tokens.shape, CONFIG.hidden_size))


def loss_of_shifts(shift, params, tokens, key, segment_ids, layer, remat):
    """A loss of zeros that are added to the router logits of every layer and token; and the routing."""
    original = routing.router_logits

    def shifted(h, kernel):
        # The kernel carries its layer's shift behind its own D numbers, so that the scan hands it over.
        return original(h, kernel[: CONFIG.hidden_size]) + kernel[CONFIG.hidden_size :].reshape(tokens.shape)

    kernel = jnp.concatenate([params["layers"]["router"]["kernel"], shift.reshape(CONFIG.num_layers, -1)], axis=1)
    changed = {**params, "layers": {**params["layers"], "router": {"kernel": kernel}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(l2a.routing, "router_logits", shifted)
        hidden, routed = hidden_states(changed, tokens, CONFIG, layer, train=True, key=key, remat=remat,
                                       backend="reference", segment_ids=segment_ids)
    return jnp.sum(hidden * cotangent(tokens)), routed


def loss_of_nudges(nudge, params, tokens, segment_ids, layer):
    hidden, routed = hidden_states(params, tokens, CONFIG, layer, nudge=nudge, segment_ids=segment_ids,
                                   backend="reference")
    return jnp.sum(hidden * cotangent(tokens)), routed


# One compilation a layer, shared by the tests: what they differ in is given as numbers.
_of_shifts = jax.jit(jax.grad(loss_of_shifts, has_aux=True), static_argnames=("layer", "remat"))
_of_nudges = jax.jit(jax.grad(loss_of_nudges, has_aux=True), static_argnames="layer")


@functools.partial(jax.jit, static_argnames="layer")
def _of_draws(keys, params, tokens, layer):
    """The gradients of `_of_shifts`, a draw a key: one program runs them all, one after the other."""
    zeros = jnp.zeros((CONFIG.num_layers, *tokens.shape))
    return jax.lax.map(lambda key: _of_shifts(zeros, params, tokens, key, None, layer=layer, remat=False)[0], keys)


def logit_gradients(params, tokens, layer, key=None, segment_ids=None, remat=False):
    """d loss / d z for every layer and token, and the routing."""
    zeros = jnp.zeros((CONFIG.num_layers, *tokens.shape))
    return jax.tree.map(np.asarray, _of_shifts(zeros, params, tokens, key, segment_ids, layer=layer, remat=remat))


@pytest.mark.parametrize("name", LAYERS)
def test_unrouted_tokens_get_exactly_nothing_without_leakage(name):
    layer = dataclasses.replace(LAYERS[name], leakage=0.0, temperature=WARM)
    gradient, routed = logit_gradients(make_params(layer), make_tokens(), layer)
    decisions = routed.decisions
    last = CONFIG.num_layers - 1  # in the last layer only the decision itself carries a gradient
    assert 0 < decisions[last].sum() < decisions[last].size
    assert (gradient[~decisions] == 0).all()
    chosen = decisions[last] & informed(layer, decisions.shape[2])
    assert chosen.any() and (gradient[last][chosen] != 0).all()


@pytest.mark.parametrize("name", LAYERS)
def test_leakage_one_gives_every_token_the_dense_gradient(name):
    """The dense gradient of the last layer's decision: <g, y(d=1) - y(d=0)> p(1-p)/temperature, by forcing both.

    Downstream of the last layer's attention only the MLP and the final norm are nonlinear, so a directional
    derivative along y(1) - y(0) at the learned decision is the exact value.
    """
    layer = dataclasses.replace(LAYERS[name], leakage=1.0, temperature=WARM)
    params, tokens, last = make_params(layer), make_tokens(), CONFIG.num_layers - 1
    gradient, routed = logit_gradients(params, tokens, layer, segment_ids=jnp.ones(tokens.shape, jnp.int32))
    assert (gradient[:, :, informed(layer, tokens.shape[1])] != 0).all()

    def with_gates(gates, params, probabilities):
        """The last layer with soft gates: d~ a + (1 - d~) s is linear in them."""
        original = routing.straight_through

        def soft(d, p, computed):
            is_last = jnp.allclose(p, probabilities, atol=1e-5)
            return jnp.where(is_last, gates, jax.lax.stop_gradient(original(d, p, computed)))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(l2a.routing, "straight_through", soft)
            hidden, _ = hidden_states(params, tokens, CONFIG, layer, train=True, backend="reference")
        return jnp.sum(hidden * cotangent(tokens))

    p = routed.probabilities[last]
    slope = jax.jit(jax.grad(with_gates))(jnp.asarray(routed.decisions[last], jnp.float32), params, p)
    expected = np.asarray(slope) * p * (1 - p) / layer.temperature
    np.testing.assert_allclose(gradient[last], expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["sequential", "parallel", "shared"])
def test_leakage_draws_one_coin_a_layer_and_the_same_under_remat(name):
    layer = dataclasses.replace(LAYERS[name], leakage=0.5, temperature=WARM)
    params, tokens = make_params(layer), make_tokens()
    one_document = jnp.ones(tokens.shape, jnp.int32)
    dense, _ = logit_gradients(params, tokens, dataclasses.replace(layer, leakage=1.0), segment_ids=one_document)
    seen = set()
    for seed in range(6):
        plain, routed = logit_gradients(params, tokens, layer, jax.random.key(seed))
        again, _ = logit_gradients(params, tokens, layer, jax.random.key(seed), remat=True)
        decisions = routed.decisions
        np.testing.assert_allclose(plain, again, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(plain == 0, again == 0)
        leaked = [bool((plain[i][~decisions[i]] != 0).any()) for i in range(CONFIG.num_layers)]
        for index, leak in enumerate(leaked):  # a layer leaks for all of its tokens or for none
            assert (plain[index][~decisions[index] & informed(layer, tokens.shape[1])] != 0).all() == leak
        seen.add(tuple(leaked))
        if leaked[-1]:
            np.testing.assert_allclose(plain[-1], dense[-1], rtol=1e-3, atol=1e-5)
    assert len(seen) > 2


@pytest.mark.parametrize("by", ["uniform", "unsure"])
@pytest.mark.parametrize("name", ["sequential", "parallel", "shared", "shared post_local"])
def test_exploration_is_leakage_one_in_expectation(name, by):
    """In the last layer draw by draw: the dense gradient, over the chance of the row. In all layers on average."""
    layer = dataclasses.replace(LAYERS[name], leakage=0.0, explore=0.4, explore_by=by, temperature=WARM)
    params, tokens, draws = make_params(layer), make_tokens(), 150
    dense, routed = logit_gradients(params, tokens, dataclasses.replace(LAYERS[name], leakage=1.0, temperature=WARM),
                                    segment_ids=jnp.ones(tokens.shape, jnp.int32))
    decisions = routed.decisions
    slope = np.where(~decisions, routed.probabilities * (1 - routed.probabilities), 0)
    share = {"uniform": 1.0, "unsure": slope * ((~decisions).sum((1, 2)) / slope.sum((1, 2)))[:, None, None]}[by]
    chance = np.where(decisions, 1, np.minimum(1, 0.4 * share))
    found = np.asarray(_of_draws(jax.vmap(jax.random.key)(jnp.arange(draws)), params, tokens, layer=layer))
    local = ~decisions[-1] & informed(layer, tokens.shape[1])
    last, drawn = found[:, -1], found[:, -1] != 0
    np.testing.assert_allclose(last[drawn], (dense / chance)[-1][None].repeat(draws, 0)[drawn], rtol=2e-3, atol=1e-5)
    error = np.sqrt(chance[-1] * (1 - chance[-1]) / draws)
    assert local.any() and (np.abs(drawn.mean(0) - chance[-1]) <= 5 * error)[local].all()
    assert (np.abs(found.mean(0) - dense) <= 5.5 * found.std(0) / draws**0.5 + 1e-4 + 2e-3 * np.abs(dense)).all()


def test_exploration_is_the_same_under_remat_and_spares_padding():
    layer = dataclasses.replace(LAYERS["shared"], leakage=0.0, explore=0.5, explore_by="unsure", temperature=WARM)
    params, tokens, ids = make_params(layer), make_tokens(), packed()
    kept, recomputed = (logit_gradients(params, tokens, layer, jax.random.key(3), ids, remat)[0]
                        for remat in (False, True))
    np.testing.assert_allclose(kept, recomputed, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(kept == 0, recomputed == 0)
    assert (kept[:, np.asarray(ids) == 0] == 0).all() and (kept[:, np.asarray(ids) > 0] != 0).any()


def test_exploration_and_leakage_are_two_ways():
    with pytest.raises(ValueError, match=r"explore 0\.1 and leakage 1 both choose rows to compute"):
        dataclasses.replace(LAYERS["shared"], explore=0.1)
    with pytest.raises(ValueError, match=r"explore 0\.1 draws at random: give a key"):
        layer = dataclasses.replace(LAYERS["shared"], leakage=0.0, explore=0.1)
        hidden_states(make_params(layer), make_tokens(), CONFIG, layer, train=True, backend="reference")


def test_rows_without_global_attention_pull_on_nothing_in_packed_rows():
    layer, ids = dataclasses.replace(LAYERS["shared"], leakage=1.0, temperature=WARM), packed()
    gradient, _ = logit_gradients(make_params(layer), make_tokens(), layer, segment_ids=ids)
    padding = np.broadcast_to(np.asarray(ids == 0), gradient.shape)
    far = ~padding[-1] & informed(layer, ids.shape[1], np.asarray(segment_starts(ids, ids.shape)))
    assert (gradient[padding] == 0).all() and far.any() and (gradient[-1][far] != 0).all()


def calls(jaxpr, name):
    """How often a program calls a primitive, a scan's as often as it goes round."""
    return sum((equation.primitive.name == name) + equation.params.get("length", 1) * sum(
        calls(inner, name) for inner in core.jaxprs_in_params(equation.params)) for equation in jaxpr.eqns)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("mode", [True, *KEPT, "none"])
@pytest.mark.parametrize("name", ["shared", "sequential"])
def test_a_decision_is_made_once_whatever_is_rematerialised(name, mode, unroll, monkeypatch):
    """A second computation may round otherwise, and give the backward pass other rows than the forward pass had."""
    layer = dataclasses.replace(LAYERS[name], leakage=0.5)
    params, tokens, decide = make_params(layer), make_tokens(), routing.decide

    def marked(z, temperature, threshold):
        d = decide(z, temperature, threshold)
        return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(d.shape, d.dtype), d)

    monkeypatch.setattr(routing, "decide", marked)

    def loss(params):
        hidden, _ = hidden_states(params, tokens, CONFIG, layer, train=True, key=jax.random.key(0), unroll=unroll,
                                  remat=mode if mode is True else checkpoint_policy(mode), backend="xla")
        return jnp.sum(hidden * jnp.sin(jnp.arange(hidden.size)).reshape(hidden.shape))

    assert calls(jax.make_jaxpr(jax.grad(loss))(params).jaxpr, "pure_callback") == CONFIG.num_layers


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("trained", [True, False])
def test_a_nudge_has_the_gradient_of_every_decision(name, trained):
    """d loss / d z of dense training is d loss / d nudge times the sigmoid's slope. Training goes on through the later
    routers too, a nudge holds their decisions: so in the last layer, or in all where routers are zero and see nothing.
    """
    layer = dataclasses.replace(LAYERS[name], leakage=1.0, temperature=WARM)
    params, tokens, segments = make_params(layer), make_tokens(), packed()
    if not trained:
        kernel = jnp.zeros_like(params["layers"]["router"]["kernel"])
        params = {**params, "layers": {**params["layers"], "router": {"kernel": kernel}}}
    want, expected = logit_gradients(params, tokens, layer, segment_ids=segments)
    gradient, routed = _of_nudges(jnp.zeros(want.shape), params, tokens, segments, layer=layer)
    np.testing.assert_array_equal(routed.decisions, expected.decisions)
    first = CONFIG.num_layers - 1 if trained else 0
    slope = routed.probabilities * (1 - routed.probabilities) / WARM
    np.testing.assert_allclose((gradient * slope)[first:], want[first:], atol=1e-4, rtol=1e-3)
    assert np.abs(want[first:]).max() > 0.1 and (gradient[:, np.asarray(segments) == 0] == 0).all()


@pytest.mark.parametrize("name", LAYERS)
def test_a_nudge_of_zero_changes_nothing(name):
    params, tokens = make_params(LAYERS[name]), make_tokens()
    forced = routing.random(jax.random.key(4), [0.2, 0.5, 0.9], *tokens.shape)
    ours, theirs = (hidden(params, tokens, CONFIG, LAYERS[name], decisions=forced, nudge=nudge)[0]
                    for nudge in (jnp.zeros(forced.shape), None))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
