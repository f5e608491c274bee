"""Every flag of `eval/speed.py`. Free of JAX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from l2a_jax.fields import Choice, Filled, Unit
from l2a_jax.training.tables import REGIMES


@dataclass(frozen=True, kw_only=True)
class OtherTables:
    """Tables in place of that of attention calls."""

    windows: Annotated[bool, "attention at ratios of length to window"] = False
    blocks: Annotated[bool, "every block size of every kernel"] = False
    shares: Annotated[bool, "how many programs share a block of keys in the backward pass"] = False
    training: Annotated[bool, "whole training steps"] = False
    large: Annotated[bool, "steps of the larger models; cap the memory with XLA_PYTHON_CLIENT_MEM_FRACTION"] = False
    scaling: Annotated[bool, "training steps over meshes of 1, 2, 4 and 8 devices, as many as there are"] = False
    imbalance: Annotated[tuple[Annotated[str, Filled(), Unit("source")], ...],
                         "how evenly the decisions of these runs lie on devices that share a row; needs no GPU"] = ()
    drift: Annotated[tuple[Annotated[str, Filled(), Unit("run")], ...],
                     "how far the losses of these runs, over meshes and not, are apart; needs no GPU"] = ()
    profile: Annotated[str | None, Choice(*REGIMES), Unit("regime"), "the kernels of one training step"] = None
    inference: Annotated[bool, "prefill and decode steps, beside transformers"] = False
    compile: Annotated[bool, "registers, spills and shared memory of every kernel for sm_89 and sm_90, without a GPU"
                       ] = False


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(OtherTables):
    """What is measured."""

    out: Annotated[Path | None, "folder for the JSON and the markdown table"] = None
    only: Annotated[str, Unit("pattern"), "measure the cases whose name this regular expression finds"] = ""
    text: Annotated[tuple[Annotated[str, Filled(), Unit("file")], ...], "with --imbalance: what is read"] = ()
    no_torch: Annotated[bool, "leave PyTorch out"] = False
    model: Annotated[str | None, Filled(), Unit("source"),
                     "with --inference: real weights (default: random ones of the 0.5B)"] = None
