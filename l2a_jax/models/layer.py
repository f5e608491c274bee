"""One layer: attention, plain or conditional in its two topologies, and the gated MLP.

x is the residual stream, s local and a global attention, d~ the straight-through decision (`nn.routing`):

    plain       y = x + Wo a(norm(x))
    sequential  u = x + Wo s(norm_local(x));  h = norm_global(u);  y = u + Wo'(d~ a(h));  the router reads h
    parallel    y = x + Wo'(d~ a(norm_global(x))) + Wo((1 - d~) s(norm_local(x)))
    shared      the parallel layer with one attention set and one norm: y = x + Wo(d~ a + (1 - d~) s)
    out         y + mlp(norm_mlp(y))

Every forward pass calls `block`: training, scoring, prefill, decode, and the faulty ones of the autopsy; what differs
is the `Attention` that they hand in. What is decided and computed for which row is said in `decide` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from l2a_jax import attention
from l2a_jax.attention.reference import Heads, Ids, Keys, PerRow, Places
from l2a_jax.config import L2AConfig, ModelConfig, rope_of
from l2a_jax.nn import router, routing
from l2a_jax.nn.layers import Params, gated_mlp, joined, linear, rms_norm
from l2a_jax.nn.rope import Table, rope_table, split_heads
from l2a_jax.nn.shard import ALONE, Shard

QKV = ("q", "k", "v")
Stream = Float[Array, "B T D"]
Seen = Float[Array, "B S K H"]  # keys or values of all tokens that those of a call look at


class LayerRouting(NamedTuple):
    """What a layer ([B, T]) or, stacked, a model ([L, B, T]) decided: d, p and z of `nn.routing`."""

    decisions: Bool[Array, "*L B T"]
    probabilities: Float[Array, "*L B T"]
    logits: Float[Array, "*L B T"]


@dataclass
class Attention:
    """The attention functions that a layer calls: `l2a_jax.attention` over the tokens of a call. Who wants another (one
    that keeps a cache, reads it, or is faulty) overrides them."""

    l2a: L2AConfig | None
    segment_ids: Ids | None
    backend: str

    def full(self, q: Heads, k: Keys, v: Keys) -> Heads:
        return attention.full(q, k, v, **self._call(q))

    def local(self, q: Heads, k: Keys, v: Keys) -> Heads:
        return attention.local(q, k, v, **self._windowed(q))

    def local_with_scores(self, q: Heads, k: Keys, v: Keys) -> tuple[Heads, router.Scores]:
        rows, lse = attention.local_with_lse(q, k, v, **self._windowed(q))
        return rows, router.scores_of(q, k, lse, self.segment_ids, self.l2a.sinks, self.places(q))

    def routed(self, q: Heads, k: Keys, v: Keys, decisions: PerRow) -> Heads:
        return attention.routed(q, k, v, decisions, **self._call(q))

    def mixed(self, q: Heads, k: Keys, v: Keys, decisions: PerRow) -> Heads:
        return attention.mixed(q, k, v, decisions, **self._windowed(q))

    def both(self, q: Heads, k: Keys, v: Keys, decisions: PerRow) -> tuple[Heads, Heads]:
        return attention.both(q, k, v, decisions, **self._windowed(q))

    def keys(self, k: Keys, v: Keys) -> tuple[Seen, Seen]:
        """The keys and values that queries look at, from those of a call's tokens."""
        return k, v

    def places(self, q: Heads) -> Places | None:
        """Whose queries a call's are, where they are a part of the tokens (see `l2a_jax.attention`)."""
        return None

    def _call(self, q: Heads) -> dict[str, Any]:
        return {"segment_ids": self.segment_ids, "places": self.places(q), "backend": self.backend}

    def _windowed(self, q: Heads) -> dict[str, Any]:
        return {"window": self.l2a.window, "sinks": self.l2a.sinks, **self._call(q)}


