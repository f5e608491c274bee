"""The small transformer as pure functions over a nested dict, its layers stacked on a leading L.

    embed/embedding [V,D], embed/positions [P,D]; layers/norm_attention/{scale,bias}; layers/attention/{q,k,v,o}/kernel;
    layers/gate/{q,k}/kernel [L,D,N*G]; layers/norm_mlp/{scale,bias}; layers/mlp/{up,down}/{kernel,bias};
    layers/router/kernel [L,D,E] (experts only); norm_final/{scale,bias}; unembed/kernel [D,V] (untied only)

Every model has gates, those of dense arms idle, so that all arms share one tree.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from l2a_jax.models.params import Tree, map_with_path
from l2a_jax.research.absorption import gates, masks
from l2a_jax.research.absorption.definitions import Attention, TransformerConfig


class Numbers(NamedTuple):
    """What an arm sets by number, traced: k of the top k, which layers are gated [L], and hash instead of a router."""

    k: Int[Array, ""]
    gated: Bool[Array, " L"]
    hashed: Bool[Array, ""]


class LayerView(NamedTuple):
    """What a probe sees of one layer: its parameters, the normed input, heads, and the keys it kept."""

    layer: Tree
    x: Float[Array, "B T D"]
    q: Float[Array, "B T N H"]
    k: Float[Array, "B T N H"]


def param_shapes(config: TransformerConfig) -> Tree:
    """The tree of shapes (tuples of int)."""
    c, d = config, config.width

    def stacked(*shape):
        return (c.layers, *shape)

    norm = {"scale": stacked(d), "bias": stacked(d)}
    square = {"kernel": stacked(d, d)}
    gate = {"kernel": stacked(d, c.heads * c.gate_width)}
    layers = {
        "norm_attention": norm, "attention": {name: square for name in "qkvo"}, "gate": {"q": gate, "k": gate},
        "norm_mlp": norm,
        "mlp": {"up": {"kernel": stacked(d, c.hidden), "bias": stacked(c.hidden)},
                "down": {"kernel": stacked(c.hidden, d), "bias": stacked(d)}},
    }
    if c.experts:
        layers["router"] = {"kernel": stacked(d, c.experts)}
    tree = {"embed": {"embedding": (c.vocab_size, d), "positions": (c.positions, d)}, "layers": layers,
            "norm_final": {"scale": (d,), "bias": (d,)}}
    if not c.tied:
        tree["unembed"] = {"kernel": (d, c.vocab_size)}
    return tree


def init_params(config: TransformerConfig, key: Array, gate_std: Any = None) -> Tree:
    """Fresh parameters: weights N(0, init_std), gates N(0, gate_std) (None: the model's), biases 0, norms 1.

    A leaf's draw depends on the key and its name only: arms of one seed begin with the same backbone.
    """
    def leaf(path, shape):
        kind = path.rsplit("/", 1)[-1]
        if kind in ("scale", "bias"):
            return jnp.full(shape, float(kind == "scale"), jnp.float32)
        gate = config.gate_std if gate_std is None else gate_std
        deviation = gate if path.startswith("layers/gate") else config.init_std
        return deviation * jax.random.normal(jax.random.fold_in(key, zlib.crc32(path.encode())), shape)

    return map_with_path(leaf, param_shapes(config))


def count_parameters(config: TransformerConfig) -> dict[str, int]:
    """Embedding, backbone (blocks, positions, norms), gates, and totals with a tied and with an untied head."""
    sizes = map_with_path(lambda path, shape: (path, math.prod(shape)), param_shapes(config))
    leaves = jax.tree.leaves(sizes, is_leaf=lambda x: type(x) is tuple)
    embedding = config.vocab_size * config.width
    gate = sum(size for path, size in leaves if path.startswith("layers/gate"))
    rest = sum(size for path, size in leaves if "embedding" not in path and "unembed" not in path) - gate
    return {"embedding": embedding, "backbone": rest, "gates": gate, "tied": embedding + rest + gate,
            "untied": 2 * embedding + rest + gate}


def head_kernel(params: Tree) -> Float[Array, "V D"]:
    """The output matrix: the embedding itself, or the transpose of the untied one."""
    return params["unembed"]["kernel"].T if "unembed" in params else params["embed"]["embedding"]


def layer_norm(x: Float[Array, "*S D"], norm: Tree, epsilon: float = 1e-5) -> Float[Array, "*S D"]:
    """LayerNorm with bias; statistics in float32, the result in x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    return (unit * norm["scale"] + norm["bias"]).astype(x.dtype)


def dropout(x: Float[Array, "*S"], rate: float, key: Array | None) -> Float[Array, "*S"]:
    """Entries zeroed with probability `rate`, the others scaled up; x itself without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def gate_heads(x: Float[Array, "B T D"], gate: Tree, heads: int) -> tuple[Array, Array]:
    """The gate's queries and keys of every head, [B, T, N, G]."""
    return tuple((x @ gate[name]["kernel"].astype(x.dtype)).reshape(*x.shape[:2], heads, -1) for name in "qk")


def hidden_states(
    params: Tree,
    tokens: Int[Array, "B T"],
    config: TransformerConfig,
    attention: Attention,
    numbers: Numbers,
    *,
    key: Array | None = None,
    train: bool = False,
    dtype: Any = jnp.float32,
    probe: Callable[[LayerView], Any] | None = None,
    dense_backend: str | None = None,
) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
    """The final normed residual stream, and per layer (stacked on L): experts' `balance` and `load`, and `probed`.

    `key` draws random masks and, with `train`, dropout; the same key gives the same in every arm. `dense_backend` is
    the `implementation` of `jax.nn.dot_product_attention` for dense arms ("cudnn" on a GPU).
    """
    c = config
    keys = None if key is None else jax.random.split(key, (c.layers, 4))
    drop = c.dropout if train else 0.0
    # Rows are cast after they are gathered, so that their gradients are scattered in float32.
    x = (params["embed"]["embedding"][tokens] + params["embed"]["positions"][: tokens.shape[1]]).astype(dtype)
    x = dropout(x, drop, None if key is None else jax.random.fold_in(key, c.layers))

    def block(x, inputs):
        layer, gated, layer_key = inputs
        attend_key, weights_key, inner_key, outer_key = (None,) * 4 if layer_key is None else layer_key
        normed = layer_norm(x, layer["norm_attention"])
        q, k, v = ((normed @ layer["attention"][name]["kernel"].astype(dtype)).reshape(
            *tokens.shape, c.heads, c.head_width) for name in "qkv")
        if attention.is_dense and dense_backend is not None and not drop:
            out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=dense_backend)
        else:
            # The scores [B, N, T, T] are made again in the backward pass; of them only the choice of keys is kept.
            core = jax.checkpoint(functools.partial(attend, config=c, attention=attention, drop=drop),
                                  policy=jax.checkpoint_policies.save_only_these_names("kept"), prevent_cse=False)
            out = core(normed, q, k, v, layer, gated, numbers.k, attend_key, weights_key)
        x = x + out.reshape(x.shape) @ layer["attention"]["o"]["kernel"].astype(dtype)
        h, aux = feed_forward(layer_norm(x, layer["norm_mlp"]), layer, tokens, c, numbers, drop, inner_key)
        x = x + dropout(h, drop, outer_key)
        if probe is not None:
            aux["probed"] = probe(LayerView(layer, normed, q, k))
        return x, aux

    x, aux = jax.lax.scan(block, x, (params["layers"], numbers.gated, keys))
    return layer_norm(x, params["norm_final"]), aux


