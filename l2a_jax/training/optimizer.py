"""AdamW with warm-up and cosine decay, a learning rate of its own for the router, and a frozen complement.

The transform is complete in itself: driven with gradients of the *whole* tree it leaves frozen leaves unchanged and
keeps no state for them. Training drives it with the trainable subtree only, where the same transform finds nothing
to freeze; clipping and norms then see the trainable gradients alone in both cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from l2a_jax.models.params import Tree, map_with_path
from l2a_jax.training.regimes import group_of, keep_layers, regime_mask


@dataclass(frozen=True)
class OptimizerConfig:
    """`lr` peaks after `warmup` steps and decays as a cosine to `final` of it at `steps`; `clip` is a global norm.

    `router_lr` replaces `lr` for the router (None: the same). These four are numbers, or traced. Decay
    touches matrices only: no norm, bias or router.
    `attention_layers`: attention moves in these layers alone (None: in all).
    """

    lr: Any
    steps: Any
    warmup: Any = 0
    router_lr: Any = None
    weight_decay: float = 0.0
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    final: float = 0.0
    attention_layers: tuple[int, ...] | None = None


def learning_rate(config: OptimizerConfig, peak: Any) -> Callable:
    """Step -> learning rate. The first update already moves: warm-up counts from 1.

    The numbers may be traced: `step.dialled_step` takes them as arguments.
    """

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum((count + 1) / jnp.maximum(config.warmup, 1), 1.0)
        progress = jnp.clip((count - config.warmup) / jnp.maximum(config.steps - config.warmup, 1), 0.0, 1.0)
        fall = config.final + (1 - config.final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return peak * rise * fall

    return schedule


def decayed(params: Tree) -> Tree:
    """True for the matrices that weight decay touches: attention, MLP and embedding kernels."""

    def is_matrix(path, _):
        return path.endswith(("kernel", "embedding")) and group_of(path) != "router"

    return map_with_path(is_matrix, params)


def make_optimizer(config: OptimizerConfig, regime: str) -> optax.GradientTransformation:
    """The regime's optimizer, for the whole tree or for its trainable part."""

    def rate_of(params):
        return map_with_path(lambda path, _: "router" if group_of(path) == "router" else "rest", params)

    def per_rate(make):
        router = config.lr if config.router_lr is None else config.router_lr
        return optax.partition({"router": make(router, 0.0), "rest": make(config.lr, config.weight_decay)}, rate_of)

    def adamw(peak, decay):
        return optax.adamw(learning_rate(config, peak), config.beta1, config.beta2, config.epsilon,
                           weight_decay=decay, mask=decayed)

    trained = optax.chain(optax.clip_by_global_norm(config.clip), per_rate(adamw))

    def trains(params):
        return jax.tree.map(lambda wanted: "trained" if wanted else "frozen", regime_mask(params, regime))

    everything = optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, trains)
    if config.attention_layers is None:
        return everything
    # Before, so that clipping sees what is trained; after, because decay needs no gradient.
    narrowed = optax.stateless(lambda updates, params: keep_layers(updates, config.attention_layers))
    return optax.chain(narrowed, everything, narrowed)