class Context(NamedTuple):
    """What is the same for every layer of a call. `train`: decisions are learned in this call. `routed`: tokens that
    are routed, whatever is decided."""

    config: ModelConfig
    l2a: L2AConfig | None
    rope: Table
    positions: Int[Array, "B T"]
    real: PerRow
    attend: Attention
    train: bool = False
    shard: Shard = ALONE
    routed: PerRow | None = None

    @property
    def dense(self) -> bool:
        """Whether global attention is computed for every row, without asking which."""
        return self.train and self.l2a.leakage == 1


class OfLayer(NamedTuple):
    """What a call gives to one layer or, stacked on a leading L, to all. `decisions` replace the router's; `key` is for
    what training draws; a layer that is `pruned` never routes, whoever decides. A key/value head in `heads` sees
    everything, whatever is decided. A token is routed where its logit is at least `cut` (None: what the
    configuration's threshold says). `nudge` is added to the gate of each row: zeros, whose gradient says what each
    decision is worth; with a `price` in nats it also fits the router to that (`routing.fitted`)."""

    decisions: Bool[Array, "*L B T"] | None = None
    key: PRNGKeyArray | None = None
    pruned: Bool[Array, "*L"] | None = None
    heads: Bool[Array, "*L K"] | None = None
    cut: Float[Array, "*L"] | None = None
    nudge: Float[Array, "*L B T"] | None = None
    price: Float[Array, "*L B T"] | None = None


class Decided(NamedTuple):
    """Of each row: its routing, whether its global attention is computed, and the gate d~ that opens it."""

    routing: LayerRouting
    computed: PerRow
    gate: Float[Array, "B T"]


def context_of(config: ModelConfig, l2a: L2AConfig | None, positions: Int[Array, "B T"], real: PerRow,
               attend: Attention, train: bool = False, shard: Shard = ALONE, routed: PerRow | None = None) -> Context:
    """The context of a call; both paths share one table of rotations."""
    table = rope_table(positions, config, rope_of(config, l2a))
    return Context(config, l2a, table, positions, real, attend, train, shard, routed)


def pruned_of(config: ModelConfig, l2a: L2AConfig | None) -> Bool[Array, " L"] | None:
    """Which layers the configuration prunes; None where it prunes none."""
    if l2a is None or not l2a.pruned_layers:
        return None
    return jnp.isin(jnp.arange(config.num_layers), jnp.asarray(l2a.pruned_layers))


def block(x: Stream, layer: Params, context: Context, given: OfLayer) -> tuple[Stream, LayerRouting | None]:
    """One layer; its routing is None where the model is plain."""
    l2a, sublayer = context.l2a, _plain
    if l2a is not None:
        sublayer = _sequential if l2a.topology == "sequential" else _shared if l2a.share_attention else _separate
    y, routed = sublayer(x, layer, context, given)
    y = checkpoint_name(y, "residual")
    return y + gated_mlp(_norm(y, layer["norm_mlp"], context), layer["mlp"]), routed


def far_queries_and_keys(x: Stream, layer: Params, context: Context) -> tuple[Heads, Seen]:
    """Queries and keys, rotated, of a layer's global attention over the stream that enters it, whoever is routed."""
    l2a = context.l2a
    if l2a is None or l2a.share_attention:
        weights, norm = layer["attention"], layer["norm_attention"]
    else:
        weights, norm = layer["attention_global"], layer["norm_global"]
    if l2a is not None and l2a.topology == "sequential":
        local = layer["attention_local"]
        near, _ = _local(*_qkv(_norm(x, layer["norm_local"], context), local, context), context)
        x = x + _out(near, local)
    q, k, _ = _qkv(_norm(x, norm, context), weights, context)
    return q, k


