"""The parameter tree: names, shapes, initial values, and the step from a plain to a routed model.

A tree is a nested dict; the layers are stacked on a leading L so that the forward pass can scan them. Kernels are
[in, out]. The router's kernel stays float32 whatever the rest is stored in.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.nn import router

Tree = dict[str, Any]


def param_shapes(config: ModelConfig, l2a_config: L2AConfig | None = None) -> Tree:
    """The tree of shapes (tuples of int) of a plain model, or of one with the L2A layer."""
    c, layers = config, config.num_layers
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def stacked(*shape):
        return (layers, *shape)

    attention = {
        "q": {"kernel": stacked(c.hidden_size, queries), "bias": stacked(queries)},
        "k": {"kernel": stacked(c.hidden_size, keys), "bias": stacked(keys)},
        "v": {"kernel": stacked(c.hidden_size, keys), "bias": stacked(keys)},
        "o": {"kernel": stacked(queries, c.hidden_size)},
    }
    norm = {"scale": stacked(c.hidden_size)}
    block = {
        "mlp": {
            "gate": {"kernel": stacked(c.hidden_size, c.intermediate_size)},
            "up": {"kernel": stacked(c.hidden_size, c.intermediate_size)},
            "down": {"kernel": stacked(c.intermediate_size, c.hidden_size)},
        },
        "norm_mlp": norm,
    }
    if l2a_config is None or l2a_config.share_attention:
        block |= {"attention": attention, "norm_attention": norm}
    else:
        block |= {"attention_local": attention, "attention_global": attention, "norm_local": norm, "norm_global": norm}
    if l2a_config is not None:
        block["router"] = jax.tree.map(lambda shape: stacked(*shape), _router_shapes(c, l2a_config),
                                       is_leaf=lambda x: type(x) is tuple)

    tree = {"embed": {"embedding": (c.vocab_size, c.hidden_size)}, "layers": block,
            "norm_final": {"scale": (c.hidden_size,)}}
    if not c.tie_embeddings:
        tree["unembed"] = {"kernel": (c.hidden_size, c.vocab_size)}
    return tree


def _router_shapes(config: ModelConfig, l2a_config: L2AConfig) -> Tree:
    """The leaves of one layer's router (`nn.router`)."""
    width, units = config.hidden_size, l2a_config.router_hidden
    seen = router.width(l2a_config.router_sees, config.num_heads)
    hidden = {"kernel": (width, units), "bias": (units,), "out": (units,)}
    return {"kernel": (width,), **({"signals": (seen,)} if seen else {}),
            **({"hidden": {**hidden, **({"signals": (seen, units)} if seen else {})}} if units else {})}


def map_with_path(function: Callable[[str, Any], Any], *trees: Tree) -> Tree:
    """`function("layers/router/kernel", leaf, ...)` over every leaf; a tuple counts as a leaf, so shapes work too."""

    def name(path):
        return "/".join(str(entry.key) for entry in path)

    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(name(path), *leaves), *trees,
                                            is_leaf=lambda x: type(x) is tuple)


def by_path(tree: Tree) -> dict[str, Any]:
    """The leaves by their path, in the tree's order."""
    leaves: dict[str, Any] = {}
    map_with_path(leaves.__setitem__, tree)
    return leaves


def by_layer(tree: Tree) -> Tree:
    """The tree with every stacked leaf of its layers as a tuple of L arrays. A program without a loop over layers then
    reads each where it lies; of a stacked leaf it first copies out the part that a matrix product takes."""
    if "layers" not in tree:
        return tree
    layers = jax.tree.map(lambda leaf: tuple(leaf[layer] for layer in range(leaf.shape[0])), tree["layers"])
    return {**tree, "layers": layers}


def stacked(tree: Tree) -> Tree:
    """Inverse of `by_layer`; what is stacked already stays. In a compiled program that takes the layers apart again
    nothing is stacked."""
    return map_with_path(lambda _, leaf: jnp.stack(leaf) if isinstance(leaf, tuple) else leaf, tree)


