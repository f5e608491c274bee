"""The mesh of a run: its devices, and what they have to divide."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from l2a_jax import device
from l2a_jax.errors import UserError
from l2a_jax.sharding.axes import Axes, parse

NAMES = Axes._fields
"""Leaves are dealt over both axes together, rows over the first and tokens over the second."""
DATA, CONTEXT = NAMES
ROWS, STACKED = P(DATA), P(None, DATA)
"""How [B, ...] and [A, B, ...] or [L, B, ...] come to a device: its rows, whole."""


def check(axes: Axes, *, batch_size: int, seq_len: int, staged: bool = False) -> None:
    """UserError where the devices cannot be given equal parts of a micro-batch. `staged`: it may be that of a stage of
    a curriculum, which chose its rows."""
    if batch_size % axes.data:
        rows = (f"rows of {seq_len} tokens in micro-batches that {axes.data} divides, and --curriculum puts "
                f"{batch_size} into one, as many as --batch-size x --seq-len tokens hold" if staged else
                f"a --batch-size that {axes.data} divides, and it is {batch_size}")
        raise UserError(f"--mesh {axes} deals rows over {axes.data} devices; expected {rows}")
    if seq_len % axes.context:
        raise UserError(f"--mesh {axes} deals the tokens of a row over {axes.context} devices; expected a --seq-len"
                        f"{' and a --curriculum' if staged else ''} that {axes.context} divides, and it is {seq_len}")


def axes_of(mesh: Mesh | AbstractMesh | None) -> Axes:
    """Devices along each axis; without a mesh, one. ValueError where it has other axes."""
    if mesh is not None and mesh.axis_names != NAMES:
        raise ValueError(f"the mesh has the axes {mesh.axis_names}; expected {NAMES}")
    return Axes() if mesh is None else Axes(**mesh.shape)


def check_present(axes: Axes) -> None:
    """UserError where there are not as many devices."""
    have = len(jax.devices())
    if axes.devices > have:
        raise UserError(f"--mesh {axes} takes {axes.devices} devices; this machine has {have}")


def make_up(axes: Axes) -> bool:
    """Whether as many devices as the mesh takes were made up: a CPU can pass for several, until it is first used."""
    if device.in_use():
        return False
    jax.config.update("jax_num_cpu_devices", axes.devices)
    return device.platform() == "cpu"


def make(axes: Axes) -> Mesh:
    """The first devices of this machine as a mesh."""
    return Mesh(np.asarray(jax.devices()[: axes.devices]).reshape(axes), NAMES)


def named(text: str | None) -> Mesh | None:
    """The mesh that `--mesh` says; without one, None. UserError where there are not as many devices."""
    if text is None:
        return None
    check_present(parse(text))
    return make(parse(text))
