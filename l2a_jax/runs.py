"""What a training command does from start to end; the only place that knows every part.

    settings -> shapes -> data -> compiled step and its memory estimate -> weights -> fit -> score -> summary

What a run folder holds is in `run_folder`. A resumed run rebuilds everything from its `config.json` and refuses a base
or data that is not the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2a_jax import presets, run_folder
from l2a_jax.attention import api as attention
from l2a_jax.config import MODELS, L2AConfig, ModelConfig, position_limit
from l2a_jax.data.batch import Batch, TrainingData
from l2a_jax.data.changes import difference
from l2a_jax.data.dataset import open_data
from l2a_jax.data.preview import decode_row
from l2a_jax.data.recall import RecallCorpus, make_tokenizer
from l2a_jax.errors import UserError
from l2a_jax.evaluation import recall
from l2a_jax.files import check_file, check_writable, owned, plain, write_json
from l2a_jax.models.params import Tree, abstract_params, add_routing, init_params
from l2a_jax.presets import Settings
from l2a_jax.run_files import RunConfig, read_run
from l2a_jax.training import memory, metrics
from l2a_jax.training.checkpoint import BEST, LATEST, Checkpoints
from l2a_jax.training.diagnose import first_non_finite
from l2a_jax.training.loop import NonFinite, Schedule, Stopped, StopRequest, fit, stacked_batch
from l2a_jax.training.optimizer import OptimizerConfig, make_optimizer
from l2a_jax.training.regimes import PLAIN_REGIMES, check_attention_layers, count_parameters, regime_mask
from l2a_jax.training.remat import checkpoint_policy
from l2a_jax.training.step import (
    Dials,
    Objective,
    TrainState,
    compute_params,
    dialled_step,
    evaluate_batch,
    initial_state,
    split_params,
)
from l2a_jax.weights.pretrained import TINY, load_pretrained, read_config, source_tokenizer

log = logging.getLogger("l2a_jax")


class Plan(NamedTuple):
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


def read_source(source: str) -> tuple[ModelConfig, L2AConfig | None, Any]:
    """A source's configurations and tokenizer, without its tensors."""
    return *read_config(source), source_tokenizer(source)


