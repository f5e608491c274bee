"""The rows of the table: a choice at a density each, scored on the text, read RULER's prompts under, and timed.

    the router as it is, none and all -> the orders that search opens units in -> a row of each choice at each density

What is finished is kept at once, and not computed again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from l2a_jax.evaluation import intervals, reach, ruler, ruler_source
from l2a_jax.evaluation.perplexity import Scores, Windows, routing_rates, score_windows
from l2a_jax.nn import routing
from l2a_jax.research.rivals import report
from l2a_jax.research.rivals.choices import Choice, Choices, Found, able_layers, check_density
from l2a_jax.research.rivals.options import RivalOptions
from l2a_jax.research.rivals.prepare import Prepared
from l2a_jax.research.rivals.search import Losses, greedy
from l2a_jax.research.rivals.times import Times
from l2a_jax.research.rivals.unfinished import Unfinished
from l2a_jax.sources import Pretrained

log = logging.getLogger("l2a_jax.rivals")


def rows_of(options: RivalOptions, model: Pretrained, prepared: Prepared, passes: dict[str, Any],
            kept: Unfinished) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row of each choice at each density, and what they have in common. `passes`: how a text is read."""
    text, layers = prepared.text, model.config.num_layers
    edges, groups = reach.distances(text, model)

    def score(label: str, choice: Choice) -> Scores:
        return score_windows(model, text, **choice.given(layers, *text.tokens.shape), **passes, label=label)

    def sums(scores: Scores) -> np.ndarray:
        return reach.sums(scores.token_nll, groups, len(edges))

    own = None
    if "all" not in kept.parts:
        own = score("the router's own decisions", Choice("learned", 0.0))
        none, every = np.zeros(layers), np.isin(np.arange(layers), able_layers(model)).astype(float)
        kept.keep(rates=routing_rates(own.decisions, text.real), **{
            name: sums(score(name, Choice(name, rates.mean(), rates=rates)))
            for name, rates in (("none", none), ("all", every))})
    rates, none, everything = (np.asarray(kept.parts[name], float) for name in ("rates", "none", "all"))
    density = float(rates.mean())
    check_density(density, model, "the router's own density")
    asked = [density, *sorted((1 - local / 100 for local in options.local), reverse=True)]
    found = _found(options, model, prepared, max(asked), rates, passes, kept)
    as_trained = routing.least(model.l2a_config.temperature, model.l2a_config.threshold)
    known = {one["cut"]: np.array(one["rates"])
             for one in kept.parts.get("known", [{"cut": as_trained, "rates": rates}])}
    choices = Choices(model, text, found, known, passes)
    wanted = [(place == 0, target, name) for place, target in enumerate(asked) for name in choices.names(target)]
    kept.expect([(name, target) for _, target, name in wanted])
    todo = wanted[len(kept.rows):]
    times = Times(model, text.tokens[0], options.backend) if options.times and todo else None
    for as_it_is, target, name in todo:
        choice, scores = ((Choice(name, density), own) if as_it_is and name == "learned"
                          else choices.make(name, target))
        scores = scores or score(f"{name} at {target:.1%}", choice)
        row = {"name": name, "target": target, "own": as_it_is, **_density(choice, scores, text, groups),
               **reach.kept(none, sums(scores), everything), "sums": np.round(sums(scores), 4)}
        if prepared.prompts and name != "oracle":
            row["ruler"] = dict(_ruler(model, prepared, choice, passes))
        if times is not None and choice.heads is None:
            row |= {"prefill_ms": times.prefill_ms(scores.decisions[:, :1]),
                    "decode_ms": times.decode_ms(scores.decisions[:, :1])}
        kept.keep(rows=[*kept.rows, row], known=[{"cut": cut, "rates": rates} for cut, rates in known.items()])
        log.info("%s", report.line(row))
    return [_beside(row, kept.rows, none - everything) for row in kept.rows], {
        "edges": edges, "density": density,
        **reach.worth(none, everything, reach.sums(np.ones(groups.shape, int), groups, len(edges))),
        "searched_layers": [int(unit[0]) for unit in found.layers], "searched_heads": found.heads}


def _found(options: RivalOptions, model: Pretrained, prepared: Prepared, most: float, rates: np.ndarray,
           passes: dict[str, Any], kept: Unfinished) -> Found:
    layers, heads = model.config.num_layers, model.config.num_kv_heads

    def order(units: str, count: int) -> list[tuple[int, ...]]:
        losses = Losses(model, prepared.calibration, units, options.backend, passes["mesh"])
        return greedy(losses, count, f"{units} searched", kept.parts.get(units, ()),
                      lambda order: kept.keep(**{units: order}))

    by_layer = order("layers", math.ceil(most * layers))
    shared = model.l2a_config.share_attention and not model.l2a_config.pruned_layers
    if not shared:
        log.warning("no heads are searched: they need one attention set for both paths, and no pruned layer")
    return Found(rates, by_layer, order("heads", math.ceil(most * layers * heads)) if shared else None)


def _density(choice: Choice, scores: Scores, text: Windows, groups: np.ndarray) -> dict[str, float]:
    """What is really routed: of all tokens, and of those beyond the window."""
    return {name: choice.spent(routing_rates(scores.decisions, tokens))
            for name, tokens in (("density", text.real), ("density_beyond", groups > 0))}


def _ruler(model: Pretrained, prepared: Prepared, choice: Choice,
           passes: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(task and length, the score of each prompt and the share of its decisions that was local), with prompts and
    answers under the choice."""
    for (task, length), items in prepared.prompts.items():
        whole = len(items[0].tokens) + ruler_source.settings(task).new_tokens
        given = choice.given(model.config.num_layers, len(items), whole)
        written = ruler.write(model, items, task, length, prepared.ruler, **given, mesh=passes["mesh"])
        local = 1 - choice.spent(written.decisions.mean(axis=(1, 2)))
        yield f"{task} {length}", {"local": local, "scores": [
            ruler_source.score(task, item.answers, text) for item, text in zip(items, written.texts, strict=True)]}


def _beside(row: dict[str, Any], rows: list[dict[str, Any]], worth: np.ndarray) -> dict[str, Any]:
    """The row, and how far it is behind the learned choice of its density."""
    lead = next(one for one in rows if one["target"] == row["target"] and one["name"] == "learned")
    behind, interval = reach.ratio((np.array(row["sums"]) - lead["sums"])[:, 1:].sum(1), worth[:, 1:].sum(1))
    return {**row, "behind": behind, "behind_95": interval, **_behind(row.get("ruler"), lead.get("ruler"))}


def _behind(mine: dict[str, dict] | None, lead: dict[str, dict] | None) -> dict[str, Any]:
    """RULER's mean, how much was local, and how much less than the learned choice, paired over prompts."""
    if mine is None:
        return {}
    scores, base = (np.concatenate([one[name]["scores"] for name in mine]).tolist() for one in (mine, lead))
    difference, interval = intervals.paired_items(scores, base)
    local = float(np.mean([one["local"] for one in mine.values()]))
    return {"ruler_mean": float(np.mean(scores)), "ruler_local": local, "ruler_behind": -difference,
            "ruler_behind_95": [-interval[1], -interval[0]]}
