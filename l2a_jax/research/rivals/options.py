"""Every flag of `eval/rivals.py`. Free of JAX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from l2a_jax.attention.backends import Backend
from l2a_jax.errors import UserError, shown
from l2a_jax.evaluation.options import Hay, Lengths
from l2a_jax.fields import DTYPE, SEED, Distinct, Filled, Mark, Unit, Written, between, count, length
from l2a_jax.sharding import axes
from l2a_jax.training.settings import Source


def _percents(text: str, flag: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} is {shown(text)}; expected numbers with commas, such as 80,90,95") from None


@dataclass(frozen=True, kw_only=True)
class RulerFlags:
    """RULER under every choice, where --lengths is given."""

    lengths: Annotated[Lengths | None, Unit("tokens"), "prompt lengths"] = None
    ruler_items: Annotated[int, count(), "prompts a task and length"] = 10
    haystack: Annotated[Hay | None, "files, folders or globs of text for the prompts"] = None


@dataclass(frozen=True, kw_only=True)
class RivalOptions(RulerFlags):
    """What is compared."""

    source: Annotated[Source, Mark.POSITIONAL]
    text: Annotated[str, Filled(), "file, folder or glob to score: what no run was trained on"]
    calibration: Annotated[str, Filled(), Unit("text"), "text that layers and heads are chosen by"]
    local: Annotated[tuple[Annotated[float, between(0, 100)], ...], Distinct(), Written(_percents), Unit("percent"),
                     "shares of decisions that are local, beside the router's own"] = (80.0, 90.0, 95.0)
    context: Annotated[int, length(), Unit("tokens"), "tokens a window of --text"] = 32_768
    max_windows: Annotated[int | None, count(), "the first so many windows only (default: the whole text)"] = None
    calibration_context: Annotated[int, length(), Unit("tokens"), "tokens a window of --calibration"] = 8_192
    calibration_windows: Annotated[int, count(), "how many of them"] = 4
    times: Annotated[bool, "measure prefill and decode under every choice, on this device"] = False
    seed: Annotated[int, SEED, "of RULER's prompts"] = 0
    out: Annotated[Path | None, "folder for rivals.json, its table and its figure (default: the run folder)"] = None
    dtype: Annotated[str | None, DTYPE, "of weights (default: bfloat16; on a CPU float32)"] = None
    backend: Backend = "auto"
    mesh: Annotated[str | None, Written(axes.written), Unit("axes"),
                    "devices over which windows and prompts (data) and their tokens (context) are dealt, such as "
                    "data=2,context=4 (default: one device)"] = None


@dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    """Several tables in one figure."""

    compare: Annotated[tuple[Annotated[Path, Unit("file")], ...], Distinct(),
                       "rivals.json of several runs over the same text, the best recipe first: its rivals are drawn"]
    names: Annotated[tuple[Annotated[str, Filled(), Unit("name")], ...], "what their routers are called in it, in that "
                     "order (default: the names of the runs)"] = ()
    out: Annotated[Path, "folder for frontier.png"]
