"""How far the losses of a run drift apart where its sums are taken in another order: over a mesh, or in micro-batches.

Run folders are read; no device is needed. Micro-batches on one device are the yardstick, though leakage is drawn for
each of them. Held-out losses are not compared: their rows depend on the batch size.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from l2a_jax.errors import UserError, shown
from l2a_jax.research import tables
from l2a_jax.training.metrics import read_metrics
from l2a_jax.training.run_files import read_run

LAST = 20
DEALT = ("mesh", "batch_size", "grad_accum")
FREE = {*DEALT, "model", "backend", "remat", "unroll", "save_every", "eval_every", "eval_batches", "preset", "given"}
"""Settings that may differ in a group; the first say how its rows are dealt."""


class Run(NamedTuple):
    """A run folder: model, regime and tokens a step; on what it ran, and how its rows are dealt; what all of its group
    have to have alike; its training losses from step 1 on."""

    folder: Path
    group: str
    device: str | None
    dealt: tuple
    fixed: dict
    losses: Float64[np.ndarray, " steps"]

    def less(self, other: Run) -> Float64[np.ndarray, " both"]:
        """By how much its loss is above another's, over the steps that both have."""
        steps = min(len(self.losses), len(other.losses))
        return self.losses[:steps] - other.losses[:steps]


def read(folder: Path) -> Run:
    """The run of a folder. UserError where it has no losses, or not of every step up to its last."""
    config, path = read_run(folder), folder / "metrics.jsonl"
    losses = {record["step"]: record["loss"] for record in read_metrics(path)}
    if not losses or [*losses] != [*range(1, len(losses) + 1)]:
        raise UserError(f"{path} has losses of {len(losses)} steps; expected one of every step from the first on")
    s = config.settings
    group = f"{Path(s.model or 'demo').name} {s.regime}, {s.batch_size * s.grad_accum * s.seq_len:,} tokens a step"
    fixed = {f"settings.{name}": value for name, value in vars(s).items() if name not in FREE}
    return Run(folder, group, config.device, tuple(getattr(s, name) for name in DEALT),
               {"source_hash": config.source_hash, **fixed}, np.array([*losses.values()], np.float64))


def beside(run: Run, base: Run, before: list[Run]) -> dict:
    """A run beside `base`; `same`: beside the first run `before` it that was dealt alike, how many steps of
    how many are equal at first, and how far apart later ones are at most."""
    signed, same = run.less(base), None
    sizes, twin = np.abs(signed), next((one for one in before if one.dealt == run.dealt), None)
    if twin is not None:
        other = np.append(np.abs(run.less(twin)), np.inf)
        equal = int(np.argmax(other != 0))
        same = {"run": str(twin.folder), "steps": equal, "of": len(other) - 1,
                "largest_later": other[equal:-1].max(initial=0)}
    return {"of": run.group, "run": str(run.folder), "device": run.device, "mesh": run.dealt[0],
            "micro_batches": run.dealt[2], "steps": len(signed), "mean": sizes.mean(), "largest": sizes.max(),
            "largest_at": int(sizes.argmax()) + 1, "last": sizes[-LAST:].mean(), "signed": signed.mean(),
            "base": str(base.folder), "same": same}


def compared(runs: list[Run]) -> list[dict]:
    """The runs of a group beside its base, without a mesh and in one micro-batch. UserError where there is none, or
    another setting differs."""
    base = next((run for run in runs if run.dealt[0] is None and run.dealt[2] == 1), None)
    if base is None or len(runs) == 1:
        raise UserError(f"--drift has {', '.join(str(run.folder) for run in runs)} of {runs[0].group}; expected one "
                        "without a mesh and in one micro-batch, and others")
    for run in runs:
        for name, wanted in base.fixed.items():
            if (found := run.fixed[name]) != wanted:
                raise UserError(f"{run.folder}: {name} is {shown(found)}; {base.folder} has {shown(wanted)}")
    return [beside(run, base, runs[:place]) for place, run in enumerate(runs) if run is not base]


def markdown(result: dict) -> str:
    """The runs as one table."""
    rows = [[row["of"], row["run"], row["device"] or "unknown", row["mesh"] or "none", row["micro_batches"],
             row["steps"], f"{row['mean']:.4f}", f"{row['largest']:.4f}", row["largest_at"], f"{row['last']:.4f}",
             f"{row['signed']:+.4f}"] for row in result["runs"]]
    return "\n".join([
        "# Losses of the same run, its sums taken in another order", "",
        f"{tables.said(result)} Differences of the training loss, in nats, from the run on one device in one "
        f"micro-batch: mean and largest size, the mean size of the last {LAST} steps, and the mean with its sign.", "",
        *tables.grid(["of", "run", "on", "mesh", "micro-batches", "steps", "mean", "largest", "at step",
                      f"last {LAST}", "signed"], rows),
        *(f"- {row['run']} is {same['run']} to the last bit for {same['steps']} of {same['of']} steps, and at most "
          f"{same['largest_later']:.4f} nats from it later." for row in result["runs"] if (same := row["same"]))
    ]).rstrip() + "\n"


def main(folders: tuple[str, ...], out: Path | None) -> None:
    """Compare the runs of these folders; drift.json and drift.md."""
    runs = [read(Path(folder)) for folder in folders]
    groups = [[run for run in runs if run.group == group] for group in dict.fromkeys(run.group for run in runs)]
    result = {**tables.heading(), "runs": [row for group in groups for row in compared(group)],
              "losses": {str(run.folder): run.losses for run in runs}}
    tables.write(out, "drift", result, markdown(result))
    print(markdown(result), flush=True)
