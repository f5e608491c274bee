"""Checkpoints: the trainable subtree, the optimizer and the step, written by Orbax; the frozen base only by its name.

A run keeps the newest checkpoint and, apart from it, the best one on held-out text. Orbax writes into a temporary
folder and renames it, so a killed process never leaves a checkpoint that looks whole and is not.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from l2a_jax.errors import UserError
from l2a_jax.models.params import Tree
from l2a_jax.training.step import TrainState

LATEST, BEST = "latest", "best"


class Checkpoints:
    """The `checkpoints/` folder of a run: `latest/STEP` and `best/STEP`, one of each."""

    def __init__(self, run_dir: pathlib.Path):
        self.root = run_dir.absolute() / "checkpoints"

    def save(self, kind: str, state: TrainState, metadata: dict[str, Any]) -> None:
        """Write `state`; the one before is deleted only after this one is complete. Blocks until it is.

        A run resumed from before the best checkpoint comes by it again, bit for bit the same: nothing is written then.
        """
        step = int(state.step)
        with self._open(kind) as folder:
            if folder.latest is None or folder.latest.step < step:
                parts = {"trainable": state.trainable, "optimizer": _numbered(state.optimizer)}
                folder.save_checkpointables(step, parts, custom_metadata=metadata)

    def metadata(self, kind: str = LATEST) -> dict[str, Any] | None:
        """What was saved beside the newest state of this kind, and its `step`; None where there is none."""
        if not (self.root / kind).is_dir():
            return None
        with self._open(kind) as folder:
            if folder.latest is None:
                return None
            return {**(folder.checkpointables_metadata(folder.latest).custom_metadata or {}),
                    "step": folder.latest.step}

    def load(self, kind: str, like: TrainState) -> TrainState:
        """The newest state of this kind, in the structure of `like` (arrays or shapes). UserError where it differs."""
        step, parts = self._load(kind, {"trainable": like.trainable, "optimizer": _numbered(like.optimizer)})
        leaves = [parts["optimizer"][name] for name in sorted(parts["optimizer"])]
        optimizer = jax.tree.unflatten(jax.tree.structure(like.optimizer), leaves)
        return TrainState(jnp.asarray(step, jnp.int32), parts["trainable"], optimizer, jnp.ones((), bool))

    def load_trainable(self, kind: str, like: Tree) -> tuple[int, Tree]:
        """The step and the trainable masters alone: what evaluation and export need."""
        step, parts = self._load(kind, {"trainable": like})
        return step, parts["trainable"]

    def _load(self, kind, parts):
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), parts)
        if self.metadata(kind) is None:
            raise UserError(f"{self.root / kind} holds no complete checkpoint")
        with self._open(kind) as folder:
            step = folder.latest.step
            try:
                return step, folder.load_checkpointables(step, abstract)
            except Exception as error:  # Orbax raises many kinds for one fact: the files are not what was expected
                raise UserError(f"the checkpoint {self.root / kind / str(step)} is damaged or does not fit this run: "
                                f"{str(error).strip().splitlines()[0]}") from error

    def _open(self, kind: str) -> ocp.training.Checkpointer:
        return ocp.training.Checkpointer(
            self.root / kind,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(1),
            cleanup_tmp_directories=True,
        )


def _numbered(tree: Any) -> dict[str, Any]:
    """The leaves of an optimizer state under names that sort in order; its structure comes from the run's settings."""
    return {f"{index:05d}": leaf for index, leaf in enumerate(jax.tree.leaves(tree))}
