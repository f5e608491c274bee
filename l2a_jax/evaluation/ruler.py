"""RULER (arXiv 2404.06654): does a model use what stands far back in a long prompt, and under which routing?

Answers are generated with the cache, greedily, and scored by lm-eval's rule: the share of what was asked for that
stands in what was written. Beside the router's own decisions, a prompt can be read under control decisions
(`controls`); what is written after it is decided by the router in each case. Two more say where a router loses:

  answer      the router's own, but all that is written sees everything
  question    the same, and so do the last tokens of the prompt (`OPENED`)

The prompts are the same for all, so that choices, and runs of the same settings, are compared item by item.

Prompts of a length are all as long, so a length compiles one program. Results are kept length by length, and what the
file holds already (`Cell.prompts`: the same prompts) is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from l2a_jax import device
from l2a_jax.config import position_limit
from l2a_jax.data.encoder import check_ids
from l2a_jax.errors import UserError, needs
from l2a_jax.evaluation import intervals, ruler_source, texts
from l2a_jax.evaluation.columns import CELL, DIFFERENCE, SCORE, Column, change, interval
from l2a_jax.evaluation.controls import controls
from l2a_jax.evaluation.needle_text import RECALL
from l2a_jax.evaluation.options import OPENED
from l2a_jax.evaluation.registry import Work
from l2a_jax.evaluation.ruler_text import Item, Material, build, calibrate, material
from l2a_jax.files import parse_json, plain, read_text, whole
from l2a_jax.inference.cache import cache_bytes, spare_bytes
from l2a_jax.inference.generate import bucket, generate
from l2a_jax.progress import progress
from l2a_jax.shapes import at_least, share, some
from l2a_jax.sharding.mesh import axes_of
from l2a_jax.sources import Pretrained

log = logging.getLogger("l2a_jax.eval")
BUILDERS = min(8, os.cpu_count() or 1)
"""Prompts that are made at once, while the device computes."""
MEMORY_SHARE = 0.7
"""Of what the weights leave: allocation in blocks takes the rest."""
SHOWN = 100
"""Characters of an answer in the results; all of it is in the samples."""
SAMPLES = "samples_ruler.jsonl"

_SCORED = {"length": at_least(1), "control": str, "score": share, "n": at_least(1), "local_share?": share,
           "difference?": float, "difference_95?": intervals.INTERVAL}
SHAPE = {"lengths": some(at_least(1)), "items": at_least(1), "seed": at_least(0), "made_of": {"words": str},
         "cells": some({**_SCORED, "task": str, "scores": some(share), "prompts": str, "local?": [share],
                        "written": [str]}),
         "overall": some({**_SCORED, "score_95": intervals.INTERVAL})}


class Prepared(NamedTuple):
    """What prompts are made of, and how much haystack one needs, by (task, length)."""

    made_of: Material
    units: dict[tuple[str, int], int]


class Written(NamedTuple):
    """Of each prompt: the text after it, whether all logits were finite, the share of decisions in it that were local,
    and these themselves; None for a plain model."""

    texts: list[str]
    finite: Bool[np.ndarray, " B"]
    local: Float[np.ndarray, " B"] | None
    decisions: Bool[np.ndarray, "L B T"] | None


def prepare(name: str, options: Any, model: Pretrained) -> Prepared:
    """What prompts are made of, how long each haystack is, and the shortest prompts, before there are weights."""
    o, tokenizer, limit = options, model.tokenizer, position_limit(model.config, model.l2a_config)
    if tokenizer is None:
        raise UserError(f"{o.source} has no tokenizer, which ruler needs")
    if texts.speaks_recall(tokenizer):
        raise UserError(f"--tasks ruler: {o.source} speaks the synthetic recall corpus alone; RULER's prompts are "
                        "English, and need a model of real text")
    needs("lm_eval", "eval", "--tasks ruler")
    if max(o.lengths) > limit:
        raise UserError(f"--lengths names {max(o.lengths)}; {o.source} has positions up to {limit} (max_positions x "
                        "factor of its RoPE): expected lengths up to that")
    asked = [one for one in o.controls if one != "learned"]
    if asked and (model.l2a_config is None or o.route != "learned"):
        why = f"--route {o.route} leaves no decision" if model.l2a_config else f"{o.source} is a plain model"
        raise UserError(f"--controls {asked[0]} stands beside learned decisions; {why}")
    haystack = o.needle.get("haystack")
    if haystack is not None and RECALL in haystack:
        raise UserError(f"--haystack {RECALL} has no prose for RULER; expected files, folders or globs of text")
    made_of = material(tokenizer, o.ruler_tasks, max(o.lengths), haystack, o.task_data)
    grid = [(task, length) for length in sorted(o.lengths) for task in o.ruler_tasks]
    with ThreadPoolExecutor(BUILDERS) as pool:
        units = pool.map(lambda cell: calibrate(*cell, o.seed, made_of), grid)
        prepared = Prepared(made_of, dict(zip(grid, units, strict=True)))
    for task in o.ruler_tasks:
        first = build(task, min(o.lengths), 0, o.seed, made_of, prepared.units[task, min(o.lengths)])
        check_ids(first.tokens, model.config.vocab_size, f"RULER's {task}")
    return prepared


def writes(name: str, options: Any, prepared: Prepared, path: Path) -> list[str]:
    return [SAMPLES] if options.log_samples else []


def task(work: Work) -> dict[str, Any]:
    """Every cell of task, length and control; `work.keep` takes what is done after each length."""
    o = work.options
    settings = plain({
        "items": o.ruler_items, "seed": o.seed, "made_of": work.prepared.made_of.about,
        "lm_eval": ruler_source.version(), "scores": "share of the answers that stand in the text, as lm-eval's",
        "computed": {"dtype": str(work.model.params["embed"]["embedding"].dtype), "backend": o.backend}})
    if o.mesh is not None:
        settings["computed"]["mesh"] = o.mesh
    held = work.held or {}
    same = all(held.get(name) == value for name, value in settings.items())
    if held and not same:
        log.info("ruler: the results in %s are of other settings, and are replaced", work.path.name)
    cells = {_key(cell): cell for cell in held["cells"]} if held and same else {}
    samples_path = work.path.with_name(SAMPLES)
    samples = _read_samples(samples_path, cells) if o.log_samples else {}
    entry: dict[str, Any] = {}
    pool = ThreadPoolExecutor(BUILDERS)
    try:
        ahead = {(length, name): [pool.submit(build, name, length, number, o.seed, work.prepared.made_of,
                                              work.prepared.units[name, length]) for number in range(o.ruler_items)]
                 for length in sorted(o.lengths) for name in o.ruler_tasks}
        with progress("ruler", sum(length * len(items) for (length, _), items in ahead.items())) as report:
            done = 0
            for length in sorted(o.lengths):
                for name in o.ruler_tasks:
                    there = {key: cell for key, cell in cells.items() if not o.log_samples or key in samples}
                    for cell, rows in _cells(work, name, length, ahead.pop((length, name)), there):
                        cells[_key(cell)] = cell
                        samples |= {_key(cell): rows} if rows else {}
                        note = f"{name} of {length:,} tokens, {cell['control']}: {cell['score']:.2f}"
                    done += length * o.ruler_items
                    report(done, note)
                entry = {**settings, **_summary(list(cells.values()))}
                if o.log_samples:
                    _write_samples(samples_path, samples)
                if work.keep is not None:
                    work.keep(entry)
    finally:
        pool.shutdown(cancel_futures=True)
    return entry


def _cells(work: Work, task: str, length: int, building: Sequence[Future[Item]],
           held: dict[tuple, dict]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The cell of each control, and its samples; those that are held of the same prompts come as they are, without."""
    o, model = work.options, work.model
    items = [one.result() for one in building]
    prompts = _hash(items)
    own = "plain" if model.l2a_config is None else o.route
    wanted = dict.fromkeys([own, *(one for one in o.controls if one != "learned")])
    for control in list(wanted):
        cell = held.get((task, length, control))
        if cell is not None and cell["prompts"] == prompts:
            del wanted[control]
            yield cell, []
    if not wanted:
        return
    given: dict[str, dict[str, Any]] = {name: {"route_last": tokens} for name, tokens in OPENED.items()}
    if {*wanted} - {*OPENED}:
        first = write(model, items, task, length, o, mesh=work.mesh)
    if {*wanted} - {*OPENED, own}:
        real = np.ones((len(items), len(items[0].tokens)), bool)
        given |= {name: {"decisions": decisions} for name, _, decisions in
                  controls(first.decisions, real, model.l2a_config.pruned_layers, seeds=1) if name in wanted}
    for control in wanted:
        found = first if control == own else write(model, items, task, length, o, mesh=work.mesh, **given[control])
        scores = [ruler_source.score(task, item.answers, text) for item, text in zip(items, found.texts, strict=True)]
        cell = {"task": task, "length": length, "control": control, "score": float(np.mean(scores)), "n": len(items),
                "scores": np.round(scores, 4).tolist(), "written": [text[:SHOWN] for text in found.texts],
                "prompts": prompts, "not_finite": int((~found.finite).sum())}
        if found.local is not None:
            cell |= {"local_share": float(found.local.mean()), "local": np.round(found.local, 4).tolist()}
        if cell["not_finite"]:
            log.warning("ruler: %s of %d tokens, %s: the logits of %d of %d answers are not finite", task, length,
                        control, cell["not_finite"], len(items))
        yield cell, [
            {"task": task, "length": length, "control": control, "item": number, "prompts": prompts,
             "answers": item.answers, "written": text, "score": score}
            for number, (item, text, score) in enumerate(zip(items, found.texts, scores, strict=True))]