def attend(normed, q, k, v, layer, gated, top_k, key, weights_key, *, config, attention, drop):
    """Attention's output [B, T, N, H] of one layer, in all its forms."""
    shape = (q.shape[0], config.heads, q.shape[1], q.shape[1])
    visible = masks.causal(q.shape[1])

    def gate(dtype):
        own = gates.pair_scores(*gate_heads(normed, layer["gate"], config.heads), dtype)
        return gates.presented(own, attention, key)

    s = gates.pair_scores(q, k, normed.dtype)
    logits = gates.soften(s, lambda: gate(normed.dtype), attention.soft)
    mask = jnp.broadcast_to(visible, shape)
    if attention.selects:
        scores = {
            "gate": lambda: gate(jnp.float32),
            "selector": lambda: gates.pair_scores(
                *gate_heads(normed, layer.get("selector", layer["gate"]), config.heads), jnp.float32),
            "oracle": lambda: gates.pair_scores(q, k, jnp.float32),
            "used": lambda: gates.soften(gates.pair_scores(q, k, jnp.float32), lambda: gate(jnp.float32),
                                         attention.soft)}
        mask = gates.kept_keys(attention, top_k, scores=scores, shape=shape, key=key)
        if isinstance(attention.hard_rows, float) and attention.hard_rows < 1:
            hard = (jnp.arange(shape[0]) < round(attention.hard_rows * shape[0]))[:, None, None, None]
            logits, mask = jnp.where(hard, s.astype(jnp.float32), logits), jnp.where(hard, mask, visible)
        mask = checkpoint_name(jnp.where(gated, mask, visible), "kept")
    if not attention.is_dense:
        logits = jnp.where(gated, logits, s.astype(jnp.float32))
    if attention.straight_through is True:
        weights = gates.straight_through_softmax(logits, mask, jnp.where(gated, gate(normed.dtype), 0))
    else:
        weights = gates.masked_softmax(logits, mask)
    weights = dropout(weights.astype(v.dtype), drop, weights_key)
    return jnp.einsum("bnqk,bknh->bqnh", weights, v)


