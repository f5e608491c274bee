"""A run before it runs: what its settings mean for this source, data and device, and its compiled step.

    settings -> shapes -> data -> compiled step and its memory estimate -> weights
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from l2a_jax import device
from l2a_jax.attention import api as attention
from l2a_jax.config import MODELS, L2AConfig, ModelConfig, position_limit
from l2a_jax.data.batch import Batch, TrainingData
from l2a_jax.data.changes import difference
from l2a_jax.data.curriculum import Curriculum, make_curriculum
from l2a_jax.data.dataset import open_data
from l2a_jax.data.recall import RecallCorpus
from l2a_jax.errors import UserError
from l2a_jax.models.params import Tree, abstract_params, add_routing, init_params
from l2a_jax.sharding import leaves, processes
from l2a_jax.sharding import mesh as meshes
from l2a_jax.sharding.axes import Axes, parse
from l2a_jax.sources import TINY, load_pretrained, read_config, recall_tokenizer, source_tokenizer
from l2a_jax.training import memory
from l2a_jax.training.estimate import Held, held
from l2a_jax.training.optimizer import Dials, OptimizerConfig, make_optimizer
from l2a_jax.training.presets import RECALL_EMPHASIS
from l2a_jax.training.regimes import regime_mask
from l2a_jax.training.run_files import RunConfig
from l2a_jax.training.settings import (
    Settings,
    adapt_layer,
    as_used,
    asked_by,
    check_target,
    compiled_in,
    layer_of,
    model_of,
    steps_of,
)
from l2a_jax.training.step import (
    Objective,
    TrainState,
    compute_params,
    evaluate_batch,
    forced_decisions,
    initial_state,
    split_params,
    train_step,
)
from l2a_jax.training.tables import PLAIN_REGIMES, check_attention_layers, check_objective

log = logging.getLogger("l2a_jax")
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


class RunPlan(NamedTuple):
    """A run before anything is allocated: the settings, and what they mean for this source, data and device."""

    settings: Settings
    source: str | None  # None: fresh parameters
    config: ModelConfig
    l2a_config: L2AConfig | None
    source_routed: bool
    data: TrainingData
    tokenizer: Any
    steps: int
    dtype: Any

    @property
    def is_demo(self) -> bool:
        return not self.settings.data

    @property
    def axes(self) -> Axes | None:
        """Of the mesh; None where the run has one device."""
        return None if self.settings.mesh is None else parse(self.settings.mesh)


def read_source(source: str) -> tuple[ModelConfig, L2AConfig | None, Any]:
    """A source's configurations and tokenizer, without its tensors."""
    return *read_config(source), source_tokenizer(source)


