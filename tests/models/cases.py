"""Small models of every wiring, with weights big enough that every path matters."""

import dataclasses

import jax
import jax.numpy as jnp

from l2a_jax.config import L2AConfig, ModelConfig, RopeScaling
from l2a_jax.models.params import add_routing, by_path, init_params, map_with_path, param_shapes
from l2a_jax.models.transformer import hidden_states

CONFIG = ModelConfig(61, 32, 48, 3, 6, 2, 8, rope_theta=10_000.0, max_positions=128)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)

LAYERS = {
    "sequential": L2AConfig(window=5, sinks=0, topology="sequential", share_attention=False),
    "sequential sinks": L2AConfig(window=4, sinks=2, topology="sequential", share_attention=False,
                                  rope=RopeScaling("theta", 5)),
    "parallel": L2AConfig(window=5, sinks=1, share_attention=False),
    "parallel post_local": L2AConfig(window=5, sinks=1, share_attention=False, router_input="post_local"),
    "shared": L2AConfig(window=5, sinks=2),
    "shared post_local": L2AConfig(window=5, sinks=2, router_input="post_local"),
}


_DRAWN = {}


def make_params(l2a_config, config=CONFIG, seed=0):
    """Every leaf random: biases, norms, both sets and the router all differ from their start. Drawn once for all
    layers that have the same leaves: each draw of a leaf runs in programs of its own."""
    key = config, seed, tuple(by_path(param_shapes(config, l2a_config)).items())
    if key not in _DRAWN:
        _DRAWN[key] = _drawn(l2a_config, config, seed)
    return jax.tree.map(lambda leaf: leaf, _DRAWN[key])


def _drawn(l2a_config, config, seed):
    base = init_params(config, jax.random.key(seed), l2a_config)

    def disturb(path, leaf):
        key = jax.random.fold_in(jax.random.key(seed + 1), sum(map(ord, path)))
        noise = jax.random.normal(key, leaf.shape)
        return leaf + noise * (0.3 if "scale" in path or "router" in path else 0.15)

    return map_with_path(disturb, base)


def with_router(plain, layer, seed):
    """A plain model behind a shared `layer`, its router's weights random: it sends tokens both ways."""
    params = add_routing(plain.params, plain.config, layer)
    kernel = jax.random.normal(jax.random.key(seed), params["layers"]["router"]["kernel"].shape)
    return plain._replace(l2a_config=layer,
                          params={**params, "layers": {**params["layers"], "router": {"kernel": kernel}}})


def make_tokens(batch=2, length=24, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, CONFIG.vocab_size)


def packed(batch=2, length=24):
    """Segment ids: two documents and padding in row 0, three documents in row 1."""
    ids = jnp.zeros((batch, length), jnp.int32)
    ids = ids.at[0, :10].set(1).at[0, 10:20].set(2)
    return ids.at[1, :6].set(1).at[1, 6:15].set(2).at[1, 15:].set(3)


# One compilation a wiring, not one a call.
hidden = jax.jit(hidden_states, static_argnums=(2, 3), static_argnames=("train", "backend", "remat"))