def make_plan(settings: Settings, *, read: Callable = read_source, open_data: Callable = open_data) -> Plan:
    """Resolve a run's source, layer and data. UserError where anything does not fit; nothing is written.

    `read` and `open_data` do the reading; a study of many runs passes ones that remember.
    """
    if settings.deterministic:
        set_deterministic()
    attention.check(settings.backend)
    dtype = jnp.dtype(settings.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    source = settings.model or (None if settings.regime == "pretrain" else TINY)
    if source is None:
        config, source_layer, tokenizer = MODELS["qwen2.5-tiny"], None, make_tokenizer()
    else:
        config, source_layer, tokenizer = read(source)
    if source_layer is None:
        l2a_config = presets.layer_of(settings)
    else:
        if settings.regime in PLAIN_REGIMES:
            raise UserError(f"--regime {settings.regime} trains a plain model, but {source} has an L2A layer")
        l2a_config = presets.adapt_layer(source_layer, settings, source)
        settings = presets.as_used(settings, l2a_config)
    config = presets.model_of(settings, config)
    check_attention_layers(settings.attention_layers, settings.regime, config.num_layers)
    limit = position_limit(config, l2a_config)
    if settings.seq_len > limit:
        raise UserError(f"--seq-len {settings.seq_len} is longer than max_positions x factor = {limit} of this model; "
                        "shorten it or choose a larger --rope factor")
    memory.check_batch(settings.batch_size, settings.seq_len, config.hidden_size * dtype.itemsize,
                       grad_accum=settings.grad_accum, eval_batches=0 if settings.data else settings.eval_batches)
    if settings.data:
        if tokenizer is None:
            raise UserError(f"{source} has no tokenizer, so --data cannot be read with it")
        data = open_data(settings.data, tokenizer, seq_len=settings.seq_len, batch_size=settings.batch_size,
                         seed=settings.seed, packing=settings.packing, echo=settings.echo,
                         vocab_size=config.vocab_size)
    else:
        reach = 0 if l2a_config is None else l2a_config.window + l2a_config.sinks
        data = RecallCorpus(settings.seq_len, settings.batch_size, settings.seed, distance=max(24, reach + 1),
                            emphasis=presets.RECALL_EMPHASIS if settings.regime == "pretrain" else 1.0)
    steps = presets.steps_of(settings, data.tokens_per_batch)
    return Plan(settings, source, config, l2a_config, source_layer is not None, data, tokenizer, steps, dtype)


def _unrolls(settings: Settings) -> bool:
    """A GPU spends more on stacking what each layer keeps than on anything else that unrolling would cost."""
    if settings.unroll is not None:
        return settings.unroll
    return jax.default_backend() == "gpu" and settings.remat != "layer"


class Run(NamedTuple):
    """A plan made runnable: compiled functions, and the tree split into what is trained and what is frozen."""

    plan: Plan
    objective: Objective
    mask: Tree
    optimizer: optax.GradientTransformation
    like: TrainState
    program: Callable[..., tuple[TrainState, dict]] | None
    evaluate: Callable[[Tree, Tree, Batch, Any], Any]
    memory_bytes: int

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """(trained leaves, frozen leaves) of a whole tree, as the step takes them."""
        return split_params(params, self.mask, self.objective.unroll)

    @property
    def step(self) -> Callable[[TrainState, Tree, Batch, jax.Array], tuple[TrainState, dict]] | None:
        """The compiled step with this run's numbers; None where nothing is trained."""
        if self.program is None:
            return None
        dials = dials_of(self.plan)
        return lambda state, frozen, batch, key: self.program(state, frozen, batch, key, dials)


def dials_of(plan: Plan) -> Dials:
    """The numbers that a compiled step takes as arguments."""
    s, steps = plan.settings, plan.steps
    rates = (s.lr, s.lr if s.router_lr is None else s.router_lr)
    penalty = s.penalty if plan.l2a_config is not None else 0.0
    return Dials(*map(np.float32, rates), np.int32(steps), np.int32(round(s.warmup * steps)), np.float32(penalty),
                 np.int32(round(s.penalty_warmup * steps)), np.int32(max(1, round(s.penalty_ramp * steps))))


def program_key(plan: Plan) -> tuple:
    """What is compiled into a run's step: plans of equal keys share one program (`Run._replace(plan=...)`)."""
    s = plan.settings
    return (plan.config, plan.l2a_config, plan.dtype.name, s.regime, s.grad_accum, s.batch_size, s.seq_len, s.packing,
            s.backend, s.remat, _unrolls(s), s.master_dtype, s.weight_decay, s.clip, s.attention_layers)


def compile_run(plan: Plan) -> Run:
    """Compile a step from shapes alone and refuse a run that cannot fit (UserError with the estimate)."""
    s = plan.settings
    objective = Objective(plan.config, plan.l2a_config, dtype=plan.dtype, backend=s.backend,
                          remat=checkpoint_policy(s.remat), unroll=_unrolls(s), attention_layers=s.attention_layers)
    rule = OptimizerConfig(s.lr, plan.steps, weight_decay=s.weight_decay, clip=s.clip,
                           attention_layers=s.attention_layers,
                           momentum_dtype=None if s.master_dtype == "float32" else jnp.dtype(s.master_dtype))
    optimizer = make_optimizer(rule, s.regime)
    abstract = abstract_params(plan.config, plan.l2a_config, plan.dtype)
    mask = regime_mask(abstract, s.regime)
    trainable, frozen = jax.eval_shape(lambda params: split_params(params, mask, objective.unroll), abstract)
    like = jax.eval_shape(lambda t: initial_state(t, optimizer, jnp.dtype(s.master_dtype)), trainable)
    evaluate = jax.jit(lambda trainable, frozen, batch, decisions: evaluate_batch(
        compute_params(trainable, frozen, plan.dtype), batch, decisions, objective=objective))
    if not jax.tree.leaves(trainable):
        return Run(plan, objective, mask, optimizer, like, None, evaluate, memory.tree_bytes(frozen))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((s.grad_accum, *x.shape), x.dtype), plan.data.batch(0))
    step = jax.jit(functools.partial(dialled_step, objective=objective, optimizer=rule, regime=s.regime),
                   donate_argnums=0)
    started = time.perf_counter()
    compiled = step.lower(like, frozen, batch, jax.eval_shape(jax.random.key, 0), dials_of(plan)).compile()
    need = memory.check_fits(compiled, like, frozen)
    log.info("compiled a step in %.1f s; it needs %.2f GB of %.1f GB", time.perf_counter() - started, need / 1e9,
             memory.device_bytes() / 1e9)
    return Run(plan, objective, mask, optimizer, like, compiled, evaluate, need)


