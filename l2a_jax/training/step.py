"""One optimiser step: accumulate gradients of the trainable subtree over micro-batches, update, report.

A loss or gradient that is not finite withholds its update and every later one (`healthy` stays False), so that the
parameters a diagnosis finds are those from before the step that failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from l2a_jax.attention.reference import real_tokens
from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.data.batch import Batch
from l2a_jax.models.layer import LayerRouting, pruned_of
from l2a_jax.models.params import Tree, by_layer, map_with_path, param_dtype, stacked
from l2a_jax.models.transformer import hidden_states
from l2a_jax.nn import routing
from l2a_jax.nn.shard import ALONE, Shard
from l2a_jax.sharding import leaves
from l2a_jax.sharding.dealt import dealt
from l2a_jax.sharding.mesh import ROWS, STACKED
from l2a_jax.training import control
from l2a_jax.training.control import Control
from l2a_jax.training.distill import distillation, everything_routed
from l2a_jax.training.loss import TokenLoss, cross_entropy, token_nll
from l2a_jax.training.optimizer import Dials, OptimizerConfig, make_optimizer, master_dtype_of, narrowed, widened
from l2a_jax.training.regimes import combine, keep_layers, partition
from l2a_jax.training.saliency import fit_to_worth
from l2a_jax.training.tables import DISTILL, MIXED, NEXT_TOKEN, SALIENCY


class TrainState(NamedTuple):
    """What training changes: the number of updates, the masters of the trainable leaves, the optimizer, and what moves
    the penalty's weight (None: its schedule)."""

    step: Int[Array, ""]
    trainable: Tree
    optimizer: Any
    healthy: Bool[Array, ""]
    control: Control | None = None


class Objective(NamedTuple):
    """The loss that a step is compiled for. `remat` and `unroll` are those of `hidden_states`, `cost` and
    `target_tokens` are those of the settings, `minimised` is their objective. `mesh`: the devices over which it is
    dealt (None: one device)."""

    config: ModelConfig
    l2a_config: L2AConfig | None
    dtype: Any = jnp.float32
    backend: str = "auto"
    remat: Callable | bool = False
    unroll: bool = False
    cost: str = "tokens"
    minimised: str = NEXT_TOKEN
    target_tokens: str = "all"
    mesh: Mesh | None = None


def initial_state(trainable: Tree, optimizer: optax.GradientTransformation, master_dtype: Any,
                  controlled: bool = False) -> TrainState:
    """Step 0: matrices' masters in `master_dtype`, the others in float32, and a fresh optimizer over them alone.
    `controlled`: the run has a target.

    Masters are copies, never views of `trainable`: a step donates its state.
    """
    masters = map_with_path(lambda path, leaf: jnp.array(leaf, master_dtype_of(path, master_dtype), copy=True),
                            trainable)
    moments = jax.jit(lambda masters: optimizer.init(widened(masters)))(masters)
    return TrainState(jnp.zeros((), jnp.int32), masters, moments, jnp.ones((), bool),
                      control.initial() if controlled else None)


def split_params(params: Tree, mask: Tree, unroll: bool) -> tuple[Tree, Tree]:
    """(trained leaves, frozen leaves) as a step takes them; an unrolled one takes the frozen layers one by one."""
    trainable, frozen = partition(params, mask)
    return trainable, jax.jit(by_layer)(frozen) if unroll else frozen


def compute_params(trainable: Tree, frozen: Tree, dtype: Any) -> Tree:
    """The whole tree in the compute dtype, the router in float32; differentiable in `trainable`."""
    return combine(map_with_path(lambda path, leaf: leaf.astype(param_dtype(path, dtype)), trainable), stacked(frozen))


_ROUNDING = 2**32 - 1
"""What a step's key is folded with for the rounding of masters: the index of no micro-batch."""


_TOLD = {NEXT_TOKEN: (), DISTILL: ("kl",), MIXED: ("kl",), SALIENCY: ("saliency", "weights")}
"""What an objective sums up besides."""


class _Sums(NamedTuple):
    """Sums over real tokens that a step reports as means; routing's are per layer. `told`: what the objective has to
    tell besides, by the name it is reported under; `local`: of decisions that a target follows (None: there is none);
    `imbalance`: of each micro-batch's routed rows over the devices of a mesh (None: there is no mesh)."""

    nll: Array
    correct: Array
    penalty: Array
    unrouted: Array
    entropy: Array
    told: dict[str, Array]
    local: Array | None
    imbalance: Array | None


