"""What a training command does from start to end: plan, weights, fit, score, summary.

What a run folder holds is in `folder`. A resumed run rebuilds everything from its `config.json` and refuses a base or
data that is not the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from l2a_jax import device
from l2a_jax.commands import spelled
from l2a_jax.data.batch import Batch, TrainingData
from l2a_jax.data.curriculum import Curriculum
from l2a_jax.errors import Missing, UserError
from l2a_jax.files import check_file, check_writable, owned, write_json
from l2a_jax.models.params import Tree
from l2a_jax.runs import folder
from l2a_jax.runs.about import announce
from l2a_jax.runs.calibrate import batches_of, calibrate
from l2a_jax.runs.demo import recall_report
from l2a_jax.runs.plan import Run, RunPlan, compile_run, load_tree, make_plan, plan_of, set_deterministic
from l2a_jax.sharding import processes
from l2a_jax.training import control, metrics
from l2a_jax.training.checkpoints import BEST, LATEST, Checkpoints
from l2a_jax.training.diagnose import first_non_finite
from l2a_jax.training.loop import NonFinite, Schedule, Stopped, StopRequest, fit, stacked_batch
from l2a_jax.training.run_files import RunConfig, read_run, read_summary
from l2a_jax.training.settings import Settings
from l2a_jax.training.step import TrainState, target_tokens

log = logging.getLogger("l2a_jax")


def train(settings: Settings, run_dir: pathlib.Path) -> dict[str, Any]:
    """Train as `settings` say into the new folder `run_dir`, that of process 0 where there are several; returns the
    summary that `summary.json` holds."""
    run_dir = _shared(run_dir, settings)
    with (_stoppable(run_dir, "nothing has been trained, so nothing is kept") as stop,
          _by_first(folder.new(run_dir), run_dir)):
        with processes.first_before_others():
            plan = make_plan(settings)
        announce(plan)
        return _carry_out(plan, run_dir, stop)


def resume(run_dir: pathlib.Path, mesh: str | None = None) -> dict[str, Any]:
    """Continue the run in `run_dir` from its newest checkpoint, bit for bit as if it had never stopped; over another
    `mesh` than it began on (None: that one) up to the order of sums."""
    if not (run_dir / "config.json").exists():
        raise UserError(f"--resume {run_dir}: there is no config.json; expected the folder of an earlier run")
    recorded = read_run(run_dir).whole()
    _check_control(recorded, f"--resume {run_dir}")
    if mesh is not None:
        if mesh != recorded.settings.mesh:
            log.warning("the run began on %s and goes on on %s: sums are taken in another order, so its numbers will "
                        "not be the same to the last bit", recorded.settings.mesh or "one device", mesh)
        recorded = recorded._replace(settings=dataclasses.replace(recorded.settings, mesh=mesh))
    run_dir = _shared(run_dir, recorded.settings)
    unchanged = f"the run is as it was; {_continue(run_dir)}"
    with _stoppable(run_dir, unchanged) as stop, _by_first(owned(run_dir, "--resume"), run_dir):
        with processes.first_before_others():
            plan = plan_of(recorded, f"--resume {run_dir}")._replace(l2a_config=recorded.trained_layer)
        announce(plan)
        _check_machine(plan, recorded, f"--resume {run_dir}")
        checkpoints = Checkpoints(run_dir)
        with processes.together():
            check_writable(run_dir, "--resume")
            for kind in (LATEST, BEST):  # damage, and what cannot be written, are said before compiling
                checkpoints.sweep(kind)
                checkpoints.metadata(kind)
            check_file(run_dir / "metrics.jsonl", "--resume")
        return _carry_out(plan, run_dir, stop, recorded)


def _carry_out(plan: RunPlan, run_dir: pathlib.Path, stop: StopRequest, recorded: RunConfig | None = None) -> dict:
    """Compile, load, train and score: a new run, or the one that was `recorded`, from its newest checkpoint."""
    stop.at_once = False  # from here on JAX works, which must not be torn down in the middle
    with processes.together():
        run = compile_run(plan)
        stop.check()
    with processes.together():
        params, source_params, source = load_tree(plan)
        stop.check()
        if recorded is None and processes.first():
            folder.write_config(run_dir, plan, source)
    if recorded is not None and source != recorded.source_hash:
        raise UserError(f"--resume {run_dir}: the weights of {plan.source} have changed since the run began "
                        f"(hash {source[:12]}, not {recorded.source_hash[:12]})")
    trainable, frozen = run.split(params)
    del params  # an unrolled step has copies of the frozen leaves
    checkpoints = Checkpoints(run_dir)
    if recorded is not None and checkpoints.steps(LATEST):
        with processes.together():
            state = checkpoints.load(LATEST, run.like)
        log.info("resuming after step %d of %d", int(state.step), plan.steps)
    else:
        if recorded is not None:  # stopped before the first checkpoint: the start is exact too
            log.warning("there is no checkpoint: the run begins again from its start")
        state = run.start(trainable)
    return _fit_and_score(run, run_dir, state, frozen, source_params, stop)


def _check_control(recorded: RunConfig, what: str) -> None:
    """Refuse a run whose target was controlled otherwise when it began."""
    short = recorded.steps is None or recorded.steps < control.SETTLING
    if recorded.settings.target_local is not None and short and recorded.control != control.EDITION:
        raise UserError(f"{what}: in runs of fewer than {control.SETTLING} steps --target-local was controlled in "
                        "another way when this one began, so that it cannot go on as it was; begin it anew")


def _check_machine(plan: RunPlan, recorded: RunConfig, what: str) -> None:
    """Refuse to go on in another precision than the run began with; say where the device is another."""
    kind = device.kind()
    if recorded.dtype is not None and plan.dtype.name != recorded.dtype:
        raise UserError(f"{what}: the run computes in {recorded.dtype}, and on this device ({kind}) it would go on "
                        f"in {plan.dtype.name}; resume it where it began ({recorded.device or 'not recorded'}), or "
                        f'write "dtype": "{recorded.dtype}" into the settings of {recorded.path}')
    began = (recorded.device or "").partition(" x ")[2]
    if began and began != kind:
        log.warning("the run began on %s and goes on on %s: its numbers will not be the same to the last bit", began,
                    kind)


def _shared(run_dir: pathlib.Path, settings: Settings) -> pathlib.Path:
    """The run folder of process 0, for every process; from here on each knows the devices of all."""
    if settings.deterministic:
        set_deterministic()
    processes.meet()
    told = processes.of_first(lambda: str(run_dir.absolute()))
    return run_dir if processes.first() else pathlib.Path(told)


@contextlib.contextmanager
def _by_first(owning: contextlib.AbstractContextManager, run_dir: pathlib.Path) -> Iterator[None]:
    """A block in which process 0 is `owning` the run folder; UserError where another does not find it there."""
    with contextlib.ExitStack() as held:
        with processes.together():
            if processes.first():
                held.enter_context(owning)
        with processes.together():
            if not run_dir.is_dir():
                raise UserError(f"this process does not find the run folder {run_dir}; expected one that all processes "
                                "of a run share")
        yield


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
    kept = before if step is None else _continue(run_dir)
    done = "stopped before the first step" if step is None else f"stopped after step {step}, which is saved"
    print(f"{done}; {kept}", file=sys.stderr)
    raise SystemExit(128 + number)


def _continue(run_dir: pathlib.Path) -> str:
    return f"continue with: {spelled('train/run.py')} --resume {run_dir}"


def _fit_and_score(run: Run, run_dir: pathlib.Path, state: TrainState, frozen: Tree, source_params: Tree | None,
                   stop: StopRequest) -> dict:
    """Train to the end, evaluate, write the summary and the curves; say what happened where it cannot."""
    plan, checkpoints = run.plan, Checkpoints(run_dir)
    held_out = list(plan.data.held_out(plan.settings.eval_batches))
    if not held_out:
        log.warning("the data has no held-out documents: no held-out loss, and no best checkpoint")
    best = (checkpoints.metadata(BEST) or {}).get("best", float("inf"))
    began = time.perf_counter()
    if run.step is not None:
        with _recording(run_dir, int(state.step)) as record:
            try:
                with processes.noticing_loss():
                    state = fit_run(run, state, frozen, held_out, record=record, save=checkpoints.save, best=best,
                                    stop=stop)
            except NonFinite as failure:
                last = (f"the last good checkpoint is {checkpoints.folder(LATEST)}" if checkpoints.steps(LATEST)
                        else "no checkpoint was due yet")
                raise UserError(f"{failure}; {failure.where}. That update was withheld; {last}") from failure

    calibration = None
    if state.control is not None:
        run, calibration = calibrate(run, state, frozen)
        with processes.together():
            if calibration is not None and processes.first():
                folder.write_calibration(run_dir, calibration.threshold)
    log.info("scoring held-out text ...")
    scored = held_out_metrics(run, state, frozen, held_out)
    if state.control is not None:
        scored |= held_out_target(run, state, frozen)
    report = {"recall": recall_report(run, state, frozen, source_params, held_out)} if plan.is_demo else {}
    summary = {}
    with processes.together():
        if processes.first():
            summary = folder.summarise(run, run_dir, state, scored, time.perf_counter() - began) | report
            if calibration is not None:
                summary["target"]["calibrated"] = calibration._asdict()
            write_json(run_dir / "summary.json", summary)
            if run.step is not None:
                try:
                    folder.draw_curves(run_dir, run)
                except Missing as lacking:
                    log.warning("no curves.png: %s", lacking)
            folder.print_summary(run_dir, summary)
    return summary or read_summary(run_dir)


@contextlib.contextmanager
def _recording(run_dir: pathlib.Path, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What writes the record of a step, after those up to `step`; process 0 alone writes."""
    if not processes.first():
        yield lambda record: None
        return
    with contextlib.closing(metrics.MetricsLog(run_dir / "metrics.jsonl", step)) as records:
        missing = metrics.missing_steps(records.kept, step)
        if missing is not None:
            log.warning("%s: %s; what the summary says of losses and speeds is of the others",
                        run_dir / "metrics.jsonl", missing)
        yield records.write