def decide(h: Stream, layer: Params, context: Context, given: OfLayer, scores: router.Scores | None = None) -> Decided:
    """What is decided for each row, and for which rows global attention is computed:

        decided    by `given.decisions`, else by the router, in training with a share `flip` of them inverted; tokens of
                   `context.routed` are routed in each case
        computed   the routed rows; in training every real row where the layer leaks, which it does with probability
                   `leakage`, one draw a call (1: always, and nothing is drawn), or the unrouted rows that `explore`
                   draws; with a `nudge` every real row

    Padding is never routed, nor is any row of a pruned layer. A leak is a matter of which rows are computed, not of a
    branch: a conditional would have the host wait for the coin, and keep both branches' residuals. `scores` are for a
    router that sees them.
    """
    l2a = context.l2a
    able = context.real if given.pruned is None else context.real & ~given.pruned
    if given.price is not None:
        h = jax.lax.stop_gradient(h)  # a fit moves the router and asks nothing of what it reads
    seen = router.signals(l2a.router_sees, context.positions, l2a.window, l2a.sinks, scores)
    z = router.logits(h, seen, layer["router"])
    d = given.decisions
    if d is None:
        d = routing.decide(z, l2a.temperature, l2a.threshold) if given.cut is None else z >= given.cut
    if context.routed is not None:
        d = d | context.routed
    if context.train and l2a.flip:
        # Another draw than the leak's.
        d = routing.flipped(jax.random.fold_in(given.key, 1), d, l2a.flip, context.shard)
    # Kept whatever is rematerialised: a logit computed again rounds otherwise, and a token that so crossed the
    # threshold would give the backward pass other rows than those whose log-sum-exps the forward pass left.
    d = checkpoint_name(d & able, "decisions")
    p = routing.probability(z, l2a.temperature)
    routed = LayerRouting(d, p, z)
    if given.nudge is not None:
        nudge = given.nudge
        if given.price is not None:
            margins = jnp.where(able, routing.margin(z, l2a.temperature, l2a.threshold), 0.0)
            nudge = routing.fitted(nudge, margins, given.price)
        return Decided(routed, able, d.astype(jnp.float32) + jnp.where(able, nudge, 0.0))
    if not context.train:
        return Decided(routed, d, d.astype(jnp.float32))
    computed = able if context.dense else d
    if 0 < l2a.leakage < 1:
        computed = d | (jax.random.bernoulli(given.key, l2a.leakage) & able)
    if l2a.explore:
        drawn, counts = routing.explored(jax.random.fold_in(given.key, 2), p, able & ~d, l2a.explore, l2a.explore_by,
                                         context.shard)
        computed = checkpoint_name(d | drawn, "decisions")  # a chance computed again might draw another row
        return Decided(routed, computed, routing.straight_through(d, p, computed, counts))
    return Decided(routed, computed, routing.straight_through(d, p, computed))


def _plain(x: Stream, layer: Params, context: Context, given: OfLayer) -> tuple[Stream, None]:
    weights = layer["attention"]
    q, k, v = _qkv(_norm(x, layer["norm_attention"], context), weights, context)
    return x + _out(context.attend.full(q, k, v), weights), None


def _sequential(x: Stream, layer: Params, context: Context, given: OfLayer) -> tuple[Stream, LayerRouting]:
    q, k, v = _qkv(_norm(x, layer["norm_local"], context), layer["attention_local"], context)
    near, scores = _local(q, k, v, context)
    u = checkpoint_name(x + _out(near, layer["attention_local"]), "residual")
    h = _norm(u, layer["norm_global"], context)
    decided = decide(h, layer, context, given, scores)
    far = _far(*_qkv(h, layer["attention_global"], context), decided, context)
    return u + _out(routing.gate(decided.gate, far), layer["attention_global"]), decided.routing


def _separate(x: Stream, layer: Params, context: Context, given: OfLayer) -> tuple[Stream, LayerRouting]:
    """The parallel layer with a set of its own for each path."""
    weights, norm = layer["attention_global"], layer["norm_global"]
    h = _norm(x, norm, context)
    q, k, v = _qkv(h, weights, context)
    local = _qkv(_norm(x, layer["norm_local"], context), layer["attention_local"], context)
    near, scores = _local(*local, context)
    if context.l2a.router_input == "post_local":
        h = _norm(x + _out(near, layer["attention_local"]), norm, context)
    decided = decide(h, layer, context, given, scores)
    far = _far(q, k, v, decided, context)
    y = x + _out(routing.gate(decided.gate, far), weights)
    return y + _out(routing.gate(1 - decided.gate, near), layer["attention_local"]), decided.routing


