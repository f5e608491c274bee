"""What `eval/rivals.py` does: a run's router beside its rivals at equal densities, as one table and one figure.

    options -> windows, prompts (all that can be wrong) -> model -> what the choices are made of -> scores of each
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from l2a_jax import device, fields
from l2a_jax.attention import api as attention
from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.errors import UserError
from l2a_jax.evaluation import intervals, reach, ruler, ruler_source
from l2a_jax.evaluation.options import Options
from l2a_jax.evaluation.perplexity import BATCH_TOKENS, Scores, Windows, routing_rates, score_windows
from l2a_jax.evaluation.ruler_text import Item, build
from l2a_jax.evaluation.windows import windows_of
from l2a_jax.files import check_file, check_writable, write_json, write_text
from l2a_jax.provenance import provenance
from l2a_jax.research.rivals import report
from l2a_jax.research.rivals.choices import (
    Choice,
    Found,
    able_layers,
    check_density,
    joined_heads,
    learned_choice,
    static_choices,
)
from l2a_jax.research.rivals.options import RivalOptions
from l2a_jax.research.rivals.oracle import decision_worth, most_worth
from l2a_jax.research.rivals.search import Losses, greedy
from l2a_jax.research.rivals.times import Times
from l2a_jax.sharding import whole
from l2a_jax.sharding.mesh import named
from l2a_jax.sources import Pretrained, load_pretrained, locate, read_config, run_source, source_tokenizer

log = logging.getLogger("l2a_jax.rivals")
NAME = "rivals"


class Prepared(NamedTuple):
    """Everything that is read before there are weights. `prompts`: RULER's, by task and length."""

    text: Windows
    calibration: Windows
    prompts: dict[tuple[str, int], list[Item]]
    ruler: Options | None


def compare(options: RivalOptions) -> tuple[dict[str, Any], Path]:
    """The table in JSON types, and the folder that holds it. Raises UserError on bad input before weights are read."""
    fields.check(options)
    attention.check(options.backend)
    mesh = _mesh(options)
    config, layer = read_config(options.source)
    if layer is None:
        raise UserError(f"{options.source} is a plain model, which routes nothing; rivals stand beside a router")
    folder = _folder(options)
    prepared = _prepare(options, config, layer)
    dtype = options.dtype or device.default_dtype()
    model = load_pretrained(options.source, jnp.dtype(dtype))
    model = model._replace(params=whole.put(model.params, mesh))
    passes = {"backend": options.backend, "batch_tokens": device.batch_tokens(BATCH_TOKENS), "mesh": mesh}
    with jax.default_matmul_precision("float32" if dtype == "float32" and device.platform() != "cpu" else None):
        rows, about = _rows(options, model, prepared, passes)
    result = {"source": options.source, "source_hash": model.source_hash, "context": options.context,
              "window": layer.window, "sinks": layer.sinks, "text": prepared.text.about,
              "calibration": prepared.calibration.about, "ruler_items": options.ruler_items,
              "lengths": list(options.lengths or ()), **about, "rows": rows, **provenance()}
    write_json(folder / f"{NAME}.json", result)
    write_text(folder / f"{NAME}.md", report.markdown(result))
    report.draw(result, folder / f"{NAME}.png")
    return result, folder


def _mesh(options: RivalOptions) -> Mesh | None:
    """The devices over which the work is dealt; None: one device."""
    if options.mesh is not None and options.times:
        raise UserError(f"--times measures one device, and --mesh is {options.mesh}; leave out one of them")
    return named(options.mesh)


def _folder(options: RivalOptions) -> Path:
    run = run_source(locate(options.source))
    if options.out is None and run is None:
        raise UserError(f"{options.source} is no run folder: say with --out where the table goes")
    folder = options.out or run.folder
    for end in ("json", "md", "png"):
        check_file(folder / f"{NAME}.{end}", "--out")
    check_writable(folder, "--out")
    return folder


def _prepare(options: RivalOptions, config: ModelConfig, layer: L2AConfig) -> Prepared:
    bare = Pretrained(config, layer, {}, source_tokenizer(options.source), "")

    def windows(entry: str, flag: str, context: int, most: int | None) -> Windows:
        asked = Options(source=options.source, tasks=("reach",), context=context, max_windows=most)
        found = windows_of(asked, entry, flag, bare)
        reach.distances(found, bare, f"{flag} and its context")
        return found

    for local in options.local:
        check_density(1 - local / 100, bare, f"--local {local:g}")
    text = windows(options.text, "--text", options.context, options.max_windows)
    calibration = windows(options.calibration, "--calibration", options.calibration_context,
                          options.calibration_windows)
    if options.lengths is None:
        return Prepared(text, calibration, {}, None)
    needle = {} if options.haystack is None else {"haystack": options.haystack}
    asked = Options(source=options.source, tasks=("ruler",), lengths=options.lengths, seed=options.seed,
                    ruler_items=options.ruler_items, backend=options.backend, needle=needle)
    made = ruler.prepare("ruler", asked, bare)
    prompts = {(task, length): [build(task, length, number, options.seed, made.made_of, made.units[task, length])
                                for number in range(options.ruler_items)]
               for length in options.lengths for task in asked.ruler_tasks}
    return Prepared(text, calibration, prompts, asked)