def fit_run(run: Run, state: TrainState, frozen: Tree, held_out: list[Batch], **kept: Any) -> TrainState:
    """`loop.fit` of a run (`kept`: what it is told besides); a NonFinite that it raises says `where`."""
    plan, s, mesh = run.plan, run.plan.settings, run.objective.mesh
    key = jax.random.key(s.seed)
    try:
        return fit(state, lambda state, batch: run.step(state, frozen, processes.placed(batch, mesh), key),
                   plan.data.of_process(*processes.share_of(mesh)),
                   Schedule(plan.steps, s.grad_accum, s.save_every, s.eval_every),
                   evaluate=lambda state: held_out_metrics(run, state, frozen, held_out), **kept)
    except NonFinite as failure:
        batch = stacked_batch(plan.data, failure.step - 1, s.grad_accum)
        failure.where = first_non_finite(failure.state.trainable, frozen, batch,
                                         jax.random.fold_in(key, failure.step - 1), run.objective,
                                         run.forced(batch.tokens.shape[1:]))
        raise


def held_out_metrics(run: Run, state: TrainState, frozen: Tree, batches: list[Batch]) -> dict[str, Any]:
    """Mean loss in nats and accuracy over the counted tokens, the share of unrouted tokens per layer, and that of the
    tokens that a target counts."""
    if not batches:
        return {}
    nll = correct = counted = real = local = followed = 0.0
    unrouted = None
    for batch in batches:
        result = jax.device_get(run.evaluate(state.trainable, frozen, batch, run.forced(batch.tokens.shape)))
        nll += float((result.nll * batch.weights).sum(dtype=np.float64))
        correct += float((result.correct * batch.weights).sum())
        counted += float(batch.weights.sum())
        real += float(result.real.sum())
        if result.decisions is not None:
            unrouted = (unrouted if unrouted is not None else 0) + (~result.decisions & result.real).sum(axis=(1, 2))
        if state.control is not None:
            tokens = np.asarray(target_tokens(batch, run.objective))
            local += float((~result.decisions & tokens).sum(axis=(1, 2)).mean())
            followed += float(tokens.sum())
    out = {"held_out_loss": nll / counted, "held_out_accuracy": correct / counted}
    if unrouted is not None:
        out |= {"held_out_sparsity": float(unrouted.mean() / real), "held_out_sparsity_per_layer": unrouted / real}
    if state.control is not None:
        out["held_out_local"] = local / followed if followed else math.nan
    return out


def held_out_target(run: Run, state: TrainState, frozen: Tree) -> dict[str, Any]:
    """The share of local decisions that a target asked for, on enough held-out rows to tell a point; of a curriculum at
    each of its lengths too."""
    data, asked = run.plan.data, run.plan.settings.eval_batches

    def local(data: TrainingData) -> float | None:
        rows = list(data.held_out(max(asked, batches_of(data))))
        return held_out_metrics(run, state, frozen, rows).get("held_out_local")

    found = {"held_out_local": local(data)}
    if isinstance(data, Curriculum):
        found["held_out_local_by_length"] = {str(stage.seq_len): local(stage.data) for stage in data.stages}
    return {name: value for name, value in found.items() if value is not None}