def load_tree(plan: Plan) -> tuple[Tree, Tree | None, str]:
    """The run's whole tree at step 0, the plain or routed source it came from, and the source's hash.

    The source only for the demo, whose report compares with it: to others it would be memory for nothing.
    """
    if plan.source is None:
        params = jax.jit(lambda key: init_params(plan.config, key, dtype=plan.dtype))(
            jax.random.key(plan.settings.seed))
        return params, params if plan.is_demo else None, f"fresh parameters, seed {plan.settings.seed}"
    loaded = load_pretrained(plan.source, plan.dtype)
    source = loaded.params if plan.is_demo else None
    if plan.l2a_config is None or plan.source_routed:
        return loaded.params, source, loaded.source_hash
    return add_routing(loaded.params, plan.config, plan.l2a_config), source, loaded.source_hash


def train(settings: Settings, run_dir: pathlib.Path) -> dict[str, Any]:
    """Train as `settings` say into the new folder `run_dir`; returns the summary that `summary.json` holds."""
    with _stoppable(run_dir, "nothing has been trained, so nothing is kept") as stop, run_folder.new(run_dir):
        plan = make_plan(settings)
        _announce(plan)
        stop.at_once = False  # from here on JAX works, which must not be torn down in the middle
        run = compile_run(plan)
        stop.check()
        params, source_params, source = load_tree(plan)
        stop.check()
        run_folder.write_config(run_dir, plan, source)
        trainable, frozen = run.split(params)
        del params  # an unrolled step has copies of the frozen leaves
        state = initial_state(trainable, run.optimizer, jnp.dtype(settings.master_dtype))
        return _fit_and_score(run, run_dir, state, frozen, source_params, stop)


def resume(run_dir: pathlib.Path) -> dict[str, Any]:
    """Continue the run in `run_dir` from its newest checkpoint, bit for bit as if it had never stopped."""
    if not (run_dir / "config.json").exists():
        raise UserError(f"--resume {run_dir}: there is no config.json; expected the folder of an earlier run")
    recorded = read_run(run_dir).whole()
    unchanged = f"the run is as it was; continue with: python train/run.py --resume {run_dir}"
    with _stoppable(run_dir, unchanged) as stop, owned(run_dir, "--resume"):
        plan = plan_of(recorded, f"--resume {run_dir}")
        _announce(plan)
        _check_machine(plan, recorded, f"--resume {run_dir}")
        checkpoints = Checkpoints(run_dir)
        check_writable(run_dir, "--resume")
        for kind in (LATEST, BEST):  # damage, and what cannot be written, are said before compiling
            checkpoints.sweep(kind)
            checkpoints.metadata(kind)
        check_file(run_dir / "metrics.jsonl", "--resume")
        stop.at_once = False
        run = compile_run(plan)
        stop.check()
        params, source_params, source = load_tree(plan)
        stop.check()
        if source != recorded.source_hash:
            raise UserError(f"--resume {run_dir}: the weights of {plan.source} have changed since the run began "
                            f"(hash {source[:12]}, not {recorded.source_hash[:12]})")
        trainable, frozen = run.split(params)
        del params
        if not checkpoints.steps(LATEST):  # stopped before the first checkpoint: the start is exact too
            log.warning("there is no checkpoint: the run begins again from its start")
            state = initial_state(trainable, run.optimizer, jnp.dtype(plan.settings.master_dtype))
        else:
            state = checkpoints.load(LATEST, run.like)
            log.info("resuming after step %d of %d", int(state.step), plan.steps)
        return _fit_and_score(run, run_dir, state, frozen, source_params, stop)


