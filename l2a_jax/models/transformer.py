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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from l2a_jax.attention.reference import real_tokens
from l2a_jax.config import L2AConfig, ModelConfig, position_limit
from l2a_jax.errors import UserError
from l2a_jax.models.layer import Attention, LayerRouting, OfLayer, block, context_of, join_projections, pruned_of
from l2a_jax.models.params import Tree, check_layers, init_params, output_matrix
from l2a_jax.nn.layers import rms_norm
from l2a_jax.nn.shard import ALONE, Shard


class Output(NamedTuple):
    """Logits [B, T, V] in float32, and what every layer decided (None for a plain model)."""

    logits: Float[Array, "B T V"]
    routing: LayerRouting | None


def hidden_states(
    params: Tree, tokens: Int[Array, "B T"], config: ModelConfig, l2a_config: L2AConfig | None = None, *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    decisions: Bool[Array, "L B T"] | None = None,
    pruned: Bool[Array, " L"] | None = None,
    heads: Bool[Array, "L K"] | None = None,
    cut: Float[Array, " L"] | None = None,
    nudge: Float[Array, "L B T"] | None = None,
    price: Float[Array, "L B T"] | None = None,
    key: PRNGKeyArray | None = None,
    train: bool = False, backend: str = "auto", remat: Callable | bool = False, unroll: bool = False,
    attend: Attention | None = None, shard: Shard = ALONE,
) -> tuple[Float[Array, "B T D"], LayerRouting | None]:
    """The normed output of the last layer, and the routing of every layer ([L, B, T] each; None for a plain model).

    `positions` default to 0..T-1, restarting with every document of `segment_ids`. `decisions` override the router: no
    straight-through gradient, leakage or penalty then. Of each layer, as numbers, so that one program serves every
    choice: `pruned`, whether it never routes (None: as the configuration says); `cut`, the router logit from which on
    a token is routed (None: as the configuration's threshold says); `heads`, the key/value heads that see everything
    whatever is decided (shared attention; arXiv 2410.10819 calls them retrieval heads). `nudge` is added to the
    decisions: zeros, for the gradient with respect to every decision, for which global attention of every real row is
    computed; with a `price` in nats a routed token, their gradient fits the router (`routing.fitted`). `heads` and
    `nudge` are not for training.

    `train` switches straight-through gradients and leakage on; `key` (already folded with seed, step and microbatch) is
    needed where 0 < leakage < 1, 0 < flip or 0 < explore. `remat`: recompute each layer, all but its decisions, in the
    backward pass; a checkpoint policy says what else to keep. `unroll`: a program without a loop over layers, which
    compiles longer and keeps what the backward pass needs where it was made, in place of stacking it. `attend`:
    attention functions to use in place of those of `backend`. `shard`: what this device holds where several compute the
    call; the tokens are then its part, and so are all arrays beside them. The compute dtype is the embedding's.

    Raises UserError on tokens outside the vocabulary (where values are known), or a sequence longer than the rotary
    embedding is meant for; ValueError on shapes that do not fit.
    """
    options = _Pass(positions, segment_ids, decisions, pruned, heads, cut, nudge, price, key, train, backend,
                    remat, unroll, attend, shard)
    x, routing, _ = _run(params, tokens, config, l2a_config, options)
    return rms_norm(x, params["norm_final"], config.rms_norm_eps), routing


def probe_layers(params: Tree, tokens: Int[Array, "B T"], config: ModelConfig, l2a_config: L2AConfig | None = None, *,
                 probe: Callable[[Float[Array, "B T D"]], Any], **options: Any) -> Any:
    """`probe` of the residual stream after each layer, stacked on a leading L + 1 (entry 0 is the embedding);
    `options` are those of `hidden_states`."""
    return _run(params, tokens, config, l2a_config, _Pass(**options), probe)[2]


def unembed(params: Tree, hidden: Float[Array, "B T D"], config: ModelConfig) -> Float[Array, "B T V"]:
    """Logits in float32."""
    kernel = output_matrix(params, config).astype(hidden.dtype)
    return jnp.einsum("btd,vd->btv", hidden, kernel, preferred_element_type=jnp.float32)


def forward(params: Tree, tokens: Int[Array, "B T"], config: ModelConfig, l2a_config: L2AConfig | None = None,
            **options: Any) -> Output:
    """Logits of every position; `options` are those of `hidden_states`."""
    hidden, routing = hidden_states(params, tokens, config, l2a_config, **options)
    return Output(unembed(params, hidden, config), routing)


class _Pass(NamedTuple):
    """The options of `hidden_states`."""

    positions: Int[Array, "B T"] | None = None
    segment_ids: Int[Array, "B T"] | None = None
    decisions: Bool[Array, "L B T"] | None = None
    pruned: Bool[Array, " L"] | None = None
    heads: Bool[Array, "L K"] | None = None
    cut: Float[Array, " L"] | None = None
    nudge: Float[Array, "L B T"] | None = None
    price: Float[Array, "L B T"] | None = None
    key: PRNGKeyArray | None = None
    train: bool = False
    backend: str = "auto"
    remat: Callable | bool = False
    unroll: bool = False
    attend: Attention | None = None
    shard: Shard = ALONE


