"""What a training run writes into its folder beside its checkpoints (`run_files` reads it).

`config.json` (everything needed to repeat the run), `metrics.jsonl` (an object a step), `summary.json`, `curves.png`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from l2a_jax import device, files
from l2a_jax.config import to_dict
from l2a_jax.data.recipes import absolute
from l2a_jax.errors import UserError
from l2a_jax.models.params import abstract_params
from l2a_jax.provenance import provenance
from l2a_jax.runs import demo
from l2a_jax.training import control, metrics
from l2a_jax.training.checkpoints import BEST, Checkpoints
from l2a_jax.training.optimizer import learning_rate
from l2a_jax.training.regimes import count_parameters
from l2a_jax.training.run_files import CALIBRATED
from l2a_jax.training.step import TrainState

if TYPE_CHECKING:
    from l2a_jax.runs.plan import Run, RunPlan


WITHIN = 0.01
"""How near to its target a run is said to have reached it."""


def default_run_dir(regime: str) -> pathlib.Path:
    """`runs/REGIME-TIME`, below the current folder."""
    return pathlib.Path("runs") / f"{regime}-{time.strftime('%Y%m%d-%H%M%S')}"


@contextlib.contextmanager
def new(run_dir: pathlib.Path) -> Iterator[None]:
    """An empty, writable folder for a new run, owned for the block. UserError where it cannot be one.

    If the block ends before it has written `config.json`, the folders made for it are removed again.
    """
    made: list[pathlib.Path] = []
    try:
        made = [path for path in (run_dir, *run_dir.parents) if not os.path.exists(path)]
        files.check_writable(run_dir, "--run-dir")
        with files.owned(run_dir, "--run-dir"):
            if any(path.name != ".lock" for path in run_dir.iterdir()):
                raise UserError(f"--run-dir {run_dir} is not empty; choose another, or continue it with "
                                f"--resume {run_dir}")
            yield
    finally:
        if made and not os.path.exists(run_dir / "config.json"):
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()


def write_config(run_dir: pathlib.Path, plan: RunPlan, source: str) -> None:
    """Everything needed to repeat the run. `source`: the hash of the weights that it starts from."""
    source_path = plan.source
    if source_path is not None and pathlib.Path(source_path).expanduser().exists():
        source_path = str(pathlib.Path(source_path).expanduser().absolute())
    here = provenance()
    files.write_json(run_dir / "config.json", {
        "settings": dataclasses.asdict(plan.settings),
        "model_source": source_path,
        "data_source": [absolute(entry) for entry in plan.settings.data],
        "source_hash": source,
        "model_config": to_dict(plan.config),
        "l2a_config": None if plan.l2a_config is None else to_dict(plan.l2a_config),
        "data": plan.data.describe(),
        "data_fingerprint": plan.data.fingerprint,
        "steps": plan.steps,
        **({} if plan.settings.target_local is None else {"control": control.EDITION}),
        "dtype": plan.dtype.name,
        "started": here.pop("date"),
        **here,
    })


def write_calibration(run_dir: pathlib.Path, threshold: float) -> None:
    """Say in `config.json` what the threshold of the trained model is."""
    path = run_dir / "config.json"
    files.write_json(path, {**files.read_json(path), CALIBRATED: threshold})


def summarise(
    run: Run, run_dir: pathlib.Path, state: TrainState, held_out: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """What a finished run comes to: steps, tokens, speed, memory, losses, and its best checkpoint."""
    plan, s = run.plan, run.plan.settings
    records = metrics.read_metrics(run_dir / "metrics.jsonl")
    trained = count_parameters(abstract_params(plan.config, plan.l2a_config), run.mask, s.attention_layers)
    # Counted from the data, whose order is fixed, not from records, which can be lost.
    batches = int(state.step) * s.grad_accum
    usage = plan.data.usage(batches) if hasattr(plan.data, "usage") else None
    tokens = plan.data.tokens_read(batches) if usage is None else usage["tokens"]
    speeds = sorted(record["tokens_per_second"] for record in records if "tokens_per_second" in record)
    summary = {
        "regime": s.regime, "steps": int(state.step), "trained_parameters": trained, "tokens_seen": tokens,
        "tokens_per_trained_parameter": tokens / trained if trained else None,
        "tokens_per_second_median": speeds[len(speeds) // 2] if speeds else None,
        "peak_memory_gb": device.peak_memory_gb(), "estimated_memory_gb": run.memory_bytes / 1e9,
        "seconds_this_session": seconds, "data": plan.data.describe(), **held_out,
    }
    if usage is not None:
        summary["data_used"] = usage
    tail = [record for record in records if record["step"] > int(state.step) - max(1, int(state.step) // 20)]
    if tail:
        summary["loss_last_5_percent"] = sum(record["loss"] for record in tail) / len(tail)
        if "sparsity" in tail[-1]:
            summary["sparsity_last_step"] = tail[-1]["sparsity"]
    if s.target_local is not None:
        weights = [record["penalty_weight"] for record in records if "penalty_weight" in record]
        summary["target"] = {
            "asked": s.target_local, "tokens": s.target_tokens, "training": float(state.control.average),
            "held_out": held_out.get("held_out_local"), "weight": weights[-1] if weights else None,
            "greatest_weight": max(weights, default=None)}
        if "held_out_local_by_length" in held_out:
            summary["target"]["held_out_by_length"] = held_out["held_out_local_by_length"]
    if "held_out_loss" in held_out:
        with np.errstate(over="ignore"):
            summary["held_out_perplexity"] = float(np.exp(held_out["held_out_loss"]))
        best = Checkpoints(run_dir).metadata(BEST)
        if best is not None:
            summary["best_checkpoint"] = {"step": best["step"], "held_out_loss": best["best"]}
    return summary


def draw_curves(run_dir: pathlib.Path, run: Run) -> None:
    """`curves.png`, of what `metrics.jsonl` holds."""
    plan = run.plan
    metrics.draw_curves(metrics.read_metrics(run_dir / "metrics.jsonl"), run_dir / "curves.png",
                        f"{plan.settings.regime} on {plan.source or 'fresh parameters'}: {run_dir.name}",
                        learning_rate(run.dials, run.dials.lr))


def print_summary(run_dir: pathlib.Path, summary: dict[str, Any]) -> None:
    """The summary in the few lines that a terminal wants."""
    if "recall" in summary:
        print(demo.format_report(summary["recall"]))
    if "held_out_loss" in summary:
        sparsity = f", {summary['held_out_sparsity']:.1%} of decisions local" if "held_out_sparsity" in summary else ""
        print(f"held-out loss {summary['held_out_loss']:.4f} (perplexity {summary['held_out_perplexity']:.2f})"
              f"{sparsity}")
    if "target" in summary:
        print(told_target(summary["target"]))
    print(f"run folder: {run_dir}")


def told_target(target: dict[str, Any]) -> str:
    """What control came to, in one line: by held-out rows, or where there are none by the last training steps."""
    rows = "training" if target["held_out"] is None else "held_out"
    moved = target.get("calibrated")
    if moved is not None:
        target = {**target, "training": moved["after"]}
    reached = abs(target[rows] - target["asked"]) <= WITHIN
    missed = "" if reached else " (MISSED: train longer, or ask for another share)"
    counted = "" if target["tokens"] == "all" else " beyond the window"
    by_length = ", ".join(f"{share:.1%} in rows of {int(length):,}" for length, share in
                          target.get("held_out_by_length", {}).items() if share is not None)
    return (f"target: {target['asked']:.1%} of decisions{counted} local; {target[rows]:.1%} are on "
            f"{rows.replace('_', '-')} rows{missed}{f' ({by_length})' if by_length else ''}; lambda ended at "
            f"{target['weight']:.3g}, its greatest was {target['greatest_weight']:.3g}"
            + (f"; on training rows {moved['before']:.1%} were local before the threshold moved to "
               f"{moved['threshold']:.3g}, {moved['after']:.1%} after" if moved else ""))