def plan_of(recorded: RunConfig, what: str) -> Plan:
    """The plan of a recorded run, from whatever folder it is asked for. UserError, beginning with `what`, where the
    data is not what it was."""
    settings = recorded.settings
    plan = make_plan(dataclasses.replace(
        settings, model=None if settings.model is None else recorded.source or settings.model,
        data=settings.data if recorded.data_source is None else recorded.data_source))
    if plan.data.fingerprint != recorded.data_fingerprint:
        raise UserError(f"{what}: the data is not what the run began with: "
                        f"{difference(recorded.data, plan.data.describe())}")
    for key in ("config", "l2a_config"):
        now, then = getattr(plan, key), getattr(recorded, "model_config" if key == "config" else key)
        if now != then:
            raise UserError(f"{what}: {recorded.path} records another model than its settings and source give now: "
                            f"{then} is not {now}")
    return plan


def _check_machine(plan: Plan, recorded: RunConfig, what: str) -> None:
    """Refuse to go on in another precision than the run began with; say where the device is another."""
    device = jax.devices()[0].device_kind
    if recorded.dtype is not None and plan.dtype.name != recorded.dtype:
        raise UserError(f"{what}: the run computes in {recorded.dtype}, and on this device ({device}) it would go on "
                        f"in {plan.dtype.name}; resume it where it began ({recorded.device or 'not recorded'}), or "
                        f'write "dtype": "{recorded.dtype}" into the settings of {recorded.path}')
    began = (recorded.device or "").partition(" x ")[2]
    if began and began != device:
        log.warning("the run began on %s and goes on on %s: its numbers will not be the same to the last bit", began,
                    device)


@contextlib.contextmanager
def _stoppable(run_dir: pathlib.Path, before: str) -> Iterator[StopRequest]:
    """Signals ask for a stop; where one is honoured, say what is kept (`before`: if nothing has been trained yet), and
    end with the status that a shell expects."""
    with StopRequest(at_once=True) as stop:
        try:
            yield stop
            return
        except Stopped as stopped:
            step, number = stopped.step, stopped.signal_number
        except KeyboardInterrupt:
            step, number = None, stop.signal_number or signal.SIGINT
    kept = before if step is None else f"continue with: python train/run.py --resume {run_dir}"
    done = "stopped before the first step" if step is None else f"stopped after step {step}, which is saved"
    print(f"{done}; {kept}", file=sys.stderr)
    raise SystemExit(128 + number)


def dry_run(settings: Settings) -> str:
    """What a run would train, as text: data, steps, memory, and one packed row as the model would see it."""
    plan = make_plan(settings)
    _announce(plan)
    run = compile_run(plan)
    about = {"steps": plan.steps, "estimated_memory_gb": round(run.memory_bytes / 1e9, 3), "data": plan.data.describe()}
    if hasattr(plan.data, "usage"):
        about["in_this_run"] = plan.data.usage(plan.steps * settings.grad_accum)
    sample = decode_row(plan.data.batch(0), 0, plan.tokenizer)
    return f"{json.dumps(plain(about), indent=2)}\nfirst row:\n{sample}"


def _fit_and_score(run: Run, run_dir: pathlib.Path, state: TrainState, frozen: Tree, source_params: Tree | None,
                   stop: StopRequest) -> dict:
    """Train to the end, evaluate, write the summary and the curves; say what happened where it cannot."""
    plan, s = run.plan, run.plan.settings
    checkpoints = Checkpoints(run_dir)
    key = jax.random.key(s.seed)
    held_out = list(plan.data.held_out(s.eval_batches))
    if not held_out:
        log.warning("the data has no held-out documents: no held-out loss, and no best checkpoint")
    best = (checkpoints.metadata(BEST) or {}).get("best", float("inf"))

    def evaluate(state: TrainState) -> dict[str, Any]:
        return held_out_metrics(lambda batch: run.evaluate(state.trainable, frozen, batch, None), held_out)

    began = time.perf_counter()
    if run.step is not None:
        records = metrics.MetricsLog(run_dir / "metrics.jsonl", int(state.step))
        missing = metrics.missing_steps(records.kept, int(state.step))
        if missing is not None:
            log.warning("%s: %s; what the summary says of losses and speeds is of the others",
                        run_dir / "metrics.jsonl", missing)
        try:
            state = fit(state, lambda state, batch: run.step(state, frozen, batch, key), plan.data,
                        Schedule(plan.steps, s.grad_accum, s.save_every, s.eval_every), log=records,
                        checkpoints=checkpoints, evaluate=evaluate, metadata={}, best=best,
                        stop=stop)
        except NonFinite as failure:
            where = first_non_finite(failure.state.trainable, frozen,
                                     stacked_batch(plan.data, failure.step - 1, s.grad_accum),
                                     jax.random.fold_in(key, failure.step - 1), run.objective)
            good = checkpoints.steps(LATEST)
            last = f"the last good checkpoint is {checkpoints.folder(LATEST)}" if good else "no checkpoint was due yet"
            raise UserError(f"{failure}; {where}. That update was withheld; {last}") from failure

    summary = run_folder.summarise(run, run_dir, state, evaluate(state), time.perf_counter() - began)
    if plan.is_demo:
        summary["recall"] = _recall_report(run, state, frozen, source_params, held_out)
    write_json(run_dir / "summary.json", summary)
    if run.step is not None:
        metrics.draw_curves(metrics.read_metrics(run_dir / "metrics.jsonl"), run_dir / "curves.png")
    run_folder.print_summary(run_dir, summary)
    return summary


