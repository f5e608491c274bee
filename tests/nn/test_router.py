"""A router that sees more than the stream, or has hidden units: its formula, its start, and packed rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax import attention
from l2a_jax.attention.reference import segment_starts, take
from l2a_jax.config import MODELS, L2AConfig
from l2a_jax.errors import UserError
from l2a_jax.models import layer as layer_module
from l2a_jax.models.layer import Attention, context_of
from l2a_jax.models.params import abstract_params, add_routing, by_path, init_params
from l2a_jax.nn import router
from l2a_jax.nn.layers import rms_norm
from l2a_jax.training.regimes import count_parameters, regime_mask
from l2a_jax.training.settings import adapt_layer
from tests.models.cases import CONFIG, LAYERS, hidden, make_params, make_tokens, packed

MORE = dataclasses.replace(LAYERS["shared"], router_sees=("position",), router_hidden=3)
ALL = dataclasses.replace(LAYERS["shared"], router_sees=("sink", "position", "lse"), router_hidden=3)


def one_layer(layer=MORE):
    """The router's leaves in one layer, an input and its signals."""
    leaves = jax.tree.map(lambda leaf: leaf[1], make_params(layer)["layers"]["router"])
    h = jax.random.normal(jax.random.key(2), (2, 24, CONFIG.hidden_size))
    return leaves, h, router.signals(layer.router_sees, jnp.tile(jnp.arange(24), (2, 1)), layer.window)


def test_the_signal_of_position_is_the_log_of_the_past_in_windows():
    found = router.signals(("position",), jnp.array([[0, 4, 9, 19, 10**9]]), 5)
    np.testing.assert_allclose(found[0, :, 0], [0, 0, np.log(2), np.log(4), np.log(1024)], rtol=1e-6)
    assert router.signals((), jnp.zeros((1, 1), int), 5) is None


def test_logits_and_gradients_are_the_formulas():
    leaves, h, seen = one_layer()
    cotangent = jax.random.normal(jax.random.key(3), h.shape[:2])
    z, gradient = jax.jit(jax.value_and_grad(
        lambda leaves: jnp.sum(router.logits(h, seen, leaves) * cotangent)))(leaves)
    w, u, hid = leaves["kernel"], leaves["signals"], jax.tree.map(lambda x: np.asarray(x, np.float64), leaves["hidden"])
    h, s, g = (np.asarray(x, np.float64) for x in (h, seen, cotangent))
    units = h @ hid["kernel"] + s @ hid["signals"] + hid["bias"]
    sigmoid = 1 / (1 + np.exp(-units))
    expected = h @ np.asarray(w) + s @ np.asarray(u) + (units * sigmoid) @ hid["out"]
    np.testing.assert_allclose(z, np.sum(expected * g), rtol=1e-5)
    pull = g[..., None] * hid["out"] * sigmoid * (1 + units * (1 - sigmoid))
    for path, want in {"kernel": np.einsum("btd,bt->d", h, g), "signals": np.einsum("bts,bt->s", s, g),
                       "hidden/out": np.einsum("btn,bt->n", units * sigmoid, g), "hidden/bias": pull.sum((0, 1)),
                       "hidden/kernel": np.einsum("btd,btn->dn", h, pull),
                       "hidden/signals": np.einsum("bts,btn->sn", s, pull)}.items():
        np.testing.assert_allclose(by_path(gradient)[path], want, rtol=1e-4, atol=1e-4, err_msg=path)


def test_everything_is_routed_at_first_and_every_unit_differs():
    params = add_routing(init_params(CONFIG, jax.random.key(0)), CONFIG, MORE)
    _, routed = hidden(params, make_tokens(), CONFIG, MORE, backend="reference")
    assert bool(routed.decisions.all()) and not np.asarray(routed.logits).any()
    units = params["layers"]["router"]["hidden"]["kernel"]
    assert len(np.unique(units)) == units.size


def test_a_document_in_a_packed_row_sees_its_own_past():
    params, tokens, ids = make_params(ALL), make_tokens(), packed()
    _, together = hidden(params, tokens, CONFIG, ALL, segment_ids=ids, backend="reference")
    _, alone = hidden(params, tokens[1:, 15:], CONFIG, ALL, backend="reference")
    np.testing.assert_allclose(together.logits[:, 1, 15:], alone.logits[:, 0], atol=2e-5)
    assert np.isfinite(together.logits).all()


