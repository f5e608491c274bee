"""Gates distilled after training: on frozen Q, K and V, by their KL divergence to the model's own attention.

Per layer, head and query: KL(softmax(S) || softmax(G)) over the visible keys, with S the scaled products of queries and
keys, in the model's own forward pass; mean over queries, heads and layers. No gradient leaves the gate.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Integer

from l2a_jax.models.params import Tree
from l2a_jax.research.absorption import gates, masks, small_model
from l2a_jax.research.absorption.definitions import Attention, Recipe, TransformerConfig


def attention_kl(view: small_model.LayerView, name: str, config: TransformerConfig) -> Float[Array, ""]:
    """Mean KL of one layer in nats; its gradient reaches the gate called `name` alone."""
    x, q, k = (jax.lax.stop_gradient(a) for a in (view.x, view.q, view.k))
    s = gates.pair_scores(q, k, jnp.float32)
    g = gates.pair_scores(*small_model.gate_heads(x, view.layer[name], config.heads), jnp.float32)
    return kl(s, g)


def kl(s: Float[Array, "*S T T"], g: Float[Array, "*S T T"]) -> Float[Array, ""]:
    """KL(softmax(s) || softmax(g)) over the visible keys, mean over queries."""
    visible = masks.causal(s.shape[-1])
    log_p, log_q = (jax.nn.log_softmax(jnp.where(visible, x, gates.HIDDEN), axis=-1) for x in (s, g))
    return jnp.mean(jnp.sum(jnp.where(visible, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1))


@functools.partial(jax.jit, static_argnames=("config",))
def fresh_selector(seeds: Integer[Array, " M"], *, config: TransformerConfig) -> Tree:
    """New gates for every member, as at initialisation but of another draw."""
    def one(seed):
        key = jax.random.fold_in(jax.random.key(seed), 7)
        return small_model.init_params(config, key)["layers"]["gate"]

    return jax.vmap(one)(seeds)


@functools.partial(jax.jit, static_argnames=("config", "recipe"), donate_argnames=("selector", "adam"))
def distill_chunk(
    selector: Tree,
    adam: Any,
    params: Tree,
    stream: Integer[Array, " W"],
    starts: Int[Array, "n M B"],
    numbers: small_model.Numbers,
    attention: Attention,
    seeds: Integer[Array, " M"],
    first: Int[Array, ""],
    *,
    config: TransformerConfig,
    recipe: Recipe,
) -> tuple[Tree, Any, Float[Array, "n M"]]:
    """n steps of Adam (no decay, clipped to norm 1) on every member's selector, in the forward pass of `attention`
    (indexed). Returns selectors, optimizer and the KL of each step in nats."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(recipe.distill_learning_rate))
    probe = functools.partial(attention_kl, name="selector", config=config)

    def member(selector, adam, params, starts, key):
        tokens = stream[starts[:, None] + jnp.arange(recipe.seq_len)].astype(jnp.int32)

        def objective(selector):
            tree = {**params, "layers": {**params["layers"], "selector": selector}}
            _, aux = small_model.hidden_states(tree, tokens, config, attention, numbers, key=key, probe=probe,
                                               dtype=jnp.dtype(recipe.dtype))
            return jnp.mean(aux["probed"])

        value, gradient = jax.value_and_grad(objective)(selector)
        change, adam = optimizer.update(gradient, adam)
        return optax.apply_updates(selector, change), adam, value

    def step(carry, inputs):
        index, starts = inputs
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), index))(seeds)
        selector, adam, value = jax.vmap(member)(*carry, params, starts, keys)
        return (selector, adam), value

    (selector, adam), values = jax.lax.scan(step, (selector, adam), (first + jnp.arange(starts.shape[0]), starts))
    return selector, adam, values


def initial_adam(selector: Tree) -> Any:
    """The optimizer's state of every member's selector."""
    return jax.vmap(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0)).init)(selector)
