"""The last step of a run with a target: its share, counted and then met by moving the threshold.

Control ends near its target and not at it: as the learning rate goes to 0 the weight moves nothing any more, and what
was missing then stays missing. The threshold is one number for all layers; moved a little, the tokens that the router
was least sure of change sides. It is moved by the share on training rows (the text as it is, without echoes and
questions), so that held-out rows stay what they are: rows that nothing was fitted to.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from l2a_jax.data.batch import Batch, TrainingData
from l2a_jax.data.curriculum import Curriculum
from l2a_jax.data.dataset import PackedData
from l2a_jax.models.params import Tree
from l2a_jax.runs.plan import Run, read_by_all, with_threshold
from l2a_jax.training.step import TrainState, compute_params, evaluate_batch, target_tokens

log = logging.getLogger("l2a_jax")
TOKENS = 262_144
BATCHES = range(4, 33)
"""Of how many tokens a share is counted, in so many micro-batches: of two of the demo's, chance alone is a point."""
NEAR = 5e-4
"""A share as near to its target as this is left alone."""
FARTHEST, TRIES = 4.0, 8
"""How far the threshold's logit may move, and how often a share is counted on the way."""


class Calibration(NamedTuple):
    """A threshold, and the share of local decisions on training rows `before` it was moved to it and `after`."""

    threshold: float
    before: float
    after: float


def batches_of(data: TrainingData) -> int:
    """How many micro-batches of `data` a share is counted on."""
    return min(max(int(TOKENS // data.tokens_per_batch), BATCHES[0]), BATCHES[-1])


def calibrate(run: Run, state: TrainState, frozen: Tree) -> tuple[Run, Calibration | None]:
    """The run with the threshold that meets its target, and what that did; None where no token counts.

    Every pass decides anew with the threshold tried: what one layer decides moves what the next one reads."""
    plan = run.plan
    layer = plan.l2a_config
    local = _share_local(run)
    rows = list(islice(_training_rows(plan.data, plan.steps * plan.settings.grad_accum), batches_of(_plain(plan.data))))

    def share(moved: float) -> float:
        cut = layer.temperature * (_logit(layer.threshold) + moved)
        counts = jax.device_get([local(state.trainable, frozen, batch, cut) for batch in rows])
        found, counted = (math.fsum(map(float, part)) for part in zip(*counts, strict=True))
        return found / counted if counted else math.nan

    before = share(0.0)
    if math.isnan(before):
        log.warning("no token of the training rows counts for --target-local; the threshold stays where it is")
        return run, None
    moved, after = meet(share, before, plan.settings.target_local)
    threshold = layer.threshold if moved == 0 else 1 / (1 + math.exp(-_logit(layer.threshold) - moved))
    return with_threshold(run, threshold), Calibration(threshold, before, after)


def meet(share: Callable[[float], float], start: float, target: float) -> tuple[float, float]:
    """(x, share(x)) with share(x) nearest to `target` of a few tried, from share(0) = `start`: the secant of log-odds,
    kept between what was too little and what was too much. `share` rises."""
    low, high = -FARTHEST, FARTHEST
    tried = [(0.0, start)]
    slope = 1.0
    for _ in range(TRIES):
        at, found = tried[-1]
        if abs(found - target) <= NEAR:
            break
        low, high = (at, high) if found < target else (low, at)
        if len(tried) > 1 and tried[-2][1] != found:
            slope = max((_odds(found) - _odds(tried[-2][1])) / (at - tried[-2][0]), 1e-2)
        at += (_odds(target) - _odds(found)) / slope
        if not low < at < high:
            at = (low + high) / 2
        tried.append((at, share(at)))
    return min(tried, key=lambda pair: abs(pair[1] - target))


def _share_local(run: Run) -> Callable[..., tuple[Any, Any]]:
    """(local decisions, all decisions) of the tokens that the target counts, where z below `cut` is local."""
    objective, layers = run.objective, run.objective.config.num_layers

    # The loss is not asked for, so it is not computed.
    @functools.partial(jax.jit, **read_by_all(objective.mesh))
    def local(trainable, frozen, batch, cut):
        found = evaluate_batch(compute_params(trainable, frozen, objective.dtype), batch, None,
                               jnp.full(layers, cut, jnp.float32), objective=objective)
        followed = target_tokens(batch, objective)
        return jnp.sum(~found.decisions & followed), jnp.sum(followed) * layers

    return local


def _plain(data: TrainingData) -> TrainingData:
    """The rows of a run's own length, with the text as it is."""
    data = data.base if isinstance(data, Curriculum) else data
    return dataclasses.replace(data, echo=0.0, ask=0.0) if isinstance(data, PackedData) else data


def _training_rows(data: TrainingData, first: int) -> Iterator[Batch]:
    plain = _plain(data)
    while True:
        yield plain.batch(first)
        first += 1


def _logit(threshold: float) -> float:
    return math.log(threshold / (1 - threshold))


def _odds(share: float) -> float:
    share = min(max(share, 1e-4), 1 - 1e-4)
    return math.log(share / (1 - share))