def write(model: Pretrained, items: Sequence[Item], task: str, length: int, options: Any, *,
          decisions: Bool[np.ndarray, "L B T"] | Bool[np.ndarray, "L B S"] | None = None,
          heads: Bool[np.ndarray, "L K"] | None = None, cut: Float[np.ndarray, " L"] | None = None,
          route_last: int | None = None, mesh: Mesh | None = None) -> Written:
    """What the model writes after each prompt, in batches of one size; `decisions`, `heads`, `cut`, `route_last` and
    `mesh` are those of `generate`."""
    most = _most_rows(model, length, options.batch_tokens) * axes_of(mesh).data
    batches = -(-len(items) // most)
    rows = -(-len(items) // batches)
    size = len(items[0].tokens)
    parts = []
    for start in range(0, len(items), rows):
        chosen = [min(start + row, len(items) - 1) for row in range(rows)]  # the last one again fills a batch up
        out = generate(
            model.params, model.config, model.l2a_config, [items[index].tokens.tolist() for index in chosen],
            max_new_tokens=ruler_source.settings(task).new_tokens, room=_room(options.ruler_tasks),
            stop_tokens=model.tokenizer.end_ids, backend=options.backend,
            decisions=None if decisions is None else decisions[:, chosen], heads=heads, cut=cut,
            route_last=route_last, mesh=mesh)
        kept = min(rows, len(items) - start)
        tokens, lengths, finite, read = jax.device_get((out.tokens, out.lengths, out.finite, out.decisions))
        read = None if read is None else read[:, :kept, :size]
        parts.append(([model.tokenizer.decode(row[:count].tolist(), skip_special_tokens=True)
                       for row, count in zip(tokens[:kept], lengths, strict=False)], finite[:kept], read))
    written, finite, read = zip(*parts, strict=True)
    read = None if read[0] is None else np.concatenate(read, axis=1)
    return Written([text for part in written for text in part], np.concatenate(finite),
                   None if read is None else 1 - read.mean(axis=(0, 2)), read)


def _room(tasks: Sequence[str]) -> int:
    """Tokens of the longest answer: the tasks of a length share a program."""
    return max(ruler_source.settings(task).new_tokens for task in tasks)


def _most_rows(model: Pretrained, length: int, batch_tokens: int | None) -> int:
    """Prompts of a length that memory holds at once, or `batch_tokens` does; on a CPU more than one bring no speed."""
    config = model.config
    if batch_tokens is not None or device.platform() == "cpu":
        return max(1, (batch_tokens or device.batch_tokens(0)) // length)
    dtype = model.params["embed"]["embedding"].dtype
    # The cache, once more where a step hands it on; the rows of a layer, the widest being the MLP's; the decisions.
    width = bucket(length, 32)
    each = 2 * cache_bytes(config, model.l2a_config, 1, width, dtype) + width * (
        dtype.itemsize * (8 * config.hidden_size + 4 * config.intermediate_size) + 4 * config.num_layers)
    return max(1, int(MEMORY_SHARE * spare_bytes(model.params)) // each)


def _key(cell: dict[str, Any]) -> tuple[str, int, str]:
    return cell["task"], cell["length"], cell["control"]


def _hash(items: Sequence[Item]) -> str:
    """Of the prompts and their answers: cells of one hash are compared item by item."""
    found = hashlib.sha256()
    for item in items:
        found.update(item.tokens.tobytes() + json.dumps(item.answers).encode())
    return found.hexdigest()[:16]


def _summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The cells in order, each control with its difference from the model's own routing over the same items (95 %
    intervals), and the same over all tasks of a length."""
    own = {"plain", "learned"}
    cells = sorted(cells, key=lambda cell: (cell["length"], ruler_source.RULER_TASKS.index(cell["task"]),
                                            cell["control"] not in own))
    base = {(cell["task"], cell["length"]): cell for cell in cells if cell["control"] in own}
    told, overall = [], []
    for cell in cells:
        pair = base.get((cell["task"], cell["length"]))
        told.append({**cell, **_difference([cell], [pair])} if pair and pair is not cell else cell)
    lengths = sorted({cell["length"] for cell in cells})
    for length in lengths:
        for control in dict.fromkeys(cell["control"] for cell in cells if cell["length"] == length):
            mine = [cell for cell in cells if (cell["length"], cell["control"]) == (length, control)]
            scores = np.concatenate([cell["scores"] for cell in mine])
            row = {"length": length, "control": control, "score": float(scores.mean()), "n": len(scores),
                   "score_95": list(intervals.share(float(scores.sum()), len(scores))), "tasks": len(mine)}
            if "local_share" in mine[0]:
                row["local_share"] = float(np.mean([cell["local_share"] for cell in mine]))
            if control not in own:
                both = [(cell, base[cell["task"], length]) for cell in mine if (cell["task"], length) in base]
                row |= _difference(*zip(*both, strict=True)) if both else {}
            overall.append(row)
    return {"lengths": lengths, "cells": told, "overall": overall,
            "interval": "over items: Wilson's of scores, normal of differences, paired with the model's own routing"}


def _difference(mine: Sequence[dict], base: Sequence[dict]) -> dict[str, Any]:
    if any(one["prompts"] != other["prompts"] for one, other in zip(mine, base, strict=True)):
        return {}
    difference, interval = intervals.paired_items(*(np.concatenate([cell["scores"] for cell in cells]).tolist()
                                                    for cells in (mine, base)))
    return {"difference": difference, "difference_95": list(interval)}


def _read_samples(path: Path, cells: dict[tuple, dict]) -> dict[tuple, list[dict]]:
    """Those of the cells that are held, so that a rerun does not lose them."""
    found: dict[tuple, list[dict]] = {}
    lines = read_text(path).removesuffix("\n").split("\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        row = parse_json(line, f"{path}, line {number}")
        cell = cells.get(_key(row))
        if cell is not None and cell["prompts"] == row["prompts"]:
            found.setdefault(_key(row), []).append(row)
    return found


def _write_samples(path: Path, samples: dict[tuple, list[dict]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for rows in samples.values():
            for row in rows:
                stream.write(json.dumps(plain(row), ensure_ascii=False) + "\n")


def columns(name: str) -> tuple[Column, ...]:
    shape = {**CELL, "lengths": some(int), "scores": some(float), "difference?": DIFFERENCE}
    return (Column("ruler", "ruler", SCORE, shape, _cell, _text,
                   note="the mean score of RULER's tasks, with its interval, at the longest length."),)


def _cell(entry: dict[str, Any], other: dict[str, Any] | None, say: Callable[[str], None]) -> dict[str, Any]:
    """The model's own routing; the difference is of the longest length, over the items that both have."""
    longest, own = entry["lengths"][-1], entry["cells"][0]["control"]
    rows = {row["length"]: row for row in entry["overall"] if row["control"] == own}
    cell = {"value": rows[longest]["score"], "interval": rows[longest]["score_95"], "n": rows[longest]["n"],
            "lengths": list(rows), "scores": [row["score"] for row in rows.values()]}
    if other is None:
        return cell

    def scored(found):
        own = found["cells"][0]["control"]
        return {one["prompts"]: one for one in found["cells"] if (one["length"], one["control"]) == (longest, own)}

    mine, base = scored(entry), scored(other)
    shared = [prompts for prompts in mine if prompts in base]
    if not shared:
        say(f"ruler is of other prompts than the baseline's at {longest} tokens: no paired difference")
        return cell
    found = _difference([mine[one] for one in shared], [base[one] for one in shared])
    return {**cell, "difference": {"value": found["difference"], "interval": found["difference_95"]}}


def _text(cell: dict[str, Any], versus: bool) -> str:
    *shorter, longest = cell["lengths"]
    others = "".join(f"; {100 * one:.1f} at {length:,}" for length, one in zip(shorter, cell["scores"], strict=False))
    text = interval(cell, f"n={cell['n']}, {longest:,} tokens{others}", 100, 1)
    return text + (f"<br>Δ {change(cell['difference'], 100, 1)}" if versus and cell.get("difference") else "")


def told(entry: dict[str, Any]) -> str:
    """Scores in per cent: a row a task, a column a length; then every control over all tasks, and how much less."""
    lengths, cells = entry["lengths"], {_key(cell): cell for cell in entry["cells"]}
    own = entry["cells"][0]["control"]
    lines = [f"ruler: score % ({own}), {entry['items']} items a cell; words: {entry['made_of']['words']}",
             f"{'task':<16}" + "".join(f"{length:>9,}" for length in lengths)]
    for name in dict.fromkeys(cell["task"] for cell in entry["cells"]):
        found = [cells.get((name, length, own)) for length in lengths]
        shown = ("-" if one is None else f"{100 * one['score']:.0f}" for one in found)
        lines.append(f"{name:<16}" + "".join(f"{one:>9}" for one in shown))
    for row in entry["overall"]:
        low, high = row["score_95"]
        text = f"{row['length']:>7,} {row['control']:<9} {100 * row['score']:5.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        if row.get("local_share") is not None:
            text += f", {row['local_share']:.1%} local"
        if row.get("difference") is not None:
            low, high = row["difference_95"]
            text += f", {100 * row['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] to {own}"
        lines.append(text)
    return "\n".join(lines)
