"""Training: one jitted program runs many steps of many members at once.

A member is an (arm, seed) pair. Parameters, optimizer state, data order and the arm's numbers carry a leading member
axis M; the step is vmapped over it and scanned over steps, so the host is asked for nothing between.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Integer

from l2a_jax.models.params import Tree, map_with_path
from l2a_jax.research.absorption import small_model
from l2a_jax.research.absorption.definitions import Arm, Attention, Recipe, TransformerConfig
from l2a_jax.research.absorption.distill import attention_kl
from l2a_jax.research.absorption.head_loss import summed_nll
from l2a_jax.training.step import TrainState


class ArmNumbers(NamedTuple):
    """An arm's traced side: the model's numbers, and per leaf (broadcast) what is trained and what decays, 0 or 1, and
    its learning rate as a multiple of the recipe's."""

    model: small_model.Numbers
    gate_std: Float[Array, ""]
    balance: Float[Array, ""]
    trained: Tree
    decayed: Tree
    pace: Tree


class Program(NamedTuple):
    """An arm's static side: arms of one program differ only in numbers."""

    config: TransformerConfig
    attention: Attention
    recipe: Recipe
    dense_backend: str | None = None

    @property
    def needs_key(self) -> bool:
        """Whether a step draws anything."""
        return self.config.dropout > 0 or self.attention.select == "random" or self.attention.scores == "shuffled"


def arm_numbers(arm: Arm, config: TransformerConfig, recipe: Recipe, top_k: int) -> ArmNumbers:
    """Numbers and masks of an arm, without member axis (numpy)."""
    gated = np.isin(np.arange(config.layers), range(config.layers) if arm.gated_layers is None else arm.gated_layers)
    free = ~np.isin(np.arange(config.layers), arm.frozen_qkv)
    uses_gate = arm.attention.soft != "none" or arm.attention.select == "gate"
    gate_trained = gated & uses_gate & arm.gate_trained

    def per_leaf(gate, path, shape):
        ones = (1,) * (len(shape) - 1)
        if path.startswith("layers/gate"):
            return gate.astype(np.float32).reshape(-1, *ones)
        if path.startswith(("layers/attention/q", "layers/attention/k", "layers/attention/v")):
            return free.astype(np.float32).reshape(-1, *ones)
        if path.startswith("layers/router"):
            return np.full((1, *ones), float(arm.routing == "learned"), np.float32)
        return np.ones((1, *ones), np.float32)

    shapes = small_model.param_shapes(config)
    numbers = small_model.Numbers(np.asarray(top_k, np.int32), gated, np.asarray(arm.routing == "hash"))
    # A gate that no gradient reaches stays out of the decay too, as in torch, whose optimizer skips such parameters.
    decaying = gate_trained & arm.attention.gate_has_gradient
    return ArmNumbers(
        numbers, np.float32(config.gate_std if arm.gate_std is None else arm.gate_std),
        np.float32(recipe.balance if arm.routing == "learned" else 0.0),
        map_with_path(functools.partial(per_leaf, gate_trained), shapes),
        map_with_path(functools.partial(per_leaf, decaying), shapes),
        map_with_path(lambda path, shape: np.full((1,) * len(shape), arm.gate_rate if path.startswith("layers/gate")
                                                  else arm.rate, np.float32), shapes))


def member_axis(arms: Sequence[ArmNumbers], seeds: int) -> ArmNumbers:
    """The numbers of arms x seeds members, arm by arm: leaves [M, ...]."""
    return jax.tree.map(lambda *leaves: np.repeat(np.stack(leaves), seeds, axis=0), *arms)


@functools.partial(jax.jit, static_argnames=("config",))
def init_members(seeds: Integer[Array, " M"], gate_std: Float[Array, " M"], *, config: TransformerConfig) -> TrainState:
    """Step 0 of every member."""
    params = jax.vmap(lambda seed, std: small_model.init_params(config, jax.random.key(seed), std))(seeds, gate_std)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.vmap(optax.scale_by_adam().init)(params),
                      jnp.ones((), bool))