def param_dtype(path: str, dtype: Any) -> Any:
    """The stored dtype of a leaf: float32 for the router, `dtype` for everything else."""
    return jnp.dtype(jnp.float32 if path.startswith("layers/router/") else dtype)


def abstract_params(config: ModelConfig, l2a_config: L2AConfig | None = None, dtype: Any = jnp.float32) -> Tree:
    """The tree as `jax.ShapeDtypeStruct` leaves: what a checkpoint or a conversion has to fill."""
    return map_with_path(lambda path, shape: jax.ShapeDtypeStruct(shape, param_dtype(path, dtype)),
                         param_shapes(config, l2a_config))


def init_params(config: ModelConfig, key: PRNGKeyArray, l2a_config: L2AConfig | None = None,
                dtype: Any = jnp.float32) -> Tree:
    """Fresh parameters: kernels normal, norms 1, biases 0, routers 0 (everything is routed).

    The kernels' deviation is 0.6 / sqrt(D): Qwen2's 0.02 at the width of its 0.5B, and no weaker in a narrow model,
    where 0.02 would leave every product of two kernels near zero for hundreds of steps.
    With separate sets both start from the same draw, as `add_routing` would have it. Works under `jax.eval_shape`.
    """
    deviation = 0.6 / config.hidden_size**0.5

    def leaf(path, shape):
        kind = path.rsplit("/", 1)[-1]
        if kind == "scale":
            return jnp.ones(shape, dtype)
        if kind == "bias":
            return jnp.zeros(shape, dtype)
        # Keyed by name, not by order: a leaf's draw does not change when the tree gains another.
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return (deviation * jax.random.normal(leaf_key, shape, jnp.float32)).astype(dtype)

    plain = map_with_path(leaf, param_shapes(config))
    return plain if l2a_config is None else add_routing(plain, config, l2a_config)


def add_routing(params: Tree, config: ModelConfig, l2a_config: L2AConfig) -> Tree:
    """The routed tree of a plain one: both attention sets copied from the base layer, the router at zero, but for the
    kernel of its hidden units, which would not part otherwise: the same normal draw for every run.

    Raises ValueError where `params` is routed already, or `pruned_layers` names a layer that does not exist.
    """
    if "router" in params["layers"]:
        raise ValueError("add_routing takes a plain model; these parameters have a router already")
    check_layers(config, l2a_config)
    block = dict(params["layers"])
    if not l2a_config.share_attention:
        attention, norm = block.pop("attention"), block.pop("norm_attention")
        # Real copies: two names of one buffer could not both be donated to a training step.
        block |= {"attention_local": attention, "attention_global": jax.tree.map(jnp.array, attention)}
        block |= {"norm_local": norm, "norm_global": jax.tree.map(jnp.array, norm)}
    block["router"] = map_with_path(_fresh_router, param_shapes(config, l2a_config)["layers"]["router"])
    return {**params, "layers": block}


def _fresh_router(path: str, shape: tuple[int, ...]) -> Float[Array, "L ..."]:
    if path == "hidden/kernel":
        return jax.random.normal(jax.random.key(0), shape, jnp.float32) / shape[1] ** 0.5
    return jnp.zeros(shape, jnp.float32)


def check_layers(config: ModelConfig, l2a_config: L2AConfig) -> None:
    """Raise ValueError where `pruned_layers` names a layer that the model does not have."""
    beyond = [layer for layer in l2a_config.pruned_layers if layer >= config.num_layers]
    if beyond:
        raise ValueError(f"pruned_layers {beyond} do not exist: the model has {config.num_layers} layers, from 0")


def output_matrix(params: Tree, config: ModelConfig) -> Float[Array, "V D"]:
    """The matrix that makes the logits: the embedding where it is tied, else the stored output kernel."""
    return params["embed"]["embedding"] if config.tie_embeddings else params["unembed"]["kernel"].T
