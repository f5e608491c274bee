"""Train one row without a run folder: the same step, loop and data as `train/run.py`, records in memory, no checkpoint.

A loss that is not finite is a finding here: its step is recorded with the first place that was not finite, and the
weights from before that step (the loop withholds the update) are what is evaluated.
"""

from __future__ import annotations

import io
import logging
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2a_jax import device, files
from l2a_jax.errors import UserError
from l2a_jax.models.params import Tree, add_routing, map_with_path
from l2a_jax.research import leaves
from l2a_jax.research.replication.row import Row
from l2a_jax.research.replication.session import Session
from l2a_jax.runs.train import fit_run
from l2a_jax.sharding import whole
from l2a_jax.training.loop import NonFinite
from l2a_jax.training.regimes import count_parameters, partition, regime_mask
from l2a_jax.training.step import compute_params

log = logging.getLogger("l2a_jax.research.replication")
CURVE = 100
"""Records kept of a run, evenly spread, besides those with a held-out loss."""


class Trained(NamedTuple):
    """A trained row: the whole tree in the compute dtype, the masters of what was trained, the report, and
    the records of every step."""

    params: Tree
    masters: Tree
    report: dict[str, Any]
    records: list[dict[str, Any]]


def start_params(session: Session, row: Row) -> Tree:
    """The row's tree before training."""
    plan, base = session.plan(row), session.base(row.size)
    return base.params if plan.l2a_config is None else add_routing(base.params, plan.config, plan.l2a_config)


def train_row(session: Session, row: Row) -> Trained:
    """Train to the end, or to the step before the first number that is not finite. Raises loop.Stopped on a signal."""
    plan = session.plan(row)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()
    base = session.base(row.size)
    seconds["load"] = time.perf_counter() - clock
    if row.regime == "baseline":
        return Trained(base.params, {}, {"trained_parameters": 0, "tokens_seen": 0, "seconds": seconds}, [])
    clock = time.perf_counter()
    run = session.program(row)
    seconds["compile"] = time.perf_counter() - clock
    trainable, frozen = run.split(start_params(session, row))
    s = plan.settings
    state = run.start(trainable)
    held_out = list(plan.data.held_out(s.eval_batches)) if row.measures.held_out else []
    records: list[dict[str, Any]] = []
    failed = None
    clock = time.perf_counter()
    try:
        state = fit_run(run, state, frozen, held_out, record=records.append, save=lambda *checkpoint: None)
    except NonFinite as failure:
        state = failure.state
        failed = {"step": failure.step, "loss": failure.loss, "where": failure.where}
        log.warning("%s: step %d is not finite (%s)", row.name, failure.step, failure.where)
    jax.block_until_ready(state.trainable)
    seconds["train"] = time.perf_counter() - clock
    params = whole.put(compute_params(state.trainable, frozen, plan.dtype), session.mesh)
    report = {**_report(run, records, int(state.step)), "non_finite": failed,
              "data_fingerprint": plan.data.fingerprint, "source_hash": base.source_hash,
              "memory": {"compiled_gb": run.memory_bytes / 1e9, "process_peak_gb": device.peak_memory_gb(),
                         "device_gb": device.memory_bytes() / 1e9}, "seconds": seconds}
    if session.axes is not None:
        report["mesh"] = session.axes
    if hasattr(plan.data, "usage"):
        report["data_used"] = plan.data.usage(int(state.step) * s.grad_accum)
    return Trained(params, state.trainable, report, records)


def _report(run, records, steps) -> dict[str, Any]:
    plan, s = run.plan, run.plan.settings
    trained = count_parameters(run.like.trainable, None, s.attention_layers)
    tokens = int(sum(record["tokens"] for record in records))
    speeds = sorted(record["tokens_per_second"] for record in records[2:] or records)
    tail = records[-max(1, len(records) // 20):]
    every = max(1, len(records) // CURVE)
    names = ("step", "loss", "grad_norm", "sparsity", "penalty_weight", "held_out_loss", "held_out_sparsity")
    out: dict[str, Any] = {
        "steps": steps, "steps_planned": plan.steps, "trained_parameters": trained, "tokens_seen": tokens,
        "tokens_per_trained_parameter": tokens / trained,
        "tokens_per_second_median": speeds[len(speeds) // 2] if speeds else None,
        "loss_last_5_percent": sum(record["loss"] for record in tail) / len(tail) if tail else None,
        "curve": [{name: record[name] for name in names if name in record} for index, record in enumerate(records)
                  if index % every == 0 or "held_out_loss" in record or index == len(records) - 1],
    }
    if records and "sparsity_per_layer" in records[-1]:
        out |= {"sparsity_last_step": records[-1]["sparsity"],
                "sparsity_per_layer": [round(value, 4) for value in records[-1]["sparsity_per_layer"]]}
    held = [record for record in records if "held_out_loss" in record]
    if held:
        out["held_out_loss"] = held[-1]["held_out_loss"]
    return out


def save_masters(masters: Tree, path: Path) -> None:
    """Write trained leaves as .npz (bfloat16 as float32, which holds it exactly), whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **leaves.by_path(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), masters)))
    with files.whole(path) as partial:
        partial.write_bytes(buffer.getvalue())


def load_masters(session: Session, row: Row, path: Path) -> Tree:
    """The whole tree of a row whose trained leaves were kept. UserError where the file does not hold just those."""
    advice = "move it away, and the row is trained again"
    try:
        with path.open("rb") as stream, np.load(stream) as file:  # numpy leaves a damaged file of its own open
            kept = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {advice}") from error
    params = start_params(session, row)
    trained, _ = partition(params, regime_mask(params, row.regime))
    leaves.check(kept, {name: leaf.shape for name, leaf in leaves.by_path(trained).items()}, path, advice)
    return map_with_path(lambda name, leaf: jnp.asarray(kept[name], leaf.dtype) if name in kept else leaf, params)