def make_plan(settings: Settings, *, read: Callable = read_source, open_data: Callable = open_data,
              present: bool = True) -> RunPlan:
    """Resolve a run's source, layer and data. UserError where anything does not fit. No run folder is
    made, but text that is read for the first time is tokenised, and its tokens are kept.

    `read` and `open_data` do the reading; a study of many runs passes ones that remember. `present`: the devices of
    the mesh have to be there.
    """
    if settings.deterministic:
        set_deterministic()
    attention.check(settings.backend)
    dtype = jnp.dtype(settings.dtype or device.default_dtype())
    source = settings.model or (None if settings.regime == "pretrain" else TINY)
    if source is None:
        config, source_layer, tokenizer = MODELS["qwen2.5-tiny"], None, recall_tokenizer()
    else:
        config, source_layer, tokenizer = read(source)
    if source_layer is None:
        l2a_config = layer_of(settings)
    else:
        if settings.regime in PLAIN_REGIMES:
            raise UserError(f"--regime {settings.regime} trains a plain model, but {source} has an L2A layer")
        l2a_config = adapt_layer(source_layer, {name: getattr(settings, name) for name in settings.given},
                                 source, settings.preset)
        settings = as_used(settings, l2a_config)
    config = model_of(settings, config)
    check_objective(settings.objective, settings.regime, l2a_config, asked_by(settings, "objective"))
    check_attention_layers(settings.attention_layers, settings.regime, config.num_layers)
    if settings.forced is not None and len(settings.forced) not in (1, config.num_layers):
        raise UserError(f"--forced has {len(settings.forced)} shares; expected one, or one for each of the "
                        f"{config.num_layers} layers")
    check_target(settings, l2a_config)
    limit = position_limit(config, l2a_config)
    axes = Axes() if settings.mesh is None else parse(settings.mesh)
    if present:
        meshes.check_present(axes)
        processes.check(axes)

    def rows_of(seq_len: int, batch_size: int) -> Any:
        if seq_len > limit:
            named = "--seq-len" if seq_len == settings.seq_len else "--curriculum"
            raise UserError(f"{named} {seq_len} is longer than max_positions x factor = {limit} of this model; "
                            "shorten it or choose a larger --rope factor")
        meshes.check(axes, batch_size=batch_size, seq_len=seq_len, staged=settings.curriculum is not None)
        memory.check_batch(batch_size // axes.data, seq_len, config.hidden_size * dtype.itemsize,
                           grad_accum=settings.grad_accum, eval_batches=0 if settings.data else settings.eval_batches)
        if settings.data:
            if tokenizer is None:
                raise UserError(f"{source} has no tokenizer, so --data cannot be read with it")
            return open_data(settings.data, tokenizer, seq_len=seq_len, batch_size=batch_size,
                             seed=settings.seed, packing=settings.packing, echo=settings.echo, ask=settings.ask,
                             answer_weight=settings.answer_weight, unique=settings.unique, vocab_size=config.vocab_size)
        reach = 0 if l2a_config is None else l2a_config.window + l2a_config.sinks
        emphasis, held_out = ((RECALL_EMPHASIS, RECALL_EMPHASIS) if settings.regime == "pretrain" else
                              (settings.answer_weight, 1.0))
        return RecallCorpus(seq_len, batch_size, settings.seed, distance=max(24, reach + 1), emphasis=emphasis,
                            held_out_emphasis=held_out)

    if settings.curriculum is None:
        data = rows_of(settings.seq_len, settings.batch_size)
        steps = steps_of(settings, data.tokens_per_batch)
    else:
        data = make_curriculum(settings.curriculum, rows_of, settings.seq_len, settings.batch_size,
                               settings.grad_accum)
        steps = steps_of(settings, data.tokens_per_batch)
        data = data.over(steps)
    return RunPlan(settings, source, config, l2a_config, source_layer is not None, data, tokenizer, steps, dtype)


def plan_of(recorded: RunConfig, what: str) -> RunPlan:
    """The plan of a recorded run, from whatever folder it is asked for. UserError, beginning with `what`, where the
    data is not what it was."""
    settings = recorded.settings
    plan = make_plan(dataclasses.replace(
        settings, model=None if settings.model is None else recorded.source or settings.model,
        data=settings.data if recorded.data_source is None else recorded.data_source))
    if plan.data.fingerprint != recorded.data_fingerprint:
        raise UserError(f"{what}: the data is not what the run began with: "
                        f"{difference(recorded.data, plan.data.describe())}")
    for now, then in ((plan.config, recorded.model_config), (plan.l2a_config, recorded.trained_layer)):
        if now != then:
            raise UserError(f"{what}: {recorded.path} records another model than its settings and source give now: "
                            f"{then} is not {now}")
    return plan._replace(l2a_config=recorded.l2a_config)


def _unrolls(settings: Settings) -> bool:
    """A GPU spends more on stacking what each layer keeps than on anything else that unrolling would cost."""
    if settings.unroll is not None:
        return settings.unroll
    return device.platform() == "gpu" and settings.remat != "layer"


class Run(NamedTuple):
    """A plan made runnable: compiled functions, and the tree split into what is trained and what is frozen."""

    plan: RunPlan
    objective: Objective
    mask: Tree
    optimizer: optax.GradientTransformation
    like: TrainState
    program: Callable[..., tuple[TrainState, dict]] | None
    evaluate: Callable[[Tree, Tree, Batch, Any], Any]
    memory_bytes: int

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """(trained leaves, frozen leaves) of a whole tree, as the step takes them."""
        mesh, unroll = self.objective.mesh, self.objective.unroll
        if mesh is None:
            return split_params(params, self.mask, unroll)
        return leaves.put(split_params(leaves.put(params, mesh), self.mask, unroll), mesh)

    def start(self, trainable: Tree) -> TrainState:
        """Step 0 from the trained leaves."""
        s, mesh = self.plan.settings, self.objective.mesh
        begin = functools.partial(initial_state, optimizer=self.optimizer, master_dtype=jnp.dtype(s.master_dtype),
                                  controlled=s.target_local is not None)
        if mesh is not None:
            begin = jax.jit(begin, out_shardings=leaves.shardings(self.like, mesh))
        return begin(trainable)

    @property
    def step(self) -> Callable[[TrainState, Tree, Batch, jax.Array], tuple[TrainState, dict]] | None:
        """The compiled step with this run's numbers; None where nothing is trained."""
        if self.program is None:
            return None
        dials = self.dials
        return lambda state, frozen, batch, key: self.program(state, frozen, batch, key, dials)

    @property
    def dials(self) -> Dials:
        """The numbers of this run's plan: a program of other plans runs with them."""
        return dials_of(self.plan)

    def forced(self, shape: tuple[int, int]) -> jax.Array | None:
        """The decisions that this run forces on rows of [B, T]; None where its router decides."""
        rates = self.dials.forced
        return forced_decisions(jax.random.key(self.plan.settings.seed),
                                None if rates is None else jnp.asarray(rates), shape)


