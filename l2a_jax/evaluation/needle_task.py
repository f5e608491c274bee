"""The needle grid as a task of `eval/run.py`: flags to options, and the heat map beside `eval.json`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from l2a_jax.errors import Missing
from l2a_jax.evaluation import needle, texts
from l2a_jax.evaluation.needle import NeedleOptions, format_table
from l2a_jax.fields import between, check_value
from l2a_jax.sources import Pretrained

__all__ = ["format_table", "make_options", "run"]

log = logging.getLogger("l2a_jax.eval")
RECALL_LENGTHS = (64, 128, 256)
"""What the embedded model, trained on rows of 128 tokens, can be asked."""


def make_options(given: dict[str, Any], model: Pretrained) -> NeedleOptions:
    """NeedleOptions from the flags, where `depths` and `seeds` are counts; `model` needs no parameters yet.

    Builds the prompts once, so that an empty haystack or a context too long raises UserError before anything is
    computed.
    """
    fields = dict(given)
    for name in ("depths", "seeds"):
        check_value(fields.get(name), Annotated[int | None, between(1, 1_000)], f"--needle-{name}")
    if texts.speaks_recall(model.tokenizer) and "haystack" not in fields:
        log.info("no --haystack: needles are hidden in the synthetic recall corpus, whose words this model speaks")
        fields.setdefault("lengths", RECALL_LENGTHS)
    if "depths" in fields:
        fields["depths"] = tuple(np.linspace(0, 1, fields["depths"]).tolist())
    if "seeds" in fields:
        fields["seeds"] = tuple(range(fields["seeds"]))
    options = NeedleOptions(**{name: tuple(value) if isinstance(value, list) else value for name, value in
                               fields.items()})
    needle.build_prompts(model, options)
    return options


def run(model: Pretrained, options: NeedleOptions, results: Path, backend: str) -> dict[str, Any]:
    """The grid's result; its heat map goes beside the results, under their name."""
    found = needle.evaluate_needle(model, options, backend=backend)
    drawn = picture(results)
    try:
        needle.draw_heat_map(found, drawn)
    except Missing as lacking:
        log.warning("no %s: %s", drawn.name, lacking)
        return found
    return {**found, "heat_map": drawn.name}


def picture(results: Path) -> Path:
    """Where the heat map goes."""
    return results.with_name(results.stem.replace("eval", "needle", 1) + ".png")
