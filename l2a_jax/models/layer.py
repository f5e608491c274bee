"""One attention sublayer: plain, or conditional in its two topologies.

x is the residual stream, s local and a global attention, d~ the straight-through decision (`nn.routing`):

    plain       y = x + Wo a(norm(x))
    sequential  u = x + Wo s(norm_local(x));  h = norm_global(u);  y = u + Wo'(d~ a(h));  the router reads h
    parallel    y = x + Wo'(d~ a(norm_global(x))) + Wo((1 - d~) s(norm_local(x)))
    shared      the parallel layer with one attention set and one norm: y = x + Wo(d~ a + (1 - d~) s)

Training computes s for every row and a for the routed rows; with leakage, sometimes a for every row. Without
gradients to the decision (inference, forced decisions) the shared layer does each row's work once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from l2a_jax import attention
from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.nn import routing
from l2a_jax.nn.layers import joined, linear, rms_norm
from l2a_jax.nn.rope import split_heads

QKV = ("q", "k", "v")


class LayerRouting(NamedTuple):
    """What a layer ([B, T]) or, stacked, a model ([L, B, T]) decided: d, p and z of `nn.routing`."""

    decisions: Bool[Array, "*L B T"]
    probabilities: Float[Array, "*L B T"]
    logits: Float[Array, "*L B T"]


class Context(NamedTuple):
    """What is the same for every layer of a call. `train`: decisions are learned in this call.

    `attention` has the four functions of `l2a_jax.attention`; generation puts one there that keeps or reads a cache.
    """

    config: ModelConfig
    l2a: L2AConfig | None
    rope: tuple[Float[Array, "B T h"], Float[Array, "B T h"]]
    segment_ids: Int[Array, "B T"] | None
    real: Bool[Array, "B T"]
    train: bool
    backend: str
    attention: Any = attention


def attend(
    x: Float[Array, "B T D"],
    layer: Mapping[str, Any],
    context: Context,
    forced: Bool[Array, "B T"] | None,
    key: PRNGKeyArray | None,
    pruned: Bool[Array, ""] | None,
) -> tuple[Float[Array, "B T D"], LayerRouting | None]:
    """The attention sublayer of one layer, residual included; `forced` decisions replace the router's."""
    if context.l2a is None:
        q, k, v = _qkv(_norm(x, layer["norm_attention"], context), layer["attention"], context)
        rows = context.attention.full(q, k, v, segment_ids=context.segment_ids, backend=context.backend)
        return x + _out(rows, layer["attention"]), None

    def decide(h):
        z = routing.router_logits(h, layer["router"]["kernel"])
        d = routing.decide(z, context.l2a.temperature, context.l2a.threshold) if forced is None else forced
        if context.train and context.l2a.flip:
            d = routing.flipped(jax.random.fold_in(key, 1), d, context.l2a.flip)  # another draw than the leak's
        d = d & context.real if pruned is None else d & context.real & ~pruned
        # Kept whatever is rematerialised: a logit computed again rounds otherwise, and a token that so crossed the
        # threshold would give the backward pass other rows than those whose log-sum-exps the forward pass left.
        d = checkpoint_name(d, "decisions")
        return LayerRouting(d, routing.probability(z, context.l2a.temperature), z)

    topology = _sequential if context.l2a.topology == "sequential" else _parallel
    return topology(x, layer, context, decide, key, pruned)


def _sequential(x, layer, context, decide, key, pruned):
    q, k, v = _qkv(_norm(x, layer["norm_local"], context), layer["attention_local"], context)
    u = checkpoint_name(x + _out(_local(q, k, v, context), layer["attention_local"]), "residual")
    h = _norm(u, layer["norm_global"], context)
    decided = decide(h)
    q, k, v = _qkv(h, layer["attention_global"], context)
    rows, open_ = _global(q, k, v, decided, context, key, pruned)
    return u + _out(routing.gate(open_, rows), layer["attention_global"]), decided


