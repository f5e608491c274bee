"""The layer against its definition, written out row by row, for every wiring and for given decisions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.models.params import add_routing
from l2a_jax.models.transformer import forward
from l2a_jax.nn.layers import gated_mlp, rms_norm
from l2a_jax.nn.rope import apply_rope, rope_table
from tests.models.cases import CONFIG, LAYERS, hidden, make_params, make_tokens


def softmax_rows(q, k, v, visible):
    """Attention of one sequence, one row and head at a time, in float64; `visible` is of each row, or head and row."""
    visible = np.broadcast_to(visible, (q.shape[1], *visible.shape[-2:]))
    out = np.zeros(q.shape)
    for t in range(q.shape[0]):
        for head in range(q.shape[1]):
            keys = np.flatnonzero(visible[head, t])
            if keys.size:
                group = head // (q.shape[1] // k.shape[1])
                scores = k[keys, group] @ q[t, head] / np.sqrt(q.shape[2])
                weights = np.exp(scores - scores.max())
                out[t, head] = weights @ v[keys, group] / weights.sum()
    return out


def oracle(params, tokens, config, layer, decisions, heads=None):
    """The forward pass of DESIGN.md for one sequence, decisions given, without any of the library's attention. `heads`:
    key/value heads [L, K] that see everything (shared layers)."""
    length = tokens.shape[1]
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    causal = j <= i
    near = causal & ((i - j < layer.window) | (j < layer.sinks))
    scaling = layer.rope or config.rope
    table = rope_table(jnp.arange(length)[None], config, scaling)
    x = np.asarray(params["embed"]["embedding"])[np.asarray(tokens)]

    def norm(x, p):
        return np.asarray(rms_norm(jnp.asarray(x, jnp.float32), p, config.rms_norm_eps))

    def attend(h, p, visible):
        def heads(name, n):
            flat = jnp.asarray(h) @ p[name]["kernel"] + p[name]["bias"]
            return flat.reshape(1, length, n, config.head_dim)

        q, k = apply_rope(heads("q", config.num_heads), table), apply_rope(heads("k", config.num_kv_heads), table)
        rows = softmax_rows(*(np.asarray(part[0], np.float64) for part in (q, k, heads("v", config.num_kv_heads))),
                            visible)
        return (rows.reshape(length, -1) @ np.asarray(p["o"]["kernel"], np.float64))[None]

    for index in range(config.num_layers):
        p = jax.tree.map(lambda leaf: leaf[index], params["layers"])  # noqa: B023
        d = np.asarray(decisions[index])[..., None]
        shared = layer.share_attention
        local_set, global_set = (p["attention"],) * 2 if shared else (p["attention_local"], p["attention_global"])
        local_norm, global_norm = (p["norm_attention"],) * 2 if shared else (p["norm_local"], p["norm_global"])
        if heads is not None:
            opened = np.repeat(np.asarray(heads[index]), config.num_heads // config.num_kv_heads)[:, None, None]
            y = x + attend(norm(x, local_norm), local_set, np.where(opened | (d[0] > 0)[None], causal, near))
        elif layer.topology == "sequential":
            u = x + attend(norm(x, local_norm), local_set, near)
            y = u + d * attend(norm(u, global_norm), global_set, causal)
        else:
            y = (x + d * attend(norm(x, global_norm), global_set, causal)
                 + (1 - d) * attend(norm(x, local_norm), local_set, near))
        x = y + np.asarray(gated_mlp(jnp.asarray(norm(y, p["norm_mlp"])), p["mlp"]))
    return norm(x, params["norm_final"])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_forced_decisions_give_the_definition(name, rate):
    layer, params, tokens = LAYERS[name], make_params(LAYERS[name]), make_tokens(1, 17)
    decisions = jax.random.bernoulli(jax.random.key(3), rate, (CONFIG.num_layers, 1, 17))
    ours, routing = hidden(params, tokens, CONFIG, layer, decisions=decisions, backend="reference")
    np.testing.assert_allclose(ours, oracle(params, tokens, CONFIG, layer, decisions), atol=2e-4, rtol=1e-3)
    np.testing.assert_array_equal(routing.decisions, decisions)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("leakage", [0.0, 0.5])
def test_training_inference_and_forcing_compute_the_same_values(name, leakage):
    """Leakage and the straight-through gate change gradients, never values."""
    layer = dataclasses.replace(LAYERS[name], leakage=leakage)
    params, tokens = make_params(layer), make_tokens()
    learned, routing = hidden(params, tokens, CONFIG, layer)
    training, again = hidden(params, tokens, CONFIG, layer, train=True, key=jax.random.key(5))
    forced, _ = hidden(params, tokens, CONFIG, layer, decisions=routing.decisions)
    assert 0 < routing.decisions.mean() < 1
    np.testing.assert_array_equal(again.decisions, routing.decisions)
    np.testing.assert_allclose(training, learned, atol=2e-4)
    np.testing.assert_allclose(forced, learned, atol=2e-4)


@pytest.mark.parametrize("name", ["parallel", "shared", "shared post_local"])
def test_parallel_with_everything_routed_is_the_plain_model(name):
    """The parallel topology is function-preserving: z starts at 0, so every token is routed."""
    plain = make_params(None)
    tokens = make_tokens()
    routed = forward(add_routing(plain, CONFIG, LAYERS[name]), tokens, CONFIG, LAYERS[name], backend="reference")
    np.testing.assert_allclose(routed.logits, forward(plain, tokens, CONFIG, backend="reference").logits, atol=1e-4)
    assert bool(routed.routing.decisions.all())


def test_pruned_layers_never_route():
    layer = dataclasses.replace(LAYERS["shared"], pruned_layers=(1,))
    params, tokens = make_params(layer), make_tokens()
    out = forward(params, tokens, CONFIG, layer, backend="reference")
    assert not bool(out.routing.decisions[1].any()) and bool(out.routing.decisions[0].any())
    same = forward(params, tokens, CONFIG, LAYERS["shared"], decisions=out.routing.decisions, backend="reference")
    np.testing.assert_allclose(out.logits, same.logits, atol=1e-4)
    with pytest.raises(ValueError, match="do not exist"):
        forward(params, tokens, CONFIG, dataclasses.replace(layer, pruned_layers=(3,)))
    as_numbers, _ = jax.jit(forward, static_argnums=(2, 3))(
        params, tokens, CONFIG, dataclasses.replace(layer, pruned_layers=()), pruned=np.array([False, True, False]))
    np.testing.assert_allclose(as_numbers, forward(params, tokens, CONFIG, layer).logits, atol=1e-5)
