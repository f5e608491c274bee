"""AdamW with warm-up and cosine decay, a learning rate of its own for the router, and a frozen complement.

The transform is complete in itself: driven with gradients of the *whole* tree it leaves frozen leaves unchanged and
keeps no state for them. Training drives it with the trainable subtree only, where the same transform finds nothing
to freeze; clipping and norms then see the trainable gradients alone in both cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, PRNGKeyArray

from l2a_jax.models.params import Tree, map_with_path
from l2a_jax.training.regimes import keep_layers, regime_mask
from l2a_jax.training.tables import group_of


class Dials(NamedTuple):
    """The numbers of a run that its compiled step takes as arguments, so that runs differing in nothing else share it.

    `lr`, `router_lr` (the router's own) and `penalty` are maxima, `distill_share` and `saliency_share` shares,
    `target_local` is the share of decisions that `control` moves the penalty for (None: `penalty` says it), `forced`
    the share routed in each layer ([L]; None: the router decides); everything else is a count of steps. The rates peak
    after `warmup` steps and fall as a cosine to 0 at `steps`.
    """

    lr: Any
    router_lr: Any
    steps: Any
    warmup: Any = 0
    penalty: Any = 0.0
    penalty_warmup: Any = 0
    penalty_ramp: Any = 1
    distill_share: Any = 0.5
    saliency_share: Any = 0.5
    target_local: Any = None
    forced: Any = None


@dataclass(frozen=True)
class OptimizerConfig:
    """What an optimizer is compiled from: the regime says which leaves move.

    `clip` is a global norm. Decay touches matrices only: no norm, bias or router. `attention_layers`: attention moves
    in these layers alone (None: in all). `momentum_dtype` is that of the first moment (None: float32); the second stays
    float32, because at beta2 0.999 what a step changes in it is less than half of a bfloat16's last place and would
    never be seen.
    """

    regime: str
    weight_decay: float = 0.0
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    attention_layers: tuple[int, ...] | None = None
    momentum_dtype: Any = None


def learning_rate(dials: Dials, peak: Any) -> Callable:
    """Step -> learning rate. The first update already moves: warm-up counts from 1."""

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum((count + 1) / jnp.maximum(dials.warmup, 1), 1.0)
        progress = jnp.clip((count - dials.warmup) / jnp.maximum(dials.steps - dials.warmup, 1), 0.0, 1.0)
        return peak * rise * (0.5 * (1 + jnp.cos(jnp.pi * progress)))

    return schedule


def is_matrix(path: str) -> bool:
    """Whether a leaf is an attention, MLP or embedding kernel: nearly all parameters, and no norm, bias or router."""
    return path.endswith(("kernel", "embedding")) and group_of(path) != "router"


def decayed(params: Tree) -> Tree:
    """True for the matrices, which weight decay touches."""
    return map_with_path(lambda path, _: is_matrix(path), params)


def master_dtype_of(path: str, master_dtype: Any) -> Any:
    """What a trained leaf is kept in: matrices in `master_dtype`, the few others in float32, where it costs nothing."""
    return jnp.dtype(master_dtype) if is_matrix(path) else jnp.dtype(jnp.float32)


def make_optimizer(config: OptimizerConfig, dials: Dials) -> optax.GradientTransformation:
    """The regime's optimizer, for the whole tree or for its trainable part; `dials` may be traced."""

    def adamw(peak, decay):
        return optax.adamw(learning_rate(dials, peak), config.beta1, config.beta2, config.epsilon,
                           weight_decay=decay, mask=decayed, mu_dtype=config.momentum_dtype)

    def rate_of(params):
        return map_with_path(lambda path, _: "router" if group_of(path) == "router" else "rest", params)

    rates = {"router": adamw(dials.router_lr, 0.0), "rest": adamw(dials.lr, config.weight_decay)}
    trained = optax.chain(optax.clip_by_global_norm(config.clip), optax.partition(rates, rate_of))

    def trains(params):
        return jax.tree.map(lambda wanted: "trained" if wanted else "frozen", regime_mask(params, config.regime))

    everything = optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, trains)
    if config.attention_layers is None:
        return everything
    # Before, so that clipping sees what is trained; after, because decay needs no gradient.
    narrowed = optax.stateless(lambda updates, params: keep_layers(updates, config.attention_layers))
    return optax.chain(narrowed, everything, narrowed)


def widened(tree: Tree) -> Tree:
    """The leaves in float32, in which every update is computed whatever the masters are stored in."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def narrowed(updated: Tree, stored: Tree, key: PRNGKeyArray) -> Tree:
    """Float32 leaves in the dtypes of `stored`, those in bfloat16 rounded stochastically.

    To the nearest, an update below 1/256 of its weight would be lost, every time; this way it is right on average.
    """
    leaves, structure = jax.tree.flatten(updated)
    kept = [round_stochastically(new, jax.random.fold_in(key, index)) if old.dtype == jnp.bfloat16
            else new.astype(old.dtype)
            for index, (new, old) in enumerate(zip(leaves, jax.tree.leaves(stored), strict=True))]
    return jax.tree.unflatten(structure, kept)


def round_stochastically(x: Float32[Array, "*shape"], key: PRNGKeyArray) -> BFloat16[Array, "*shape"]:
    """One of the two bfloat16 around each number, the nearer the likelier, so that the expectation is `x`.

    A bfloat16 is the upper half of a float32: add a uniform 16-bit number to the lower half, and cut it off.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(upper, jnp.bfloat16), x.astype(jnp.bfloat16))