def token_cost(batch: Batch, objective: Objective) -> Float[Array, "*A B T"] | None:
    """What the penalty counts of each token, over all tokens given; None: the same of all."""
    layer = objective.l2a_config
    if layer is None or objective.cost == "tokens":
        return None
    # Behind a local layer a global one reads all keys; beside it, those that local attention would not.
    keys = _keys(batch, 0, 0) if layer.topology == "sequential" else _keys(batch, layer.window, layer.sinks)
    return routing.cost_of_keys(keys, real_tokens(batch.segment_ids, batch.tokens.shape))


def target_tokens(batch: Batch, objective: Objective) -> Bool[Array, "*A B T"]:
    """The tokens whose decisions a target counts."""
    layer, real = objective.l2a_config, real_tokens(batch.segment_ids, batch.tokens.shape)
    return real if objective.target_tokens == "all" else real & (_keys(batch, layer.window, layer.sinks) > 0)


def _keys(batch: Batch, window: int, sinks: int) -> Int[Array, "*A B T"]:
    ids, shape = batch.segment_ids, batch.tokens.shape
    rows = None if ids is None else jnp.asarray(ids).reshape(-1, shape[-1])
    return routing.keys_beyond(rows, (math.prod(shape[:-1]), shape[-1]), window, sinks).reshape(shape)


def _own_decisions(routed: LayerRouting, real: Bool[Array, "B T"], objective: Objective) -> Bool[Array, "L B T"]:
    """What the router decided, before training inverted any of it or ran other decisions."""
    layer = objective.l2a_config
    if not layer.flip and objective.minimised != SALIENCY:
        return routed.decisions
    own = routing.decide(routed.logits, layer.temperature, layer.threshold) & real
    pruned = pruned_of(objective.config, layer)
    return own if pruned is None else own & ~pruned[:, None, None]


_FORCED = 2**32 - 1
"""What a run's key is folded with for decisions that are forced: the number of no step."""


def forced_decisions(key: PRNGKeyArray, rates: Float[Array, " L"] | None, shape: tuple[int, int]
                     ) -> Bool[Array, "L B T"] | None:
    """The decisions that a run of this key forces on rows of [B, T]; None where its router decides."""
    return None if rates is None else routing.frozen(jax.random.fold_in(key, _FORCED), rates, *shape)


class _Micro(NamedTuple):
    """A micro-batch or, with a leading A, all of a step: its rows, its real tokens, what the penalty counts of each,
    and those that a target follows."""

    batch: Batch
    real: Bool[Array, "*A B T"]
    cost: Float[Array, "*A B T"] | None
    followed: Bool[Array, "*A B T"] | None


class _Numbers(NamedTuple):
    """Of a whole step: the penalty's weight, the sum of all targets' weights, the number of real tokens, the run's key,
    the step's, and the dials."""

    weight: Float[Array, ""]
    counted: Float[Array, ""]
    total: Int[Array, ""]
    key: PRNGKeyArray
    step_key: PRNGKeyArray
    dials: Dials


def train_step(
    state: TrainState,
    frozen: Tree,
    batch: Batch,
    key: PRNGKeyArray,
    dials: Dials,
    *,
    objective: Objective,
    optimizer: OptimizerConfig,
) -> tuple[TrainState, dict[str, Array]]:
    """One update from the A micro-batches of `batch` ([A, B, T] each), and its metrics.

    Loss and penalty are means over all tokens of the step, so a micro-batch counts by its tokens. `key` is the run's:
    leakage draws from fold_in(key, step, microbatch, layer). `dials` may be traced.
    """
    real = real_tokens(batch.segment_ids, batch.tokens.shape)
    counted = jnp.maximum(jnp.sum(batch.weights), 1.0)
    total = jnp.maximum(jnp.sum(real), 1)
    if state.control is None:
        weight = routing.penalty_weight(state.step, maximum=dials.penalty, warmup=dials.penalty_warmup,
                                        ramp=dials.penalty_ramp)
    else:
        weight = control.penalty_weight(state.control, state.step, dials)
    followed = None if state.control is None else target_tokens(batch, objective)
    step_key = jax.random.fold_in(key, state.step)
    cost = token_cost(batch, objective)
    gradients, sums = _summed(state.trainable, frozen, _Micro(batch, real, cost, followed),
                              _Numbers(weight, counted, total, key, step_key, dials), objective)

    told = dict(sums.told)
    if objective.minimised == SALIENCY:
        weights = jnp.maximum(told.pop("weights"), jnp.finfo(jnp.float32).tiny)
        gradients, told = jax.tree.map(lambda x: x / weights, (gradients, told))
    gradients = keep_layers(gradients, optimizer.attention_layers)
    norm = optax.tree.norm(gradients)
    mean_nll = sums.nll / counted
    healthy = state.healthy & jnp.isfinite(mean_nll) & jnp.isfinite(norm) & jnp.isfinite(sums.penalty)
    masters = widened(state.trainable)
    updates, optimizer_state = make_optimizer(optimizer, dials).update(gradients, state.optimizer, masters)
    masters = narrowed(optax.apply_updates(masters, updates), state.trainable,
                       jax.random.fold_in(step_key, _ROUNDING))
    controlled = None
    if state.control is not None:
        local = sums.local / jnp.sum(followed)
        told |= {"local": local, "target": control.reference(state.control, state.step, dials)}
        controlled = control.updated(state.control, local, state.step, dials)
    updated = TrainState(state.step + 1, masters, optimizer_state, healthy, controlled)
    state = jax.tree.map(lambda new, old: jnp.where(healthy, new, old), updated, state._replace(healthy=healthy))

    metrics = {"loss": mean_nll, "accuracy": sums.correct / counted, "grad_norm": norm, "tokens": total,
               "healthy": healthy, **told}
    if objective.l2a_config is not None:
        metrics |= {"sparsity": jnp.mean(sums.unrouted), "sparsity_per_layer": sums.unrouted,
                    "router_entropy": jnp.mean(sums.entropy), "penalty": sums.penalty, "penalty_weight": weight}
        if sums.imbalance is not None:
            metrics["routed_imbalance"] = sums.imbalance / len(real)
        if "router" in gradients.get("layers", {}):
            metrics["router_grad_norm"] = optax.tree.norm(gradients["layers"]["router"])
    return state, metrics