def dials_of(plan: RunPlan) -> Dials:
    """The numbers that a compiled step takes as arguments."""
    s, steps = plan.settings, plan.steps
    rates = (s.lr, s.lr if s.router_lr is None else s.router_lr)
    penalty = s.penalty if plan.l2a_config is not None else 0.0
    return Dials(*map(np.float32, rates), np.int32(steps), np.int32(round(s.warmup * steps)), np.float32(penalty),
                 np.int32(round(s.penalty_warmup * steps)), np.int32(max(1, round(s.penalty_ramp * steps))),
                 np.float32(s.distill_share), np.float32(s.saliency_share),
                 None if s.target_local is None else np.float32(s.target_local),
                 None if s.forced is None else np.resize(np.float32(s.forced), plan.config.num_layers))


def program_key(plan: RunPlan) -> tuple:
    """What is compiled into a run's step: plans of equal keys share one program (`Run._replace(plan=...)`)."""
    resolved = dataclasses.replace(plan.settings, dtype=plan.dtype.name, unroll=_unrolls(plan.settings))
    return plan.config, plan.l2a_config, compiled_in(resolved)


class _Parts(NamedTuple):
    """What a plan's settings make of its model: what is trained and how, and the shapes of a training state and of the
    frozen leaves."""

    rule: OptimizerConfig
    optimizer: optax.GradientTransformation
    mask: Tree
    like: TrainState
    frozen: Tree


def _parts(plan: RunPlan) -> _Parts:
    s = plan.settings
    rule = OptimizerConfig(s.regime, s.weight_decay, s.clip, attention_layers=s.attention_layers,
                           momentum_dtype=None if s.master_dtype == "float32" else jnp.dtype(s.master_dtype))
    optimizer = make_optimizer(rule, dials_of(plan))
    abstract = abstract_params(plan.config, plan.l2a_config, plan.dtype)
    mask = regime_mask(abstract, s.regime)
    trainable, frozen = jax.eval_shape(lambda params: split_params(params, mask, _unrolls(s)), abstract)
    like = jax.eval_shape(lambda t: initial_state(t, optimizer, jnp.dtype(s.master_dtype),
                                                     s.target_local is not None), trainable)
    return _Parts(rule, optimizer, mask, like, frozen)


def estimate(plan: RunPlan) -> Held:
    """What a step holds on each device of the plan's mesh, by shapes alone: where there are stages, of the
    one that holds most."""
    s, parts = plan.settings, _parts(plan)
    steps = (held(parts.like, parts.frozen, plan.config, plan.l2a_config, axes=plan.axes or Axes(), rows=rows,
                  seq_len=seq_len, remat=s.remat, dtype=plan.dtype, accumulate=accumulate)
             for accumulate, rows, seq_len in (batch.tokens.shape for batch in _batches(plan, None)))
    return max(steps, key=lambda step: step.total)


def compile_run(plan: RunPlan, refuse: bool = True) -> Run:
    """Compile a step from shapes alone and `refuse` a run that cannot fit (UserError with the estimate)."""
    s = plan.settings
    mesh = None if plan.axes is None else meshes.make(plan.axes)
    objective = Objective(plan.config, plan.l2a_config, dtype=plan.dtype, backend=s.backend,
                          remat=memory.checkpoint_policy(s.remat, mesh is not None), unroll=_unrolls(s), cost=s.cost,
                          minimised=s.objective, target_tokens=s.target_tokens, mesh=mesh)
    rule, optimizer, mask, like, frozen = _parts(plan)
    if mesh is not None:
        like, frozen = (leaves.described(tree, mesh) for tree in (like, frozen))
        _say_whole(like, frozen, mesh.size)
    evaluate = _evaluation(objective)
    if not jax.tree.leaves(like.trainable):
        return Run(plan, objective, mask, optimizer, like, None, evaluate, memory.tree_bytes(frozen))
    dealt = {} if mesh is None else {"out_shardings": (leaves.shardings(like, mesh), NamedSharding(mesh, P()))}
    step = jax.jit(functools.partial(train_step, objective=objective, optimizer=rule), donate_argnums=0, **dealt)
    log.info("compiling a step ...")
    started = time.perf_counter()
    compiled = {batch.tokens.shape: step.lower(like, frozen, batch, jax.eval_shape(jax.random.key, 0),
                                               dials_of(plan)).compile() for batch in _batches(plan, mesh)}
    need = max(map(memory.step_bytes, compiled.values()))
    if refuse:
        memory.check_fits(need, like, frozen)
    log.info("compiled a step in %.1f s; it needs %.2f GB of %.1f GB%s", time.perf_counter() - started, need / 1e9,
             device.memory_bytes() / 1e9, "" if mesh is None else " on each device")
    return Run(plan, objective, mask, optimizer, like, _by_shape(compiled), evaluate, need)