def feed_forward(x, layer, tokens, config, numbers, drop, key):
    """GELU feed-forward [B, T, D], dense or as a mixture of experts, and the router's statistics.

    Expert e owns the e-th part of the hidden units, so a mixture is the dense layer with the other experts' units set
    to 0: no capacity, no dropped token, and the same size. One expert a token, weighted by its probability (Switch,
    arXiv 2101.03961); hash routing (arXiv 2106.04426) takes a fixed random expert for each token id, weight 1.
    """
    up, down = layer["mlp"]["up"], layer["mlp"]["down"]
    h = jax.nn.gelu(x @ up["kernel"].astype(x.dtype) + up["bias"].astype(x.dtype), approximate=False)
    aux: dict[str, Any] = {}
    if config.experts:
        chosen, aux = route(x, layer["router"]["kernel"], tokens, config, numbers)
        h = h * jnp.repeat(chosen, config.hidden // config.experts, axis=-1).astype(h.dtype)
    h = dropout(h, drop, key)
    return h @ down["kernel"].astype(x.dtype) + down["bias"].astype(x.dtype), aux


def route(x: Float[Array, "B T D"], kernel: Float[Array, "D E"], tokens: Int[Array, "B T"], config: TransformerConfig,
          numbers: Numbers) -> tuple[Float[Array, "B T E"], dict[str, Array]]:
    """The weight of each expert for each token, one of them above 0; load [E], and the balance loss (1 if even)."""
    probabilities = jax.nn.softmax(x.astype(jnp.float32) @ kernel, axis=-1)
    best = jnp.argmax(probabilities, axis=-1)
    # Knuth's multiplicative hash: fixed, and unrelated to what an id stands for.
    by_hash = ((tokens.astype(jnp.uint32) * jnp.uint32(2_654_435_761)) >> 16) % config.experts
    expert = jnp.where(numbers.hashed, by_hash.astype(best.dtype), best)
    one = jax.nn.one_hot(expert, config.experts)
    load = jnp.mean(one, axis=(0, 1))
    balance = config.experts * jnp.sum(load * jnp.mean(probabilities, axis=(0, 1)))
    return one * jnp.where(numbers.hashed, 1.0, probabilities), {"balance": balance, "load": load}
