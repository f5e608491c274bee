"""Looks: what a router has learned on a text: which tokens it routes, in which layers, and how far they then look.

Only tokens whose past is longer than the window and the sinks are asked about; before, a decision changes nothing.

    layers   the share of those tokens that each layer routes
    kinds    the share of decisions that are routed, of each kind of token (`token_kinds`), and the single tokens of the
             vocabulary that are routed most and least
    looks    where full attention lies (`far_mass`) of routed decisions, and of those that stay local, which miss what
             of it lies beyond the window: a sample of tokens in every window and layer, drawn from a seed. A mean over
             all decisions: each window and layer counts as often as it has such decisions.

Intervals are over windows of text, by Student's t, as in `reach`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from l2a_jax.errors import Missing, UserError
from l2a_jax.evaluation import intervals, token_kinds
from l2a_jax.evaluation.far_mass import far_mass
from l2a_jax.evaluation.perplexity import Windows, score_windows
from l2a_jax.evaluation.reach import CONTEXT, distances, near, ratio
from l2a_jax.evaluation.registry import Work
from l2a_jax.evaluation.routed_picture import draw_routed_text
from l2a_jax.evaluation.windows import windows_of
from l2a_jax.progress import progress
from l2a_jax.shapes import at_least, each, share, some
from l2a_jax.sharding import whole
from l2a_jax.sources import Pretrained

log = logging.getLogger("l2a_jax.eval")
ENOUGH, SHOWN = 20, 10
"""How often a token of the vocabulary must stand in the text to be ranked, and how many are, from both ends."""
COLUMNS, LINES = 64, 24
"""Of the picture: what can be read where it is 800 pixels wide."""
SORTS = ("routed", "local")
ALIKE = "local, layers as routed"
"""Local decisions once more, each window and layer counted by its routed ones: what is left of the difference is not
which layers route, but which tokens."""
NAMED = ("capitalised, seen beyond", "capitalised, not seen beyond")
SAID = {"newline": "line break", "digit": "number", "capitalised": "capitalised word, its beginning",
        "word-initial": "other word, its beginning", "continuation": "a word's continuation",
        "other": "part of a character", NAMED[0]: "capitalised, last stood beyond the window",
        NAMED[1]: "capitalised, new or nearer", **{
            f"{kind} {when}": f"{kind} that {said}" for kind in ("token", "pair") for when, said in (
                ("new", "is new"), ("seen near", "last stood within the window"),
                ("seen beyond", "last stood beyond the window"))}}
"""Kinds of tokens, to people, where their name does not say it; a pair is a token and the one before it."""
_LOOK = {"decisions": at_least(0), "sampled": at_least(0), "mass?": [float], "mass_95?": [intervals.INTERVAL]}
SHAPE = {"window": at_least(1), "sinks": int, "text": {"name": str, "hash": str, "context": int}, "tokens": at_least(1),
         "routed": share, "routed_95": intervals.INTERVAL, "distances": some(at_least(1)),
         "layers": some({"layer": int, "pruned": bool, "routed": share, "looks": each(_LOOK)}),
         "kinds": each({"tokens": at_least(1), "of_all": share, "routed": share, "routed_95": intervals.INTERVAL,
                        "layers": [share]}),
         "most": [{"text": str, "tokens": at_least(1), "routed": share}],
         "least": [{"text": str, "tokens": at_least(1), "routed": share}],
         "looks": each(_LOOK), "sample": at_least(1), "seed": int}


def prepare(name: str, options: Any, model: Pretrained) -> Windows:
    windows = windows_of(options, options.text, "--text", model, CONTEXT)
    _, groups = distances(windows, model, "--context")
    _first(windows, groups > 0, options.looks_from, "--looks-from")
    if model.tokenizer is None:
        raise UserError(f"{options.source} has no tokenizer, which looks needs to name its tokens")
    return windows


def writes(name: str, options: Any, prepared: Windows, path: Path) -> list[str]:
    return [picture(path).name]


def picture(results: Path) -> Path:
    """Where the picture goes."""
    return results.with_name(results.stem.replace("eval", "looks", 1) + ".png")


def task(work: Work) -> dict[str, Any]:
    options, windows, drawn = work.options, work.prepared, picture(work.path)
    scores = score_windows(work.model, windows, **work.passes, label="looks, the router's own decisions")
    model = work.model
    if work.mesh is not None:  # one window at a time: one device's work
        model = model._replace(params=whole.alone(model.params))
    found = looks(model, windows, scores.decisions, sample=options.looks_sample, seed=options.seed,
                  backend=options.backend)
    _, groups = distances(windows, model)
    try:
        found["picture"] = draw(model, windows, scores.decisions, groups > 0, options.looks_from, drawn)
    except Missing as lacking:
        log.warning("no %s: %s", drawn.name, lacking)
    return found


def looks(model: Pretrained, windows: Windows, decisions: Bool[np.ndarray, "L B T"], *, sample: int = 32, seed: int = 0,
          backend: str = "auto") -> dict[str, Any]:
    """What `decisions` over `windows` say, in JSON types. `sample`: tokens of each window and layer, routed and local
    each, whose attention is written out. Raises UserError where no place is beyond the window."""
    edges, groups = distances(windows, model)
    (window, sinks), beyond = near(model), groups > 0
    routed, routed_95 = _share(decisions, beyond)
    back = [window, *(edge for edge in edges[1:] if edge > window)]
    counts, sampled, mass = _attention(model, windows, decisions, beyond, back, sample, seed, backend)
    sorts = [(counts[..., sort], sampled[..., sort], mass[..., sort, :]) for sort in range(len(SORTS))]
    alike = sorts[0][0] * (sorts[1][0] > 0)
    pruned = set(model.l2a_config.pruned_layers)
    layers = [{"layer": layer, "pruned": layer in pruned, "routed": float(one[beyond].mean()),
               "looks": {name: _look(*(part[layer, None] for part in parts))
                         for name, parts in zip(SORTS, sorts, strict=True)}} for layer, one in enumerate(decisions)]
    return {
        "window": window, "sinks": sinks, "text": windows.about, "tokens": int(beyond.sum()), "routed": routed,
        "routed_95": routed_95, "layers": layers, "kinds": _kinds(windows, decisions, beyond, window, model), **_ranked(
            windows.tokens, decisions, beyond, model.tokenizer.decode),
        "distances": back, "looks": {**{name: _look(*parts) for name, parts in zip(SORTS, sorts, strict=True)},
                                     ALIKE: _look(*sorts[1], weights=alike)},
        "sample": sample, "seed": seed, "interval": "Student's t over windows of text"}


def draw(model: Pretrained, windows: Windows, decisions: Bool[np.ndarray, "L B T"], beyond: Bool[np.ndarray, "B T"],
         first: int | None, path: Path) -> dict[str, Any]:
    """Draw a passage of the first window that has tokens beyond its own, and say which; it begins at token `first`, or
    at the first line there."""
    row, first = _first(windows, beyond, first, "first")
    if first is None:
        ends = token_kinds.forms(windows.tokens[row : row + 1], model.tokenizer.decode)["newline"][0]
        begins = np.flatnonzero(beyond[row] & np.roll(ends, 1) & ~ends)
        first = int(begins[0] if len(begins) else np.flatnonzero(beyond[row])[0])
    real = windows.real[row]

    def decode(ids: Sequence[int]) -> str:
        return re.sub(r"\n{3,}", "\n\n", model.tokenizer.decode(ids))  # empty lines tell nothing

    able = len(decisions) - len(model.l2a_config.pruned_layers)
    shown = draw_routed_text(windows.tokens[row][real], decisions[:, row][:, real].sum(axis=0), decode, path,
                             title=f"{windows.about['name']}, a window of {near(model)[0]:,}", first=first,
                             columns=COLUMNS, max_lines=LINES, label=f"layers that route the token, of {able}")
    return {"file": path.name, "window": row, "first": first, "tokens": shown}


def _first(windows: Windows, beyond: Bool[np.ndarray, "B T"], first: int | None, flag: str) -> tuple[int, int | None]:
    """(the first window with tokens beyond its own, `first`); UserError where that token is not one of them."""
    row = int(np.flatnonzero(beyond.any(axis=1))[0])
    there = np.flatnonzero(beyond[row])
    if first is not None and not there[0] <= first <= there[-1]:
        raise UserError(f"{flag} is {first}; expected a token beyond the window, from {there[0]} to {there[-1]} of "
                        f"{windows.about['name']}")
    return row, first


def _share(decisions: Bool[np.ndarray, "L B T"], where: Bool[np.ndarray, "B T"]) -> tuple[float, list[float]]:
    """(the share of decisions that are routed at some places, its interval)."""
    by_window = np.where(where, decisions.sum(axis=0), 0).sum(axis=1)
    return ratio(by_window, len(decisions) * where.sum(axis=1))


def _kinds(windows: Windows, decisions: Bool[np.ndarray, "L B T"], beyond: Bool[np.ndarray, "B T"], window: int,
           model: Pretrained) -> dict[str, Any]:
    forms = token_kinds.forms(windows.tokens, model.tokenizer.decode)
    before = token_kinds.repetitions(windows.tokens, window)
    named, again = forms["capitalised"], before["token seen beyond"]
    kinds = {**forms, **dict(zip(NAMED, (named & again, named & ~again), strict=True)), **before}
    found = {}
    for name, where in kinds.items():
        where = where & beyond
        if where.any():
            routed, interval = _share(decisions, where)
            found[name] = {"tokens": int(where.sum()), "of_all": float(where.sum() / beyond.sum()), "routed": routed,
                           "routed_95": interval, "layers": decisions[:, where].mean(axis=1)}
    return found


def _ranked(tokens: Int[np.ndarray, "B T"], decisions: Bool[np.ndarray, "L B T"], beyond: Bool[np.ndarray, "B T"],
            decode: Callable[[Sequence[int]], str]) -> dict[str, list[dict[str, Any]]]:
    """The tokens of the vocabulary that are routed most, and least."""
    ids, of, counts = np.unique(tokens[beyond], return_inverse=True, return_counts=True)
    routed = np.bincount(of, decisions[:, beyond].mean(axis=0), len(ids)) / counts
    order = [one for one in np.argsort(-routed, kind="stable") if counts[one] >= ENOUGH]
    ends = {"most": order[:SHOWN], "least": order[: -SHOWN - 1 : -1]}
    return {name: [{"id": int(ids[one]), "text": decode([int(ids[one])]), "tokens": int(counts[one]),
                    "routed": float(routed[one])} for one in chosen] for name, chosen in ends.items()}


def _attention(model: Pretrained, windows: Windows, decisions: Bool[np.ndarray, "L B T"],
               beyond: Bool[np.ndarray, "B T"], back: Sequence[int], sample: int, seed: int, backend: str
               ) -> tuple[Int[np.ndarray, "L B S"], Int[np.ndarray, "L B S"], Float[np.ndarray, "L B S M"]]:
    """Of each layer, window and sort: decisions, how many of them were sampled, and the mean mass of these."""
    layers, count, _ = decisions.shape
    shape = (layers, count, len(SORTS))
    counts, sampled, mass = np.zeros(shape, int), np.zeros(shape, int), np.zeros((*shape, 2 + len(back)))
    with progress("looks, attention", count) as report:
        for row in np.flatnonzero(beyond.any(axis=1)).tolist():
            places = np.zeros((layers, len(SORTS), sample), int)
            for layer in range(layers):
                for sort, which in enumerate((decisions[layer, row], ~decisions[layer, row])):
                    there = np.flatnonzero(which & beyond[row])
                    drawn = np.random.default_rng((seed, layer, row, sort)).permutation(there)[:sample]
                    counts[layer, row, sort], sampled[layer, row, sort] = len(there), len(drawn)
                    places[layer, sort, : len(drawn)] = drawn
            found = far_mass(model, windows.tokens[row], decisions[:, row], places.reshape(layers, -1), back,
                             backend=backend).reshape(*places.shape, -1)
            taken = np.arange(sample) < sampled[:, row, :, None]
            mass[:, row] = (found * taken[..., None]).sum(axis=2) / np.maximum(sampled[:, row], 1)[..., None]
            report(row + 1, f"{row + 1} of {count} windows")
    return counts, sampled, mass


def _look(counts: Int[np.ndarray, "L B"], sampled: Int[np.ndarray, "L B"], mass: Float[np.ndarray, "L B M"], *,
          weights: Int[np.ndarray, "L B"] | None = None) -> dict[str, Any]:
    """Decisions of one sort, and the mean of each part of their mass with its interval; None where there is none.
    `weights`: how often each window and layer counts (None: as often as it has such decisions)."""
    weights = counts if weights is None else weights
    parts = [ratio((weights * part).sum(axis=0), weights.sum(axis=0)) for part in np.moveaxis(mass, -1, 0)]
    return {"decisions": int(counts.sum()), "sampled": int(sampled.sum()),
            "mass": None if parts[0][0] is None else [one for one, _ in parts],
            "mass_95": None if parts[0][0] is None else [interval for _, interval in parts]}


def told(entry: Mapping[str, Any]) -> str:
    """Layers, kinds, tokens of the vocabulary and distances, a table each."""
    text = entry["text"]
    lines = [f"looks: {text['name']}, windows of {text['context']:,} tokens; of {entry['tokens']:,} beyond the window "
             f"of {entry['window']:,} and {entry['sinks']} sinks a layer routes {_routed(entry)}",
             f"{'kind of token':<44} {'of all':>7}   routed [95 %]"]
    for group in (token_kinds.FORMS, NAMED, [name for name in SAID if name.startswith(("token", "pair"))]):
        own = {name: entry["kinds"][name] for name in group if name in entry["kinds"]}
        for name, row in sorted(own.items(), key=lambda item: -item[1]["routed"]):
            lines.append(f"{SAID.get(name, name):<44} {row['of_all']:>7.1%}   {_routed(row)}")
    for end in ("most", "least"):
        shown = ", ".join(f"{row['text']!r} {row['routed']:.0%}" for row in entry[end])
        lines.append(f"{end} routed tokens: {shown or f'none stands {ENOUGH} times'}")
    heads = ["sinks", "window", *(f"from {distance:,}" for distance in entry["distances"])]
    lines.append(f"{'attention lies on':<24}" + "".join(f"{head:>13}" for head in heads))
    for name, look in entry["looks"].items():
        lines.append(f"{name:<24}" + "".join(f"{part:>13.1%}" for part in look["mass"] or ()))
    lines.append(f"{'layer':<6} {'routed':>8} {'beyond the window: routed':>26} {'local':>8}")
    for row in entry["layers"]:
        far = [_far(row["looks"][name]["mass"]) for name in SORTS]
        lines.append(f"{row['layer']:<6} {'pruned' if row['pruned'] else format(row['routed'], '.1%'):>8} "
                     f"{far[0]:>26} {far[1]:>8}")
    return "\n".join(lines)


def _routed(row: Mapping[str, Any]) -> str:
    """The share that is routed, and its interval where there is one: not of a single window."""
    low, high = row["routed_95"]
    return f"{row['routed']:.1%}" + (f" [{low:.1%}, {high:.1%}]" if math.isfinite(low) else "")


def _far(mass: Sequence[float] | None) -> str:
    return "-" if mass is None else f"{sum(mass[2:]):.1%}"