def _summed(trainable: Tree, frozen: Tree, micros: _Micro, numbers: _Numbers, objective: Objective
            ) -> tuple[Tree, _Sums]:
    """The gradients of a step in `trainable`, and its sums; over a mesh, each device's and then all devices'."""
    mesh = objective.mesh
    if mesh is None:
        return _summed_here(trainable, frozen, micros, numbers, objective, ALONE)
    shard = dealt(mesh, objective.config, objective.l2a_config, objective.dtype)
    masters, base = leaves.specs(trainable, mesh.size), leaves.specs(frozen, mesh.size)

    def on_device(*given):
        gradients, sums = _summed_here(*given, objective, shard)
        return leaves.summed(gradients, masters), shard.total(sums)

    return jax.shard_map(on_device, mesh=mesh, in_specs=(masters, base, STACKED, P()), out_specs=(masters, P()),
                         check_vma=False)(trainable, frozen, micros, numbers)


def _summed_here(trainable: Tree, frozen: Tree, micros: _Micro, numbers: _Numbers, objective: Objective,
                 shard: Shard) -> tuple[Tree, _Sums]:
    """`_summed` of the tokens that `shard` holds."""
    weight, counted, total, key, step_key, dials = numbers
    layers = objective.config.num_layers

    def forced(shape):
        if dials.forced is None:
            return None
        return shard.drawn(lambda whole: forced_decisions(key, dials.forced, whole[1:]), (layers, *shape))

    def forward(trainable, micro, **options):
        if shard is ALONE:
            params = compute_params(trainable, frozen, objective.dtype)
        else:  # masters are cast where they are gathered, and their gradients summed in their own dtype
            params = shard.ends(combine(trainable, stacked(frozen)))
        return params, *hidden_states(
            params, micro.tokens, objective.config, objective.l2a_config, positions=micro.positions,
            segment_ids=micro.segment_ids, backend=objective.backend, remat=objective.remat, unroll=objective.unroll,
            shard=shard, **{"decisions": forced(micro.tokens.shape), **options})

    def sums_of(summed, routed, real, cost, followed, told):
        local = None
        if followed is not None:
            local = jnp.sum(~_own_decisions(routed, real, objective) & followed) / layers
        share = jnp.sum(real) / total  # a micro-batch's part of the mean over all real tokens
        penalty = routing.penalty(routed.probabilities, real, cost) * share
        return _Sums(summed.nll, summed.correct, penalty, routing.sparsity(routed.decisions, real) * share,
                     routing.entropy(routed.probabilities, real) * share, told, local,
                     shard.imbalance(routed.decisions))

    def loss(trainable, micro, real, cost, followed, micro_key):
        params, hidden, routed = forward(trainable, micro, key=micro_key, train=True)
        told = {}
        if objective.minimised == NEXT_TOKEN:
            summed = cross_entropy(params, hidden, micro.targets, micro.weights, objective.config)
            minimised = summed.nll / counted
        else:
            teacher = everything_routed(params, micro, objective.config, objective.l2a_config,
                                        backend=objective.backend, unroll=objective.unroll, shard=shard)
            part = 1.0 if objective.minimised == DISTILL else dials.distill_share
            # A document's last token, whose target counts nowhere, has a divergence all the same.
            each = real * jnp.maximum(micro.weights, 1.0)
            found = distillation(params, hidden, teacher, micro.targets, (1 - part) / counted * micro.weights,
                                 part / total * each, objective.config)
            minimised, told = found.loss, {"kl": jnp.sum(real * found.kl) / total}
            summed = TokenLoss(jnp.sum(micro.weights * found.nll), jnp.sum(micro.weights * found.correct))
        if routed is None:
            nothing = jnp.zeros(layers)
            return minimised, _Sums(summed.nll, summed.correct, jnp.zeros(()), nothing, nothing, told, None, None)
        sums = sums_of(summed, routed, real, cost, followed, told)
        return minimised + weight * sums.penalty, jax.lax.stop_gradient(sums)

    def saliency(trainable, micro, real, cost, followed, micro_key):
        price = weight * counted / (layers * total) * (jnp.ones(real.shape) if cost is None else cost)
        decisions = shard.drawn(lambda shape: routing.random(micro_key, jnp.full(layers, dials.saliency_share),
                                                             *shape[1:]), (layers, *real.shape))
        gradients, found = fit_to_worth(forward, trainable, micro, real, decisions, price, objective.config,
                                        objective.l2a_config)
        return gradients, sums_of(found.next_token, found.routed, real, cost, followed,
                                  {"saliency": found.loss, "weights": found.weights})

    of_micro_batch = saliency if objective.minimised == SALIENCY else jax.grad(loss, has_aux=True)

    def accumulate(carry, inputs):
        micro, index = inputs
        gradients, sums = of_micro_batch(trainable, *jax.tree.map(shard.tokens, micro),
                                         jax.random.fold_in(step_key, index))
        return jax.tree.map(jnp.add, carry, (widened(gradients), sums)), None

    nothing = _Sums(*(jnp.zeros(()),) * 3, *(jnp.zeros(layers),) * 2,
                    {name: jnp.zeros(()) for name in _TOLD[objective.minimised]},
                    None if micros.followed is None else jnp.zeros(()),
                    None if shard is ALONE or objective.l2a_config is None else jnp.zeros(()))
    zeros = jax.tree.map(jnp.zeros_like, widened(trainable)), nothing
    inputs = (micros, jnp.arange(len(micros.real)))
    if len(micros.real) == 1:  # no second copy of the gradients where there is nothing to add
        found, _ = accumulate(zeros, jax.tree.map(lambda x: x[0], inputs))
    else:
        found, _ = jax.lax.scan(accumulate, zeros, inputs)
    return found