def _run(
    params: Tree, tokens: Int[Array, "B T"], config: ModelConfig, l2a_config: L2AConfig | None, options: _Pass,
    probe: Callable[[Float[Array, "B T D"]], Any] | None = None,
) -> tuple[Float[Array, "B T D"], LayerRouting | None, Any]:
    """The residual stream after the last layer, the routing, and what `probe` saw."""
    _check(params, tokens, config, l2a_config, options)
    ids, positions, shard = options.segment_ids, options.positions, options.shard
    if positions is None:
        positions = shard.positions(ids, tokens.shape)
    context = context_of(config, l2a_config, positions, real_tokens(ids, tokens.shape),
                         options.attend or shard.attention(Attention(l2a_config, ids, options.backend)),
                         options.train and options.decisions is None, shard)

    def one(x, inputs):
        layer, given = inputs
        x, routing = block(x, shard.gathered(layer), context, given)
        return x, (routing, None if probe is None else probe(x))

    if options.remat:
        # prevent_cse is for remat outside a loop, where the second computation would be merged with the first; inside
        # one it would only block fusion.
        policies = jax.checkpoint_policies
        keep = policies.save_only_these_names("decisions")  # see `decide`; whatever else is kept or not
        policy = keep if options.remat is True else policies.save_from_both_policies(keep, options.remat)
        one = jax.checkpoint(one, policy=policy, prevent_cse=options.unroll)

    layers = jnp.arange(config.num_layers)
    keys = None if options.key is None else jax.vmap(lambda layer: jax.random.fold_in(options.key, layer))(layers)
    pruned = pruned_of(config, l2a_config) if options.pruned is None else options.pruned
    given = OfLayer(options.decisions, keys, pruned, options.heads, options.cut, options.nudge,
                    options.price)
    x = params["embed"]["embedding"][tokens]
    start = None if probe is None else probe(x)
    # Without a loop: one concatenation for all layers, and one slice of its gradient, in place of one a layer. Not of
    # what a device holds of each: that would have to be sorted after it is gathered.
    join = options.unroll and shard is ALONE
    stack = join_projections(params["layers"]) if join else params["layers"]
    x, (routing, probed) = jax.lax.scan(one, x, (stack, given),
                                        unroll=config.num_layers if options.unroll else 1)
    if probe is not None:
        probed = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, probed)
    return x, routing, probed


def _check(params: Tree, tokens: Int[Array, "*S"], config: ModelConfig, l2a_config: L2AConfig | None,
           options: _Pass) -> None:
    segment_ids, decisions = options.segment_ids, options.decisions
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
        draws = 0 < l2a_config.leakage < 1 or l2a_config.flip > 0 or l2a_config.explore > 0
        if options.train and decisions is None and draws and options.key is None:
            raise ValueError(f"training with leakage {l2a_config.leakage}, flip {l2a_config.flip} and explore "
                             f"{l2a_config.explore} draws at random: give a key")
    if decisions is not None:
        if l2a_config is None:
            raise ValueError("decisions were given, but the model has no L2A layer")
        if decisions.shape != (config.num_layers, *tokens.shape):
            raise ValueError(f"decisions are {decisions.shape}; expected [L, B, T] = "
                             f"{(config.num_layers, *tokens.shape)}")
    check_heads(options.heads, config, l2a_config, options.train)
    if options.nudge is not None and (options.train or l2a_config is None):
        raise ValueError("a nudge is for decisions outside training")
    if options.price is not None and options.nudge is None:
        raise ValueError("a price is for what a nudge finds; give both")
    check_tokens(tokens, config)


def check_heads(heads: Bool[Any, "L K"] | None, config: ModelConfig, l2a_config: L2AConfig | None,
                train: bool = False) -> None:
    """Raise ValueError where key/value heads cannot be opened: they share one set and one cache with the window."""
    if heads is None:
        return
    if l2a_config is None or not l2a_config.share_attention or l2a_config.pruned_layers or train:
        raise ValueError(f"heads that see everything need a shared layer without pruned ones, outside training; "
                         f"this is {l2a_config}")
    if heads.shape != (config.num_layers, config.num_kv_heads):
        raise ValueError(f"heads are {heads.shape}; expected [L, K] = {(config.num_layers, config.num_kv_heads)}")


def check_tokens(tokens: Int[Any, "*S"], config: ModelConfig, where: str = "") -> None:
    """Raise UserError, beginning with `where`, on token ids outside the vocabulary; a gather would clamp them silently.
    Skipped on tracers."""
    if isinstance(tokens, jax.core.Tracer) or tokens.size == 0:
        return
    values = np.asarray(tokens)  # numpy: known tokens may be closed over by a function that is being traced
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= config.vocab_size:
        raise UserError(f"{where}token id {low if low < 0 else high} is outside the vocabulary of {config.vocab_size}; "
                        "was the text tokenised with this model's tokenizer?")


class _Node(nnx.Module):
    """One level of the tree: attributes are parameters or further levels."""

    def __init__(self, tree: Tree):
        for name, value in tree.items():
            setattr(self, name, _Node(value) if isinstance(value, dict) else nnx.Param(value))


class Qwen2(nnx.Module):
    """The same tree as NNX parameters: a container for shapes, initial values and path names.

    `Qwen2(config, l2a_config, rngs=nnx.Rngs(0))(tokens)` is `forward` over `model.tree()`.
    """

    def __init__(self, config: ModelConfig, l2a_config: L2AConfig | None = None, *, rngs: nnx.Rngs):
        self.config = config
        self.l2a_config = l2a_config
        self.params = _Node(init_params(config, rngs.params(), l2a_config))

    def tree(self) -> Tree:
        """The parameters as the plain nested dict that every function here takes."""
        return nnx.to_pure_dict(nnx.state(self.params, nnx.Param))

    def __call__(self, tokens: Int[Array, "B T"], **options: Any) -> Output:
        return forward(self.tree(), tokens, self.config, self.l2a_config, **options)