def _batches(plan: RunPlan, mesh: Mesh | None) -> list[Batch]:
    """The shapes of what steps read: of every stage where there are some."""
    rows = None if mesh is None else NamedSharding(mesh, meshes.STACKED)
    stages = ([(stage.data, stage.accumulate) for stage in plan.data.stages] if isinstance(plan.data, Curriculum)
              else [(plan.data, plan.settings.grad_accum)])
    return [jax.tree.map(lambda x, count=count: jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=rows),
                         data.batch(0)) for data, count in stages]


def _by_shape(compiled: dict[tuple[int, ...], Callable]) -> Callable[..., tuple[TrainState, dict]]:
    """The program of a step: the only one, or that of the batch's shape."""
    if len(compiled) == 1:
        return next(iter(compiled.values()))
    return lambda state, frozen, batch, key, dials: compiled[batch.tokens.shape](state, frozen, batch, key, dials)


def _say_whole(like: TrainState, frozen: Tree, shards: int) -> None:
    """Say how much cannot be dealt: of a leaf none of whose dimensions the devices divide, each holds all."""
    whole = leaves.whole_bytes((like, frozen), shards)
    if whole:
        log.info("of %.3f MB of weights and optimizer each of %d devices holds all: they divide none of their "
                 "dimensions", whole / 1e6, shards)


def _evaluation(objective: Objective) -> Callable[[Tree, Tree, Batch, Any], Any]:
    return jax.jit(lambda trainable, frozen, batch, decisions: evaluate_batch(
        compute_params(trainable, frozen, objective.dtype), batch, decisions, objective=objective),
        **read_by_all(objective.mesh))


def read_by_all(mesh: Mesh | None) -> dict[str, Any]:
    """Options of `jax.jit` for what every process reads."""
    return {} if mesh is None else {"out_shardings": NamedSharding(mesh, P())}


def with_threshold(run: Run, threshold: float) -> Run:
    """The run, trained, with another threshold: what it is scored by."""
    if threshold == run.plan.l2a_config.threshold:
        return run
    layer = dataclasses.replace(run.plan.l2a_config, threshold=threshold)
    objective = run.objective._replace(l2a_config=layer)
    return run._replace(plan=run.plan._replace(l2a_config=layer), objective=objective, evaluate=_evaluation(objective))


def load_tree(plan: RunPlan) -> tuple[Tree, Tree | None, str]:
    """The run's whole tree at step 0, the plain or routed source it came from, and the source's hash.

    The source only for the demo, whose report compares with it: to others it would be memory for nothing.
    """
    if plan.source is None:
        params = jax.jit(lambda key: init_params(plan.config, key, dtype=plan.dtype))(
            jax.random.key(plan.settings.seed))
        return params, params if plan.is_demo else None, f"fresh parameters, seed {plan.settings.seed}"
    loaded = load_pretrained(plan.source, plan.dtype)
    params, source = loaded.params, loaded.params if plan.is_demo else None
    if plan.l2a_config is not None and not plan.source_routed:
        params = add_routing(params, plan.config, plan.l2a_config)
    return params, source, loaded.source_hash


def set_deterministic() -> None:
    """Ask XLA for deterministic GPU kernels. It is asked once, when a device is first used: UserError where one was."""
    asked = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC in asked.split():
        return
    if device.in_use() and device.platform() != "cpu":  # a CPU's kernels all are
        raise UserError("--deterministic has to be known before JAX uses the GPU, and this process has used it "
                        f"already; begin a process for the run, or set XLA_FLAGS={DETERMINISTIC} before")
    os.environ["XLA_FLAGS"] = f"{asked} {DETERMINISTIC}".strip()
