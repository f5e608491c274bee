"""What an evaluation can be asked: the tasks there are, and every flag of `eval/run.py`. Free of JAX."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from l2a_jax.attention.backends import Backend
from l2a_jax.data.counts import parse_layers
from l2a_jax.errors import UserError, shown
from l2a_jax.evaluation.registry import EXPECTED
from l2a_jax.evaluation.ruler_source import RULER_TASKS, USUAL
from l2a_jax.fields import DTYPE, SEED, Choice, Distinct, Filled, Mark, Range, Unit, Written, between, count, length
from l2a_jax.sharding import axes
from l2a_jax.training.settings import Source

ROUTES = ("learned", "all", "none")
CONTROLS = ("all", "none", "random", "shuffled", "static")
"""Decisions that know nothing of the text; see `controls`."""
OPENED = {"answer": 0, "question": 64}
"""RULER's two that are the router's own, but so many tokens at a prompt's end, and all after it, see everything.
64 hold what is asked, and how the answer begins."""


def _names(text: str, flag: str) -> tuple[str, ...]:
    return tuple(name for name in text.replace(" ", "").split(",") if name)


def _integers(text: str, flag: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} is {shown(text)}; expected whole numbers with commas, such as 512,1024") from None


Lengths = Annotated[tuple[Annotated[int, length(), Unit("tokens")], ...], Distinct(), Written(_integers),
                    "context lengths in tokens, such as 512,1024,2048"]
Needles = Annotated[int, count(), "how many needles in a haystack; one is asked for"]
Generate = Annotated[int, count(0), "continue so many prompts by real decoding, to be read"]
Hay = Annotated[tuple[Annotated[str, Filled(), Unit("text")], ...], Filled("a list"),
                     "files, folders or globs of text to hide needles in (RULER too), or recall: the synthetic corpus"]


@dataclass(frozen=True)
class NeedleFlags:
    """Needle."""

    needle_lengths: Lengths = (512, 1_024, 2_048, 4_096)
    needle_depths: Annotated[int, between(1, 1_000), "how many depths, from the beginning to the end"] = 5
    needle_seeds: Annotated[int, between(1, 1_000), "how many draws of each cell"] = 3
    needle_needles: Needles = 1
    needle_generate: Generate = 0
    haystack: Hay = ("recall",)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Text."""

    text: Annotated[str | None, Filled(), "file, folder, glob, or wikitext[:test|validation] from the hub"] = None
    context: Annotated[int | None, length(), Unit("tokens"),
                       "tokens a window (default: 2048, or what the model can take)"] = None
    stride: Annotated[int | None, length(), Unit("tokens"),
                      "tokens between windows (default: the context, disjoint windows)"] = None
    max_windows: Annotated[int | None, count(), "the first so many windows only (default: the whole text)"] = None
    audit_seeds: Annotated[int, between(1, 1_000), "draws of random and shuffled routing"] = 3
    looks_sample: Annotated[int, count(), Unit("tokens"), "of looks: tokens of each window and layer, routed and local "
                            "each, whose attention is written out"] = 32
    looks_from: Annotated[int | None, count(0), Unit("token"), "of looks: token of the first window at which the "
                          "picture begins (default: the first line beyond the window)"] = None


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Benchmarks."""

    limit: Annotated[int | None, count(), "the first so many items of each task"] = None
    num_fewshot: Annotated[int | None, between(0, 1_000), "worked examples before each question"] = None
    task_data: Annotated[Path | None, "folder of local task files (default: the hub)"] = None
    log_samples: Annotated[bool, "write every item's log-likelihoods beside eval.json, as texts always are"] = False


@dataclass(frozen=True, kw_only=True)
class RulerOptions:
    """RULER."""

    lengths: Lengths = (4_096, 8_192, 16_384, 32_768)
    ruler_tasks: Annotated[tuple[Annotated[str, Choice(*RULER_TASKS)], ...], Distinct(), Written(_names),
                           "some of them, with commas"] = USUAL
    ruler_items: Annotated[int, between(1, 500), "prompts of each task and length"] = 25
    controls: Annotated[tuple[Annotated[str, Choice("learned", *CONTROLS, *OPENED)], ...], Distinct(), Written(_names),
                        "decisions that prompts are read under, beside the router's own"] = ("learned",)


@dataclass(frozen=True, kw_only=True)
class RouteOptions:
    """What is routed."""

    route: Annotated[str, Choice(*ROUTES), "none: every layer pruned"] = "learned"
    prune_layers: Annotated[tuple[Annotated[int, count(0)], ...], Unit("layers"), Written(parse_layers),
                            "layers without global attention, such as 3,5-8"] = ()
    prune_sparsity: Annotated[float | None, Unit("share"), "prune the layers sparser than this on --calibration",
                              Range(0, 1, high_included=False, meaning="a share of tokens not routed, such as 0.99")
                              ] = None
    calibration: Annotated[str | None, Filled(), Unit("text"), "text to measure --prune-sparsity on"] = None


@dataclass(frozen=True)
class Options(TextOptions, BenchmarkOptions, RulerOptions, RouteOptions):
    """One evaluation. `layer` and `needle` hold the flags of `LayerSettings` and `NeedleFlags` that were given."""

    source: Annotated[Source, Mark.POSITIONAL]
    tasks: Annotated[tuple[str, ...], Written(_names), EXPECTED]
    out: Annotated[Path | None, "folder for eval.json"] = None
    dtype: Annotated[str | None, DTYPE, "float32: exact products too (default: bfloat16; on a CPU float32)"] = None
    backend: Backend = "auto"
    batch_tokens: Annotated[int | None, count(), Unit("tokens"),
                            "tokens a batch, on each device (default, of windows: 16384; on a CPU 4096)"] = None
    mesh: Annotated[str | None, Written(axes.written), Unit("axes"),
                    "devices over which rows (data) and the tokens of a row (context) are dealt, such as "
                    "data=4 (default: one device)"] = None
    seed: Annotated[int, SEED, "of sampled text in the collapse report, of RULER's prompts, and of looks' tokens"] = 0
    needle: Annotated[dict[str, Any], Mark.RECORDED] = field(default_factory=dict)
    layer: Annotated[dict[str, Any], Mark.RECORDED] = field(default_factory=dict)