def _parallel(x, layer, context, decide, key, pruned):
    shared = context.l2a.share_attention
    set_local, set_global = (layer[name] for name in (("attention",) * 2 if shared else ("attention_local",
                                                                                          "attention_global")))
    norm_local, norm_global = (layer[name] for name in (("norm_attention",) * 2 if shared else ("norm_local",
                                                                                                 "norm_global")))
    h = _norm(x, norm_global, context)
    global_qkv = _qkv(h, set_global, context)
    local_qkv = global_qkv if shared else _qkv(_norm(x, norm_local, context), set_local, context)

    reads_local = context.l2a.router_input == "post_local"
    if shared and not reads_local and not context.train:
        decided = decide(h)
        rows = context.attention.mixed(*global_qkv, decided.decisions, window=context.l2a.window,
                                       sinks=context.l2a.sinks, segment_ids=context.segment_ids,
                                       backend=context.backend)
        return x + _out(rows, set_global), decided

    if shared and not reads_local and context.l2a.leakage == 1:  # training that computes both paths for every row
        decided = decide(h)
        rows, difference = context.attention.both(*global_qkv, decided.decisions, window=context.l2a.window,
                                                  sinks=context.l2a.sinks, segment_ids=context.segment_ids,
                                                  backend=context.backend)
        computed = context.real if pruned is None else context.real & ~pruned
        open_ = routing.straight_through(decided.decisions, decided.probabilities, computed)
        return x + _out(routing.with_decision_gradient(rows, open_, difference), set_global), decided

    near = _local(*local_qkv, context)
    decided = decide(_norm(x + _out(near, set_local), norm_global, context) if reads_local else h)
    far, open_ = _global(*global_qkv, decided, context, key, pruned)
    if shared:
        return x + _out(routing.gate(open_, far) + routing.gate(1 - open_, near), set_global), decided
    return x + _out(routing.gate(open_, far), set_global) + _out(routing.gate(1 - open_, near), set_local), decided


def _local(q, k, v, context):
    return context.attention.local(q, k, v, window=context.l2a.window, sinks=context.l2a.sinks,
                                   segment_ids=context.segment_ids, backend=context.backend)


def _global(q, k, v, decided, context, key, pruned):
    """Global attention and the gate d~ that opens it; which rows were computed decides which gates get a gradient.

    A leak computes every row. It is a matter of which rows are routed, not of a branch: a conditional would have the
    host wait for the coin, and keep both branches' residuals.
    """
    options = {"segment_ids": context.segment_ids, "backend": context.backend}
    d = decided.decisions
    leakage = context.l2a.leakage if context.train else 0.0
    if leakage == 1:
        rows, computed = context.attention.full(q, k, v, **options), context.real
    else:
        leaks = jax.random.bernoulli(key, leakage) if leakage else False
        computed = d | (leaks & context.real)
        rows = context.attention.routed(q, k, v, computed, **options)
    if not context.train:
        return rows, d.astype(jnp.float32)
    if pruned is not None:
        computed = computed & ~pruned
    return rows, routing.straight_through(d, decided.probabilities, computed)


def _norm(x, params, context):
    return rms_norm(x, params, context.config.rms_norm_eps)


def join_projections(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer, or stacked layers, whose attention sets have one "qkv" in place of "q", "k" and "v"."""
    # The barrier keeps XLA from joining each layer's part where it is used, in slow little kernels.
    return {name: {"qkv": jax.lax.optimization_barrier(joined(part, QKV)), "o": part["o"]} if "q" in part else part
            for name, part in layer.items()}


def _qkv(h, params, context):
    """q and k (rotated) and v from one matrix product: k and v alone are too narrow for the matrix units, and their
    gradients would each write a whole [B, T, D]."""
    heads, kv_heads = context.config.num_heads, context.config.num_kv_heads
    together = params["qkv"] if "qkv" in params else joined(params, QKV)
    shape = (heads + 2 * kv_heads, context.config.head_dim)
    product = linear(h, together).reshape(*h.shape[:2], *shape)
    return checkpoint_name(split_heads(product, together["bias"].reshape(shape), context.rope, kv_heads), "qkv")


def _out(rows, params):
    return linear(rows.reshape(*rows.shape[:2], -1), params["o"])
