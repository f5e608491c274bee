"""Scores of trained members on held-out text, under any attention, with one compiled program for all of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from l2a_jax.models.params import Tree
from l2a_jax.research.absorption import gates, masks, small_model
from l2a_jax.research.absorption.definitions import Attention, TransformerConfig
from l2a_jax.research.absorption.head_loss import token_nll

EVALUATION_SEED = 1_000_003


def with_selector(params: Tree, selector: Tree | None = None) -> Tree:
    """`params` with a distilled gate beside its own; its own in both places where there is none."""
    layers = params["layers"]
    return {**params, "layers": {**layers, "selector": layers["gate"] if selector is None else selector}}


@functools.partial(jax.jit, static_argnames=("config", "dtype", "length"))
def held_out_nll(params: Tree, stream: Integer[Array, " W"], starts: Int[Array, "n B"], numbers: small_model.Numbers,
                 attention: Attention, *, config: TransformerConfig, dtype: str, length: int) -> Float[Array, " M"]:
    """Mean nats per token of every member under `attention` (indexed); `params` hold a selector."""
    def one(params):
        def batch(total, inputs):
            index, starts = inputs
            tokens = stream[starts[:, None] + jnp.arange(length + 1)].astype(jnp.int32)
            key = jax.random.fold_in(jax.random.key(EVALUATION_SEED), index)
            hidden, _ = small_model.hidden_states(params, tokens[:, :-1], config, attention, numbers, key=key,
                                                  dtype=jnp.dtype(dtype))
            nll = token_nll(hidden.reshape(-1, hidden.shape[-1]), small_model.head_kernel(params),
                            tokens[:, 1:].reshape(-1))
            return total + jnp.mean(nll), None

        total, _ = jax.lax.scan(batch, jnp.zeros(()), (jnp.arange(starts.shape[0]), starts))
        return total / starts.shape[0]

    return jax.vmap(one)(params)


@functools.partial(jax.jit, static_argnames=("config", "dtype", "length"))
def layer_statistics(params: Tree, stream: Integer[Array, " W"], starts: Int[Array, "n B"],
                     numbers: small_model.Numbers, attention: Attention, ks: Int[Array, " K"], *,
                     config: TransformerConfig, dtype: str, length: int) -> dict[str, Array]:
    """What the layers do in the forward pass of `attention` (indexed), for every member, [M, L, ...]:

    `mass` [.., K]: attention (softmax of S) in the k largest keys, mean over queries with more than k visible keys;
    `agreement` [.., K, 6]: counts for F1 of the selector's top k against the oracle's (`masks.agreement`);
    `gate_mean`, `gate_sd`: of sigmoid(G) over visible pairs; `load` [.., E]: share of tokens of each expert.
    """
    visible = masks.causal(length)

    def probe(view):
        s = gates.pair_scores(view.q, view.k, jnp.float32)
        weights = gates.masked_softmax(s, jnp.broadcast_to(visible, s.shape))
        by = gates.pair_scores(*small_model.gate_heads(view.x, view.layer["selector"], config.heads), jnp.float32)

        def at(k):
            oracle = masks.select(s, k, False)
            contested = jnp.arange(length) >= k
            mass = jnp.sum(jnp.where(oracle, weights, 0.0), axis=-1)
            mass = jnp.sum(mass * contested) / (jnp.maximum(jnp.sum(contested), 1) * s.shape[0] * s.shape[1])
            return mass, masks.agreement(masks.select(by, k, False), oracle, k)

        mass, counts = jax.lax.map(at, ks)
        own = jax.nn.sigmoid(gates.pair_scores(*small_model.gate_heads(view.x, view.layer["gate"], config.heads),
                                               jnp.float32))
        pairs = jnp.sum(visible) * s.shape[0] * s.shape[1]
        moments = [jnp.sum(jnp.where(visible, power, 0.0)) / pairs for power in (own, jnp.square(own))]
        return {"mass": mass, "agreement": counts, "gate_mean": moments[0], "gate_square": moments[1]}

    def one(params):
        def batch(carry, inputs):
            index, starts = inputs
            tokens = stream[starts[:, None] + jnp.arange(length)].astype(jnp.int32)
            key = jax.random.fold_in(jax.random.key(EVALUATION_SEED), index)
            _, aux = small_model.hidden_states(params, tokens, config, attention, numbers, key=key, probe=probe,
                                               dtype=jnp.dtype(dtype))
            found = dict(aux["probed"])
            if "load" in aux:
                found["load"] = aux["load"]
            return carry, found

        _, found = jax.lax.scan(batch, None, (jnp.arange(starts.shape[0]), starts))
        out: dict[str, Any] = {name: jnp.mean(value, axis=0) for name, value in found.items()}
        out["agreement"] = jnp.sum(found["agreement"], axis=0)
        out["gate_sd"] = jnp.sqrt(jnp.maximum(out.pop("gate_square") - jnp.square(out["gate_mean"]), 0.0))
        return out

    return jax.vmap(one)(params)
