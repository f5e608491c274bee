"""Checkpoints: the trainable subtree, the optimizer and the step, written by Orbax; the frozen base only by its name.

A run keeps its two newest checkpoints (if one is damaged, there is one before it) and, apart from them, the best one on
held-out text. A checkpoint takes its name when it is whole, so a killed process never leaves one that looks whole and
is not; `checksums.json` in it tells whether its bytes are still those that were written.
"""

from __future__ import annotations

import errno
import logging
import os
import pathlib
import shutil
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from l2a_jax.errors import UserError
from l2a_jax.files import parse_json, reading, sha256, write_json
from l2a_jax.models.params import Tree
from l2a_jax.shapes import each, require
from l2a_jax.sharding import processes
from l2a_jax.training.control import Control
from l2a_jax.training.step import TrainState

log = logging.getLogger("l2a_jax")
LATEST, BEST = "latest", "best"
KEPT = {LATEST: 2, BEST: 1}
SUMS = "checksums.json"
_METADATA = "_CHECKPOINT_METADATA"
_PARTIAL = ".partial"


class Checkpoints:
    """The `checkpoints/` folder of a run: `latest/STEP`, two of them, and `best/STEP`, one.

    Only whoever owns the run may `save`; reading changes nothing. `step` None is the newest of its kind. Several
    processes of one run save and load together: each the arrays that it holds, and process 0 what else there is.
    """

    def __init__(self, run_dir: pathlib.Path):
        self.root = run_dir.absolute() / "checkpoints"

    def steps(self, kind: str) -> list[int]:
        """The steps of the whole checkpoints of this kind, ascending."""
        try:
            names = os.listdir(self.root / kind)
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise UserError(f"{self.root / kind} is a file; expected a folder of checkpoints") from None
        return sorted(int(name) for name in names if name.isdecimal())

    def folder(self, kind: str, step: int | None = None) -> pathlib.Path:
        """The folder of a checkpoint. UserError where there is none."""
        steps = self.steps(kind)
        if not steps:
            raise UserError(f"{self.root / kind} holds no complete checkpoint")
        if step is not None and step not in steps:
            raise UserError(f"{self.root / kind} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        return self.root / kind / str(steps[-1] if step is None else step)

    def save(self, kind: str, state: TrainState, metadata: dict[str, Any]) -> None:
        """Write `state` and return when it is whole. UserError where the system refuses; what was there stays.

        The oldest goes before the new one comes, so there is never more on the disk than what is kept and one whole
        checkpoint of the kind is always there. A run resumed from before the best checkpoint comes by it again, bit
        for bit the same: nothing is written then.
        """
        step, folder = int(state.step), self.root / kind
        if (self.steps(kind) or [-1])[-1] >= step:
            return
        partial = folder / _PARTIAL
        try:
            with processes.together():
                folder.mkdir(parents=True, exist_ok=True)
                self.sweep(kind)
                self._drop(kind, max(1, KEPT[kind] - 1))
            parts = {"trainable": state.trainable, "optimizer": _numbered(state.optimizer), **_control(state)}
            ocp.save_checkpointables(partial / str(step), parts, custom_metadata={**metadata, "checksums": SUMS})
            with processes.together():
                self._finish(partial / str(step), folder / str(step))
        except Exception as error:  # Orbax raises many kinds for one fact: the system refuses
            kept = "; ".join(str(self.root / kind / str(step)) for step in self.steps(kind)) or "none"
            raise UserError(f"the checkpoint {folder / str(step)} cannot be written: {_reason(error)} (whole ones "
                            f"there: {kept})") from error
        finally:
            if processes.first():
                shutil.rmtree(partial, ignore_errors=True)
        with processes.together():
            self._drop(kind, KEPT[kind])

    def _finish(self, written: pathlib.Path, whole: pathlib.Path) -> None:
        """Give a checkpoint that all have written its sums and its name."""
        if processes.first():
            write_json(written / SUMS, {"step": int(whole.name), "sha256": _sums(written)})
            written.rename(whole)

    def sweep(self, kind: str) -> None:
        """Remove what killed processes did not finish; for whoever owns the run."""
        if not processes.first():
            return
        for left in (self.root / kind).glob("*"):
            if not left.name.isdecimal():
                shutil.rmtree(left, ignore_errors=True)

    def metadata(self, kind: str = LATEST, step: int | None = None) -> dict[str, Any] | None:
        """What was saved beside a state, and its `step`; None where there is none. UserError where it is damaged."""
        if step is None and not self.steps(kind):
            return None
        folder = self.folder(kind, step)
        self._check_sums(kind, folder, ())
        found = self._custom(kind, folder)
        return {**found, "step": int(folder.name)}

    def load(self, kind: str, like: TrainState) -> TrainState:
        """The newest state of this kind, in the structure of `like` (arrays or shapes), and dealt over devices as that
        is, however it was when it was written. UserError where it differs."""
        step, parts = self._load(kind, {"trainable": like.trainable, "optimizer": _numbered(like.optimizer),
                                        **_control(like)}, None)
        leaves = [parts["optimizer"][name] for name in sorted(parts["optimizer"])]
        optimizer = jax.tree.unflatten(jax.tree.structure(like.optimizer), leaves)
        return TrainState(jnp.asarray(step, jnp.int32), parts["trainable"], optimizer, jnp.ones((), bool),
                          None if like.control is None else Control(**parts["control"]))

    def load_trainable(self, kind: str, like: Tree, step: int | None = None) -> tuple[int, Tree]:
        """The step and the trainable masters alone: what evaluation and export need."""
        step, parts = self._load(kind, {"trainable": like}, step)
        return step, parts["trainable"]

    def _load(self, kind, parts, step):
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None) or device), parts)
        folder = self.folder(kind, step)
        checked = processes.of_first(lambda: self._check_sums(kind, folder, parts))
        try:
            return int(folder.name), ocp.load_checkpointables(folder, abstract)
        except Exception as error:  # Orbax raises many kinds, and words, for the one fact that the files do not fit
            if checked:
                raise UserError(f"the checkpoint {folder} is whole but not of this run: it holds other arrays than "
                                "the config.json beside it says are trained") from error
            raise self._damaged(kind, folder, "its arrays cannot be read, or are not those of this run") from error

    def _check_sums(self, kind: str, folder: pathlib.Path, parts: Collection[str]) -> bool:
        """Whether there are sums to tell by; checkpoints of older versions have none, which is said. UserError unless
        the files beside and in the `parts` have the bytes that were written."""
        if "checksums" not in self._custom(kind, folder) and not (folder / SUMS).exists():
            if parts:
                log.info("%s was written without checksums: damage to its numbers would not be noticed", folder)
            return False
        recorded = self._written(kind, folder, SUMS, {"step": int, "sha256": each(str)})
        if str(recorded["step"]) != folder.name:
            raise self._damaged(kind, folder, f"it was written as step {recorded['step']}")
        for name, value in recorded["sha256"].items():
            top, slash, _ = name.partition("/")
            if slash and top not in parts:
                continue
            if not (folder / name).is_file():
                raise self._damaged(kind, folder, f"its file {name} is missing")
            if sha256(folder / name) != value:
                raise self._damaged(kind, folder, f"its file {name} is not what was written (the checksums differ)")
        return True

    def _custom(self, kind: str, folder: pathlib.Path) -> dict[str, Any]:
        """What we saved beside the arrays; read by ourselves, as Orbax would look at the arrays too and log at length
        what it does not like."""
        return self._written(kind, folder, _METADATA, {"custom_metadata?": dict}).get("custom_metadata") or {}

    def _written(self, kind: str, folder: pathlib.Path, name: str, shape: dict[str, Any]) -> dict[str, Any]:
        """What a JSON file of a checkpoint holds. UserError that it is damaged where the file is not of its shape."""
        if not (folder / name).exists():
            raise self._damaged(kind, folder, f"its file {name} is missing")
        with reading(folder / name):
            content = (folder / name).read_bytes()
        try:
            found = parse_json(content, name)
            require(found, shape, name)
        except UserError as error:
            raise self._damaged(kind, folder, f"its file {name} is not what was written") from error
        return found

    def _damaged(self, kind: str, folder: pathlib.Path, what: str) -> UserError:
        before = [step for step in self.steps(kind) if step < int(folder.name)]
        best = self.steps(BEST) if kind == LATEST else []
        if before:
            advice = f"remove that folder, and the one before it, {folder.parent / str(before[-1])}, is the newest"
        elif kind == BEST:
            advice = f"the newest is in {self.root / LATEST}; without {folder} --resume finds another best"
        else:
            advice = "there is none before it: without that folder --resume begins from the start"
        if best:
            advice += f"; {self.root / BEST / str(best[-1])} is another"
        return UserError(f"the checkpoint {folder} is damaged: {what}; {advice}")

    def _drop(self, kind: str, kept: int) -> None:
        if not processes.first():
            return
        for step in self.steps(kind)[:-kept]:
            # Under another name first: a folder with a step's name is a whole checkpoint.
            gone = self.root / kind / f".{step}{_PARTIAL}"
            (self.root / kind / str(step)).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _sums(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def _reason(error: BaseException) -> str:
    """Why the system refused, out of the page that TensorStore makes of it."""
    text = str(error).strip() or type(error).__name__
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
        if os.strerror(number) in text:
            return os.strerror(number)
    first = text.splitlines()[0]
    return first if len(first) <= 300 else f"{first[:297]}..."


def _control(state: TrainState) -> dict[str, Any]:
    """The part of a checkpoint that only a run with a target has."""
    return {} if state.control is None else {"control": state.control._asdict()}


def _numbered(tree: Any) -> dict[str, Any]:
    """The leaves of an optimizer state under names that sort in order; its structure comes from the run's settings."""
    return {f"{index:05d}": leaf for index, leaf in enumerate(jax.tree.leaves(tree))}