def _shared(x: Stream, layer: Params, context: Context, given: OfLayer) -> tuple[Stream, LayerRouting]:
    """The parallel layer with one set for both paths: a row's decision only chooses the keys that it sees."""
    weights, norm = layer["attention"], layer["norm_attention"]
    h = _norm(x, norm, context)
    q, k, v = _qkv(h, weights, context)
    post_local = context.l2a.router_input == "post_local"
    near = scores = None
    if post_local or context.l2a.sees_scores:
        near, scores = _local(q, k, v, context)
    if post_local:
        h = _norm(x + _out(near, weights), norm, context)
    decided = decide(h, layer, context, given, scores)
    if not post_local and (context.dense or given.nudge is not None):
        rows = _dense_paths(q, k, v, decided, context)
    elif near is not None:
        rows = _joined_paths(q, k, v, near, decided, context)
    elif not context.train:
        rows = context.attend.mixed(q, k, v, decided.routing.decisions)  # each row's work once
    else:
        rows = _joined_paths(q, k, v, context.attend.local(q, k, v), decided, context)
    if given.heads is not None:
        opened = jnp.repeat(given.heads, q.shape[2] // k.shape[2])[:, None]
        rows = jnp.where(opened, context.attend.full(q, k, v), rows)
    return x + _out(rows, weights), decided.routing


def _local(q: Heads, k: Keys, v: Keys, context: Context) -> tuple[Heads, router.Scores | None]:
    """Local attention, and what its scores say where the router sees them."""
    if context.l2a.sees_scores:
        return context.attend.local_with_scores(q, k, v)
    return context.attend.local(q, k, v), None


def _joined_paths(q: Heads, k: Keys, v: Keys, near: Heads, decided: Decided, context: Context) -> Heads:
    """d~ a + (1 - d~) s, where a is computed for some rows and s for all."""
    far = _far(q, k, v, decided, context)
    return routing.gate(decided.gate, far) + routing.gate(1 - decided.gate, near)


def _dense_paths(q: Heads, k: Keys, v: Keys, decided: Decided, context: Context) -> Heads:
    """d~ a + (1 - d~) s, where both are computed for every row: backward a row's work is done once."""
    rows, difference = context.attend.both(q, k, v, decided.routing.decisions)
    return routing.with_decision_gradient(rows, decided.gate, difference)


def _far(q: Heads, k: Keys, v: Keys, decided: Decided, context: Context) -> Heads:
    """Global attention of the rows for which it is computed."""
    return context.attend.full(q, k, v) if context.dense else context.attend.routed(q, k, v, decided.computed)


def _norm(x: Stream, params: Params, context: Context) -> Stream:
    return rms_norm(x, params, context.config.rms_norm_eps)


def join_projections(layer: Params) -> dict[str, Any]:
    """A layer, or stacked layers, whose attention sets have one "qkv" in place of "q", "k" and "v"."""
    # The barrier keeps XLA from joining each layer's part where it is used, in slow little kernels.
    return {name: {"qkv": jax.lax.optimization_barrier(joined(part, QKV)), "o": part["o"]} if "q" in part else part
            for name, part in layer.items()}


def _qkv(h: Stream, params: Params, context: Context) -> tuple[Heads, Seen, Seen]:
    """q and k (rotated) and v from one matrix product: k and v alone are too narrow for the matrix units, and their
    gradients would each write a whole [B, T, D]."""
    heads, kv_heads = context.config.num_heads, context.config.num_kv_heads
    together = params["qkv"] if "qkv" in params else joined(params, QKV)
    shape = (heads + 2 * kv_heads, context.config.head_dim)
    product = linear(h, together).reshape(*h.shape[:2], *shape)
    q, k, v = checkpoint_name(split_heads(product, together["bias"].reshape(shape), context.rope, kv_heads), "qkv")
    return q, *context.attend.keys(k, v)


def _out(rows: Heads, params: Params) -> Stream:
    return linear(rows.reshape(*rows.shape[:2], -1), params["o"])