def literal_scores(q, k, window, sinks, starts):
    """(lse less ln(keys), mass on the sinks) [B, T, N], one row and head at a time; `starts`: of each token's document
    (None: it is padding)."""
    lse, mass = np.full(q.shape[:3], np.nan), np.full(q.shape[:3], np.nan)
    for b, t, n in np.ndindex(q.shape[:3]):
        if starts[b, t] is not None:
            keys = [j for j in range(starts[b, t], t + 1) if t - j < window or j < starts[b, t] + sinks]
            weights = {j: np.exp(float(k[b, j, n * k.shape[2] // q.shape[2]] @ q[b, t, n]) / q.shape[3] ** 0.5)
                       for j in keys}
            total = sum(weights.values())
            lse[b, t, n] = np.log(total / len(keys))
            mass[b, t, n] = sum(w for j, w in weights.items() if j < starts[b, t] + sinks) / total
    return lse, mass


def first_layers_heads(params, tokens, ids, layer):
    """q and k of the first layer, as the model makes them."""
    positions = jnp.arange(24)[None] - segment_starts(ids, tokens.shape)
    context = context_of(CONFIG, layer, positions, ids != 0, Attention(layer, ids, "xla"))
    first = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    x = rms_norm(params["embed"]["embedding"][tokens], first["norm_attention"], CONFIG.rms_norm_eps)
    q, k, _ = layer_module._qkv(x, first["attention"], context)
    return first, (q, k)


@pytest.mark.parametrize("how", ["pre", "post_local", "train"])
def test_a_router_sees_the_scores_of_local_attention(how):
    """The first layer's logits against signals written out, in packed rows."""
    layer = dataclasses.replace(ALL, router_input="pre" if how == "train" else how, router_hidden=0)
    params, tokens, ids = make_params(layer), make_tokens(), packed()
    first, heads = jax.jit(first_layers_heads, static_argnums=3)(params, tokens, ids, layer)
    heads = [np.asarray(of, np.float64) for of in heads]
    starts = np.where(ids != 0, segment_starts(ids, tokens.shape), None)
    lse, mass = literal_scores(*heads, layer.window, layer.sinks, starts)
    position = np.log(np.maximum(1, (np.arange(24) - segment_starts(ids, tokens.shape) + 1) / layer.window))
    seen = np.concatenate([mass, position[..., None], np.arcsinh(lse)], axis=-1)
    _, routed = hidden(params, tokens, CONFIG, layer, segment_ids=ids, backend="xla", train=how == "train")
    without = dataclasses.replace(layer, router_sees=())
    stripped = {**params, "layers": {**params["layers"], "router": {"kernel": params["layers"]["router"]["kernel"]}}}
    _, plain = hidden(stripped, tokens, CONFIG, without, segment_ids=ids, backend="xla")
    real = np.asarray(ids != 0)
    np.testing.assert_allclose((routed.logits[0] - plain.logits[0])[real],
                               (seen @ np.asarray(first["router"]["signals"]))[real], atol=1e-5)


def test_the_scores_of_a_decode_step_are_those_of_the_row():
    """One token over the keys that it sees, in any order."""
    q, k = (jax.random.normal(jax.random.key(i), (2, 24, heads, 8)) for i, heads in enumerate((4, 2)))
    slots = jnp.array([[21, 1, 7, 20, 0, 23, 22, 19]] * 2)

    @jax.jit
    def both(q, k):
        _, lse = attention.local_with_lse(q, k, k, window=5, sinks=2, backend="reference")
        return (router.scores_of(q, k, lse, None, 2),
                router.scores_over(q[:, 23], take(k, slots), slots != 7, slots < 2))

    row, step = both(q, k)
    np.testing.assert_allclose(step.lse[:, 0], row.lse[:, 23], atol=1e-5)
    np.testing.assert_allclose(step.sink[:, 0], row.sink[:, 23], atol=1e-5)


@pytest.mark.parametrize(("sees", "units", "router_only"), [((), 0, 21_504), (("position",), 0, 21_528),
                                                            ((), 2, 64_608), (("position",), 2, 64_680),
                                                            (("position", "lse", "sink"), 0, 22_200),
                                                            (("position", "lse", "sink"), 1, 44_448)])
def test_parameters_at_half_a_billion(sees, units, router_only):
    layer = L2AConfig(router_sees=sees, router_hidden=units)
    shapes = abstract_params(MODELS["qwen2.5-0.5b"], layer, jnp.bfloat16)
    assert count_parameters(shapes, regime_mask(shapes, "router_strict")) == router_only
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes["layers"]["router"]))


def test_what_a_router_is_made_of_is_its_sources():
    with pytest.raises(UserError, match=r"^--router-hidden is 3, but RUN was trained with 0"):
        adapt_layer(LAYERS["shared"], {"router_hidden": 3}, "RUN")
    with pytest.raises(ValueError, match=r"router_sees is .*expected a list, each one of position"):
        L2AConfig(router_sees=("stars",))
    with pytest.raises(ValueError, match=r"router_sees names sink, the mass on the sinks, and sinks is 0"):
        L2AConfig(router_sees=("sink",), sinks=0)
    with pytest.raises(ValueError, match=r"router_sees is position, position; expected each signal once"):
        L2AConfig(router_sees=("position", "position"))