def learning_rate(step: Int[Array, ""], recipe: Recipe) -> Float[Array, ""]:
    """Linear warm-up over `warmup` steps to the peak, then a cosine to 0 at `steps`. The first step's is above 0."""
    warmup = min(recipe.warmup, recipe.steps - 1)
    rising = (step + 1) / max(warmup, 1)
    done = (step + 1 - warmup) / (recipe.steps - warmup)
    return recipe.learning_rate * jnp.where(step < warmup, rising, 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1))))


def windows(stream: Integer[Array, " W"], starts: Int[Array, " B"], length: int) -> Int[Array, "B T_plus_1"]:
    """Windows of T + 1 tokens."""
    return stream[starts[:, None] + jnp.arange(length + 1)].astype(jnp.int32)


def loss(params: Tree, tokens: Int[Array, "B T_plus_1"], numbers: ArmNumbers, key: Any, program: Program
         ) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What is minimised, and the language model's part of it: nats per token."""
    dtype = jnp.dtype(program.recipe.dtype)
    attention = program.attention
    hidden, aux = small_model.hidden_states(
        params, tokens[:, :-1], program.config, attention, numbers.model, key=key, train=True, dtype=dtype,
        probe=functools.partial(attention_kl, name="gate", config=program.config) if attention.indexer else None,
        dense_backend=program.dense_backend)
    targets = tokens[:, 1:].reshape(-1)
    nll = summed_nll(hidden.reshape(-1, hidden.shape[-1]), small_model.head_kernel(params), targets) / targets.size
    total = nll
    if attention.indexer:
        total += jnp.mean(aux["probed"])
    if program.config.experts:
        total += numbers.balance * jnp.mean(aux["balance"])
    return total, nll


def update(step: Int[Array, ""], params: Tree, adam: Any, gradients: Tree, numbers: ArmNumbers, recipe: Recipe
           ) -> tuple[Tree, Any, Float[Array, ""]]:
    """AdamW on what is trained: frozen leaves neither move nor decay, nor count in the clipped norm."""
    gradients = jax.tree.map(jnp.multiply, gradients, numbers.trained)
    norm = optax.tree.norm(gradients)
    gradients = jax.tree.map(lambda g: g * jnp.minimum(1.0, recipe.clip / jnp.maximum(norm, 1e-12)), gradients)
    updates, adam = optax.scale_by_adam(recipe.beta1, recipe.beta2).update(gradients, adam)
    rate = learning_rate(step, recipe)
    params = jax.tree.map(
        lambda p, u, trained, decayed, pace: p - rate * pace * (u * trained + recipe.weight_decay * decayed * p),
        params, updates, numbers.trained, numbers.decayed, numbers.pace)
    return params, adam, norm


@functools.partial(jax.jit, static_argnames=("program",), donate_argnames=("state",))
def train_chunk(
    state: TrainState,
    stream: Integer[Array, " W"],
    starts: Int[Array, "n M B"],
    seeds: Integer[Array, " M"],
    numbers: ArmNumbers,
    *,
    program: Program,
) -> tuple[TrainState, dict[str, Float[Array, "n M"]]]:
    """n steps of all members; metrics of each: loss in nats, norms of the gradient and of the gate's alone (raw: also
    where the gate is frozen)."""
    recipe = program.recipe

    def member(step, params, adam, seed, starts, numbers):
        tokens = windows(stream, starts, recipe.seq_len)
        key = jax.random.fold_in(jax.random.key(seed), step) if program.needs_key else None
        (_, nll), gradients = jax.value_and_grad(loss, has_aux=True)(params, tokens, numbers, key, program)
        gate_norm = optax.tree.norm(gradients["layers"]["gate"])
        params, adam, norm = update(step, params, adam, gradients, numbers, recipe)
        return params, adam, {"loss": nll, "grad_norm": norm, "gate_grad_norm": gate_norm}

    def step(state, starts):
        params, adam, metrics = jax.vmap(member, in_axes=(None, 0, 0, 0, 0, 0))(
            state.step, state.trainable, state.optimizer, seeds, starts, numbers)
        healthy = state.healthy & jnp.all(jnp.isfinite(metrics["loss"])) & jnp.all(jnp.isfinite(metrics["grad_norm"]))
        return TrainState(state.step + 1, params, adam, healthy), metrics

    return jax.lax.scan(step, state, starts)