class Evaluation(NamedTuple):
    """A held-out batch: per token the nats and whether the top token was right; routing as the model decided."""

    nll: Float[Array, "B T"]
    correct: Bool[Array, "B T"]
    real: Bool[Array, "B T"]
    decisions: Bool[Array, "L B T"] | None


def evaluate_batch(params: Tree, batch: Batch, decisions: Bool[Array, "L B T"] | None,
                   cut: Float[Array, " L"] | None = None, *, objective: Objective) -> Evaluation:
    """Score one batch under the router's own decisions, or under `decisions`; `cut` is that of `hidden_states`."""
    mesh = objective.mesh
    if mesh is None:
        return _scored(params, batch, decisions, cut, objective, ALONE)
    shard = dealt(mesh, objective.config, objective.l2a_config, objective.dtype)
    on_device = jax.shard_map(lambda *given: _scored(*given, objective, shard), mesh=mesh,
                              in_specs=(leaves.specs(params, mesh.size), ROWS, STACKED, P()),
                              out_specs=Evaluation(ROWS, ROWS, ROWS, STACKED), check_vma=False)
    return on_device(params, batch, decisions, cut)


def _scored(params: Tree, batch: Batch, decisions: Bool[Array, "L B T"] | None, cut: Float[Array, " L"] | None,
            objective: Objective, shard: Shard) -> Evaluation:
    """The rows that `shard` has a part of, whole."""
    params, (batch, decisions) = shard.ends(params), jax.tree.map(shard.tokens, (batch, decisions))
    real = real_tokens(batch.segment_ids, batch.tokens.shape)
    hidden, routed = hidden_states(params, batch.tokens, objective.config, objective.l2a_config,
                                   positions=batch.positions, segment_ids=batch.segment_ids, decisions=decisions,
                                   cut=cut, backend=objective.backend, shard=shard)
    nll, correct = token_nll(params, hidden, batch.targets, objective.config)
    found = Evaluation(nll, correct, real, None if routed is None else routed.decisions)
    return jax.tree.map(shard.joined, found)