def _rows(options: RivalOptions, model: Pretrained, prepared: Prepared,
          passes: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row of each choice at each density, and what they have in common."""
    text, layers = prepared.text, model.config.num_layers
    edges, groups = reach.distances(text, model)

    def score(label: str, choice: Choice) -> Scores:
        return score_windows(model, text, **choice.given(layers, *text.tokens.shape), **passes, label=label)

    def sums(scores: Scores) -> np.ndarray:
        return reach.sums(scores.token_nll, groups, len(edges))

    own = score("the router's own decisions", Choice("learned", 0.0))
    none, every = np.zeros(layers), np.isin(np.arange(layers), able_layers(model)).astype(float)
    bounds = {name: sums(score(name, Choice(name, rates.mean(), rates=rates)))
              for name, rates in (("none", none), ("all", every))}
    density = float(routing_rates(own.decisions, text.real).mean())
    check_density(density, model, "the router's own density")
    asked = [density, *sorted((1 - local / 100 for local in options.local), reverse=True)]
    found = _found(options, model, prepared, max(asked), routing_rates(own.decisions, text.real), passes["mesh"])
    worth = decision_worth(model, text, options.backend, passes["mesh"])
    times = Times(model, text.tokens[0], options.backend) if options.times else None
    rows: list[dict[str, Any]] = []
    known = {0.0: routing_rates(own.decisions, text.real)}
    for place, target in enumerate(asked):
        choices = [(choice, None) for choice in static_choices(target, model, found)]
        choices.insert(0, (Choice("learned", density), own) if place == 0 else
                       learned_choice(target, model, text, known, **passes))
        heads = joined_heads(target, model, found)
        choices += [] if heads is None else [learned_choice(target, model, text, known, heads=heads, **passes)]
        choices.append((Choice("oracle", target, decisions=most_worth(worth, text.real, target)), None))
        for choice, scores in choices:
            scores = scores or score(f"{choice.name} at {target:.1%}", choice)
            row = {"name": choice.name, "target": target, "own": place == 0, **_density(choice, scores, text, groups),
                   **reach.kept(bounds["none"], sums(scores), bounds["all"]), "sums": np.round(sums(scores), 4)}
            if prepared.prompts and choice.name != "oracle":
                row["ruler"] = dict(_ruler(model, prepared, choice, passes))
            if times is not None and choice.heads is None:
                row |= {"prefill_ms": times.prefill_ms(scores.decisions[:, :1]),
                        "decode_ms": times.decode_ms(scores.decisions[:, :1])}
            rows.append(row)
            log.info("%s", report.line(row))
    for row in rows:
        lead = next(one for one in rows if one["target"] == row["target"] and one["name"] == "learned")
        row["behind"], row["behind_95"] = reach.ratio((row["sums"] - lead["sums"])[:, 1:].sum(1),
                                                      (bounds["none"] - bounds["all"])[:, 1:].sum(1))
        row |= _behind(row.get("ruler"), lead.get("ruler"))
    return rows, {"edges": edges, "density": density, **reach.worth(bounds["none"], bounds["all"], reach.sums(
        np.ones(groups.shape, int), groups, len(edges))), "searched_layers": [int(unit[0]) for unit in found.layers],
        "searched_heads": found.heads}


def _found(options: RivalOptions, model: Pretrained, prepared: Prepared, most: float, rates,
           mesh: Mesh | None) -> Found:
    layers, heads = model.config.num_layers, model.config.num_kv_heads
    count = math.ceil(most * layers)

    def losses(units: str) -> Losses:
        return Losses(model, prepared.calibration, units, options.backend, mesh)

    by_layer = greedy(losses("layers"), count, "layers searched")
    shared = model.l2a_config.share_attention and not model.l2a_config.pruned_layers
    if not shared:
        log.warning("no heads are searched: they need one attention set for both paths, and no pruned layer")
    by_head = greedy(losses("heads"), math.ceil(most * layers * heads), "heads searched") if shared else None
    return Found(rates, by_layer, by_head)


def _density(choice: Choice, scores: Scores, text: Windows, groups: np.ndarray) -> dict[str, float]:
    """What is really routed: of all tokens, and of those beyond the window."""
    return {name: choice.spent(routing_rates(scores.decisions, tokens))
            for name, tokens in (("density", text.real), ("density_beyond", groups > 0))}


def _ruler(model: Pretrained, prepared: Prepared, choice: Choice,
           passes: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(task and length, the score of each prompt and the share of decisions that was local) with the prompts read
    under the choice."""
    for (task, length), items in prepared.prompts.items():
        shape = (len(items), len(items[0].tokens))
        given = choice.given(model.config.num_layers, *shape)
        if choice.cut is not None:
            tokens, last = np.stack([item.tokens for item in items]), np.zeros(shape, bool)
            last[:, -1] = True  # the loss is not asked for: as little of it as can be
            windows = Windows(tokens, np.zeros(shape, np.int32), last, np.ones(shape, bool), {"name": task})
            given["decisions"] = score_windows(model, windows, **given, **passes,
                                               label=f"{task} of {length:,} tokens").decisions
            del given["cut"]
        written = ruler.write(model, items, task, length, prepared.ruler, **given, mesh=passes["mesh"])
        local = 1 - choice.spent(written.decisions.mean(axis=(1, 2)))
        yield f"{task} {length}", {"local": local, "scores": [
            ruler_source.score(task, item.answers, text) for item, text in zip(items, written.texts, strict=True)]}


def _behind(mine: dict[str, dict] | None, lead: dict[str, dict] | None) -> dict[str, Any]:
    """RULER's mean, how much was local, and how much less than the learned choice, paired over prompts."""
    if mine is None:
        return {}
    scores, base = (np.concatenate([one[name]["scores"] for name in mine]).tolist() for one in (mine, lead))
    difference, interval = intervals.paired_items(scores, base)
    local = float(np.mean([one["local"] for one in mine.values()]))
    return {"ruler_mean": float(np.mean(scores)), "ruler_local": local, "ruler_behind": -difference,
            "ruler_behind_95": [-interval[1], -interval[0]]}
