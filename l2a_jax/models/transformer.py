"""Qwen2.5 and its L2A layer: the forward pass as pure functions over the parameter tree.

Letters: B batch, T tokens, L layers, D model width, N query heads, K key/value heads, H head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from l2a_jax.attention.reference import real_tokens, segment_starts
from l2a_jax.config import L2AConfig, ModelConfig, position_limit, rope_of
from l2a_jax.errors import UserError
from l2a_jax.models.layer import Context, LayerRouting, attend, join_projections
from l2a_jax.models.params import Tree, as_module, check_layers, from_module, init_params, output_matrix
from l2a_jax.nn.layers import gated_mlp, rms_norm
from l2a_jax.nn.rope import rope_table


class Output(NamedTuple):
    """Logits [B, T, V] in float32, and what every layer decided (None for a plain model)."""

    logits: Float[Array, "B T V"]
    routing: LayerRouting | None


def hidden_states(
    params: Tree,
    tokens: Int[Array, "B T"],
    config: ModelConfig,
    l2a_config: L2AConfig | None = None,
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    decisions: Bool[Array, "L B T"] | None = None,
    pruned: Bool[Array, " L"] | None = None,
    key: PRNGKeyArray | None = None,
    train: bool = False,
    backend: str = "auto",
    remat: Callable | bool = False,
    unroll: bool = False,
) -> tuple[Float[Array, "B T D"], LayerRouting | None]:
    """The normed output of the last layer, and the routing of every layer ([L, B, T] each; None for a plain model).

    `positions` default to 0..T-1, restarting with every document of `segment_ids`. `decisions` override the router: no
    straight-through gradient, leakage or penalty then. `pruned` says which layers never route (None: the
    configuration's `pruned_layers`), as numbers, so that one program serves every choice. `train` switches
    straight-through gradients and leakage on; `key` (already folded with seed, step and microbatch) is needed where 0 <
    leakage < 1 or 0 < flip. `remat`: recompute each layer, all but its decisions, in the backward pass; a checkpoint
    policy says what else to keep. `unroll`: a program without a loop over layers, which compiles longer and keeps what
    the backward pass needs where it was made, in place of stacking it. The compute dtype is the embedding's.

    Raises UserError on tokens outside the vocabulary (where values are known), or a sequence longer than the rotary
    embedding is meant for; ValueError on shapes that do not fit.
    """
    x, routing, _ = _run(params, tokens, config, l2a_config, positions, segment_ids, decisions, key, train, backend,
                         remat, unroll, None, pruned)
    return rms_norm(x, params["norm_final"], config.rms_norm_eps), routing


def probe_layers(
    params: Tree,
    tokens: Int[Array, "B T"],
    config: ModelConfig,
    l2a_config: L2AConfig | None = None,
    *,
    probe: Callable[[Float[Array, "B T D"]], Any],
    positions=None,
    segment_ids=None,
    decisions=None,
    key=None,
    train: bool = False,
    backend: str = "auto",
) -> Any:
    """`probe` of the residual stream after each layer, stacked on a leading L (entry 0 of L + 1 is the embedding)."""
    return _run(params, tokens, config, l2a_config, positions, segment_ids, decisions, key, train, backend, False,
                False, probe)[2]


def unembed(params: Tree, hidden: Float[Array, "B T D"], config: ModelConfig) -> Float[Array, "B T V"]:
    """Logits in float32."""
    kernel = output_matrix(params, config).astype(hidden.dtype)
    return jnp.einsum("btd,vd->btv", hidden, kernel, preferred_element_type=jnp.float32)


def forward(params: Tree, tokens: Int[Array, "B T"], config: ModelConfig, l2a_config: L2AConfig | None = None,
            **options: Any) -> Output:
    """Logits of every position; `options` are those of `hidden_states`."""
    hidden, routing = hidden_states(params, tokens, config, l2a_config, **options)
    return Output(unembed(params, hidden, config), routing)


def _run(params, tokens, config, l2a_config, positions, segment_ids, decisions, key, train, backend, remat, unroll,
         probe, pruned=None):
    _check(params, tokens, config, l2a_config, segment_ids, decisions, key, train)
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if positions is None:
        positions = index if segment_ids is None else index - segment_starts(segment_ids, tokens.shape)
    context = Context(
        config=config,
        l2a=l2a_config,
        rope=rope_table(positions, config, rope_of(config, l2a_config)),
        segment_ids=segment_ids,
        real=real_tokens(segment_ids, tokens.shape),
        train=train and decisions is None,
        backend=backend,
    )

    def block(x, inputs):
        layer, forced, layer_key, pruned = inputs
        x, routing = attend(x, layer, context, forced, layer_key, pruned)
        x = checkpoint_name(x, "residual")
        x = x + gated_mlp(rms_norm(x, layer["norm_mlp"], config.rms_norm_eps), layer["mlp"])
        return x, (routing, None if probe is None else probe(x))

    if remat:
        # prevent_cse is for remat outside a loop, where the second computation would be merged with the first; inside
        # one it would only block fusion.
        policies = jax.checkpoint_policies
        keep = policies.save_only_these_names("decisions")  # see `attend`; whatever else is kept or not
        policy = keep if remat is True else policies.save_from_both_policies(keep, remat)
        block = jax.checkpoint(block, policy=policy, prevent_cse=unroll)

    layers = jnp.arange(config.num_layers)
    keys = None if key is None else jax.vmap(lambda layer: jax.random.fold_in(key, layer))(layers)
    if pruned is None and l2a_config is not None and l2a_config.pruned_layers:
        pruned = jnp.isin(layers, jnp.asarray(l2a_config.pruned_layers))
    x = params["embed"]["embedding"][tokens]
    start = None if probe is None else probe(x)
    # Without a loop: one concatenation for all layers, and one slice of its gradient, in place of one a layer.
    stack = join_projections(params["layers"]) if unroll else params["layers"]
    x, (routing, probed) = jax.lax.scan(block, x, (stack, decisions, keys, pruned),
                                        unroll=config.num_layers if unroll else 1)
    if probe is not None:
        probed = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, probed)
    return x, routing, probed


def _check(params, tokens, config, l2a_config, segment_ids, decisions, key, train):
    if tokens.ndim != 2:
        raise ValueError(f"tokens are {tokens.shape}; expected [B, T]")
    if ("router" in params["layers"]) != (l2a_config is not None):
        have = "a router" if "router" in params["layers"] else "no router"
        raise ValueError(f"the parameters have {have}, but l2a_config is {l2a_config}; see add_routing")
    limit = position_limit(config, l2a_config)
    if tokens.shape[1] > limit:
        raise UserError(f"a sequence of {tokens.shape[1]} tokens is longer than max_positions x factor = {limit}; "
                        "shorten it or choose a larger RoPE factor")
    if segment_ids is not None and segment_ids.shape != tokens.shape:
        raise ValueError(f"segment_ids are {segment_ids.shape}; expected {tokens.shape}")
    if l2a_config is not None:
        check_layers(config, l2a_config)
        draws = 0 < l2a_config.leakage < 1 or l2a_config.flip > 0
        if train and decisions is None and draws and key is None:
            raise ValueError(f"training with leakage {l2a_config.leakage} and flip {l2a_config.flip} draws at random: "
                             "give a key")
    if decisions is not None:
        if l2a_config is None:
            raise ValueError("decisions were given, but the model has no L2A layer")
        if decisions.shape != (config.num_layers, *tokens.shape):
            raise ValueError(f"decisions are {decisions.shape}; expected [L, B, T] = "
                             f"{(config.num_layers, *tokens.shape)}")
    check_tokens(tokens, config)


def check_tokens(tokens: Int[Array, "*S"], config: ModelConfig) -> None:
    """Raise UserError on token ids outside the vocabulary; a gather would clamp them silently. Skipped on tracers."""
    if isinstance(tokens, jax.core.Tracer) or tokens.size == 0:
        return
    values = np.asarray(tokens)  # numpy: known tokens may be closed over by a function that is being traced
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= config.vocab_size:
        raise UserError(f"token id {low if low < 0 else high} is outside the vocabulary of {config.vocab_size}; "
                        "was the text tokenised with this model's tokenizer?")


class Qwen2(nnx.Module):
    """The same tree as NNX parameters: a container for shapes, initial values and path names.

    `Qwen2(config, l2a_config, rngs=nnx.Rngs(0))(tokens)` is `forward` over `model.tree()`.
    """

    def __init__(self, config: ModelConfig, l2a_config: L2AConfig | None = None, *, rngs: nnx.Rngs):
        self.config = config
        self.l2a_config = l2a_config
        self.params = as_module(init_params(config, rngs.params(), l2a_config))

    def tree(self) -> Tree:
        """The parameters as the plain nested dict that every function here takes."""
        return from_module(self.params)

    def __call__(self, tokens: Int[Array, "B T"], **options: Any) -> Output:
        return forward(self.tree(), tokens, self.config, self.l2a_config, **options)