def held_out_metrics(evaluate: Callable[[Batch], Any], batches: list[Batch]) -> dict[str, Any]:
    """Mean loss in nats and accuracy over the counted tokens, and the share of unrouted tokens per layer."""
    if not batches:
        return {}
    nll = correct = counted = real = 0.0
    unrouted = None
    for batch in batches:
        result = jax.device_get(evaluate(batch))
        nll += float((result.nll * batch.weights).sum(dtype=np.float64))
        correct += float((result.correct * batch.weights).sum())
        counted += float(batch.weights.sum())
        real += float(result.real.sum())
        if result.decisions is not None:
            unrouted = (unrouted if unrouted is not None else 0) + (~result.decisions & result.real).sum(axis=(1, 2))
    out = {"held_out_loss": nll / counted, "held_out_accuracy": correct / counted}
    if unrouted is not None:
        out |= {"held_out_sparsity": float(unrouted.mean() / real), "held_out_sparsity_per_layer": unrouted / real}
    return out


def _recall_report(run, state, frozen, source_params, held_out):
    plan = run.plan
    plain = run.objective._replace(l2a_config=None)
    if plan.l2a_config is None:
        rows = recall.score(lambda batch, decisions: run.evaluate(state.trainable, frozen, batch, None), held_out)[0]
        return {"rows": {"this model (full attention)": rows}}
    start_trainable, start_frozen = run.split(add_routing(source_params, plan.config, plan.l2a_config)
                                              if not plan.source_routed else source_params)
    baseline = jax.jit(lambda params, batch: evaluate_batch(params, batch, None, objective=plain))
    return recall.report(
        baseline=lambda batch, decisions: baseline(source_params, batch),
        untrained=lambda batch, decisions: run.evaluate(start_trainable, start_frozen, batch, decisions),
        trained=lambda batch, decisions: run.evaluate(state.trainable, frozen, batch, decisions),
        batches=held_out, seed=plan.settings.seed)


def _announce(plan: Plan) -> None:
    s = plan.settings
    if plan.is_demo:
        log.info("embedded demo: a tiny model and the synthetic recall corpus; for a real Qwen2.5 give --model (a hub "
                 "id, folder or .gguf) and --data")
    abstract = abstract_params(plan.config, plan.l2a_config)
    total = count_parameters(abstract)
    trained = count_parameters(abstract, regime_mask(abstract, s.regime), s.attention_layers)
    tokens = round(plan.steps * s.grad_accum * plan.data.tokens_per_batch)
    log.info("regime %s: %s of %s parameters, %s steps of %s x %s x %s tokens, seed %s, %s on %s", s.regime,
             f"{trained:,}", f"{total:,}", plan.steps, s.grad_accum, s.batch_size, s.seq_len, s.seed, plan.dtype.name,
             jax.devices()[0].device_kind)
    if plan.l2a_config is not None:
        log.info("layer: %s", plan.l2a_config)
    if trained:
        log.info("%s tokens in all, %.3g per trained parameter", f"{tokens:,}", tokens / trained)


def set_deterministic() -> None:
    """Ask XLA for deterministic GPU kernels; must happen before the first use of a device."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
