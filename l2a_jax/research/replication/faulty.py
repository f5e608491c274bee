"""A trainer with one fault at a time, for the autopsy of "collapse" only: the library's own trainer refuses all this.

It is the plain loop that many scripts are: no check that a number is finite, NaN losses logged as 0, the last weights
kept whatever they are. The step is built from the library's functions (`hidden_states`, `cross_entropy`, the regime's
optimizer); the faults are the fields of `Fault`, all of them numbers to one compiled step, but for the masters' dtype.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float64

from l2a_jax.attention.reference import local_mask, real_tokens
from l2a_jax.data.batch import Batch, TrainingData
from l2a_jax.models.layer import Attention, Heads, Keys, LayerRouting, PerRow
from l2a_jax.models.params import Tree
from l2a_jax.models.transformer import hidden_states
from l2a_jax.nn import routing
from l2a_jax.progress import progress
from l2a_jax.training.loss import cross_entropy
from l2a_jax.training.optimizer import Dials, OptimizerConfig, make_optimizer
from l2a_jax.training.regimes import partition, regime_mask
from l2a_jax.training.step import Objective, compute_params, token_cost


class Fault(NamedTuple):
    """What is wrong with a run; a Fault with a name alone is a sound run, up to the missing checks.

    `nan_gradient`: at `when`, one number of one gradient is NaN. `nan_router`: at `when`, the router becomes NaN, and
    steps whose loss is not finite are skipped from then on, as loss scalers do. `symmetric_window`: local attention
    sees the `window` keys around a token rather than those up to it, which is not causal. `pure_bfloat16`: masters,
    optimizer state and updates of everything are bfloat16. `penalty` replaces the run's (None: the run's own).
    """

    name: str
    meaning: str
    nan_gradient: bool = False
    nan_router: bool = False
    symmetric_window: bool = False
    lr_factor: float = 1.0
    pure_bfloat16: bool = False
    penalty: float | None = None
    when: float = 0.5


FAULTS = (
    Fault("none", "a sound run"),
    Fault("NaN weights", "one NaN in one gradient; clipping by the global norm spreads it to every trained weight",
          nan_gradient=True),
    Fault("NaN router", "only the router is NaN; steps whose loss is NaN are skipped", nan_router=True),
    Fault("leak", "the local window reaches as far ahead as back", symmetric_window=True),
    Fault("learning rate", "a hundred times the run's", lr_factor=100.0),
    Fault("bfloat16", "masters, optimizer state and updates in bfloat16", pure_bfloat16=True),
    Fault("penalty", "a routing penalty of 30 on mean p^2", penalty=30.0),
)


class Trace(NamedTuple):
    """A faulty run: the last parameters, those from before a NaN came in (None: none did), and per step the loss
    (nats, without the penalty) and sparsity as logged, and whether loss and penalty were finite: where they were not,
    the loss is logged as 0. `updates_lost`: share of all updates, other than 0, that changed nothing."""

    params: Tree
    before: Tree | None
    loss: Float64[np.ndarray, " steps"]
    sparsity: Float64[np.ndarray, " steps"]
    finite: Bool[np.ndarray, " steps"]
    updates_lost: float


def train_faulty(params: Tree, data: TrainingData, fault: Fault, objective: Objective, dials: Dials,
                 optimizer: OptimizerConfig, *, seed: int = 0) -> Trace:
    """Train a routed tree for `dials.steps` steps of one micro-batch each, with `fault`. Never raises on NaN."""
    trainable, frozen = partition(params, regime_mask(params, optimizer.regime))
    masters = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.bfloat16 if fault.pure_bfloat16 else jnp.float32,
                                                  copy=True), trainable)
    state = masters, make_optimizer(optimizer, dials).init(masters)
    static = dials._replace(penalty=0.0)
    penalty = dials.penalty if fault.penalty is None else fault.penalty
    bad = int(fault.when * dials.steps) if fault.nan_gradient or fault.nan_router else None
    before, records = None, []
    with progress(f"autopsy, {fault.name}", dials.steps) as report:
        for step in range(dials.steps):
            poison = 0.0
            if step == bad:
                before = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True),
                                      compute_params(state[0], frozen, objective.dtype))
                poison = np.nan if fault.nan_gradient else 0.0
                if fault.nan_router:
                    state[0]["layers"]["router"]["kernel"] *= jnp.nan
            state, record = _step(
                *state, frozen, data.batch(step), jax.random.fold_in(jax.random.key(seed), step), step, penalty,
                fault.lr_factor, poison, fault.nan_router, fault.symmetric_window, dials=static,
                objective=objective, optimizer=optimizer)
            records.append(record)
            if step % 20 == 19 or step == dials.steps - 1:
                report(step + 1, f"step {step + 1}, loss {float(record['loss']):.4f}")
    loss, sparsity, lost, finite = (np.array([float(record[name]) for record in records])
                                    for name in ("loss", "sparsity", "lost", "finite"))
    finite = finite > 0
    return Trace(compute_params(state[0], frozen, objective.dtype), before, np.where(finite, loss, 0.0), sparsity,
                 finite, float(np.mean(lost)))


@functools.partial(jax.jit, donate_argnums=(0, 1), static_argnames=("dials", "objective", "optimizer"))
def _step(masters, optimizer_state, frozen, batch, key, step, penalty, lr_factor, poison, skip, symmetric, *,
          dials, objective, optimizer):
    real = real_tokens(batch.segment_ids, batch.tokens.shape)
    weight = routing.penalty_weight(step, maximum=penalty, warmup=dials.penalty_warmup, ramp=dials.penalty_ramp)

    def loss(masters):
        params = compute_params(masters, frozen, objective.dtype)
        hidden, routed = leaky_hidden_states(params, batch, key, symmetric, objective=objective)
        summed = cross_entropy(params, hidden, batch.targets, batch.weights, objective.config)
        nll = summed.nll / jnp.maximum(jnp.sum(batch.weights), 1.0)
        total = nll + weight * routing.penalty(routed.probabilities, real, token_cost(batch, objective))
        return total, (nll, jnp.isfinite(total), routed.decisions)

    gradients, (nll, finite, decisions) = jax.grad(loss, has_aux=True)(masters)
    leaves, structure = jax.tree.flatten(gradients)
    leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].add(jnp.asarray(poison, leaves[0].dtype))
    updates, moved_optimizer = make_optimizer(optimizer, dials).update(jax.tree.unflatten(structure, leaves),
                                                                       optimizer_state, masters)
    updates = jax.tree.map(lambda u: u * jnp.asarray(lr_factor, u.dtype), updates)
    moved = optax.apply_updates(masters, updates)
    lost = sum(jnp.sum((u != 0) & (new == old)) for u, new, old in zip(*map(jax.tree.leaves, (updates, moved, masters)),
                                                                       strict=True))
    asked = sum(jnp.sum(u != 0) for u in jax.tree.leaves(updates))
    skipped = jnp.asarray(skip) & ~finite
    state = jax.tree.map(lambda new, old: jnp.where(skipped, old, new), (moved, moved_optimizer),
                         (masters, optimizer_state))
    return state, {"loss": nll, "finite": finite, "sparsity": jnp.mean(routing.sparsity(decisions, real)),
                   "lost": lost / jnp.maximum(asked, 1)}


@dataclass
class LeakyAttention(Attention):
    """The attention of training, with a local one that is not causal where `symmetric` (a bool, perhaps traced):
    padding rows hold anything then."""

    symmetric: Any

    def local(self, q: Heads, k: Keys, v: Keys) -> Heads:
        ids, window = self.segment_ids, self.l2a.window
        causal = local_mask(ids, q.shape[:2], window=window, sinks=self.l2a.sinks)
        ahead = jnp.arange(q.shape[1])[None, :] - jnp.arange(q.shape[1])[:, None]
        future = jnp.broadcast_to((ahead > 0) & (ahead < window) & self.symmetric, causal.shape)
        if ids is not None:
            future &= ids[:, :, None] == ids[:, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=(causal | future)[:, None])

    def both(self, q: Heads, k: Keys, v: Keys, decisions: PerRow) -> tuple[Heads, Heads]:
        far, near = self.full(q, k, v), self.local(q, k, v)
        return jnp.where(decisions[:, :, None, None], far, near), jax.lax.stop_gradient(far - near)


def leaky_hidden_states(params: Tree, batch: Batch, key: Any, symmetric: Any, *, objective: Objective
                        ) -> tuple[Float[Array, "B T D"], LayerRouting]:
    """`hidden_states` of a training call with a `LeakyAttention`."""
    ids = None if batch.segment_ids is None else jnp.asarray(batch.segment_ids)
    return hidden_states(params, batch.tokens, objective.config, objective.l2a_config, segment_ids=ids, key=key,
                         train=True, remat=True,
                         attend=LeakyAttention(objective.l2a_config, ids, objective.backend, symmetric))
