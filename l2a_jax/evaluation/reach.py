"""Reach: what global attention is worth where a window ends, and how much of that a choice of routed tokens keeps.

A place whose past fits the window (and the sinks) is scored alike whatever is routed, and most of a short text is such
places: perplexity can pass with nothing routed. Here only places beyond the window count, apart by how long their past
is: up to 2, 4, 8 ... windows. For a choice x of what is routed, with nats a token as losses,

    worth = loss(none) - loss(all)        kept(x) = (loss(none) - loss(x)) / worth

so that `all` keeps 1 and `none` keeps 0. Both are ratios of sums over windows of text, whose intervals come from the
windows' residuals (`intervals.ratio`), by Student's t, for long windows are few. Choices are compared pair by pair
over the same windows: `behind` is the share that a choice keeps less than the learned decisions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int, Shaped

from l2a_jax.errors import UserError
from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.columns import ROUTING, Column
from l2a_jax.evaluation.controls import controls
from l2a_jax.evaluation.perplexity import BATCH_TOKENS, Scores, Windows, score_windows
from l2a_jax.evaluation.registry import Work
from l2a_jax.evaluation.subject import check_routed
from l2a_jax.evaluation.windows import windows_of
from l2a_jax.shapes import at_least, each, share, some
from l2a_jax.sources import Pretrained

CONTEXT = 32_768
"""Tokens a window where --context was not given and the model can take them."""
PLAIN_WINDOW = 1_024
"""The unit of distance of a plain model, which has no window."""
SHAPE = {"window": at_least(1), "sinks": int, "edges": some(at_least(1)), "tokens": some(at_least(0)),
         "worth?": float, "worth_95?": intervals.INTERVAL, "text": {"name": str, "hash": str, "context": int},
         "rows": each({"nll": some(float), "beyond": float, "kept?": float, "kept_95?": intervals.INTERVAL,
                       "density?": share})}
LENGTHS = {"tokens": "edges"}


def prepare(name: str, options: Any, model: Pretrained) -> Windows:
    windows = windows_of(options, options.text, "--text", model, CONTEXT)
    distances(windows, model, "--context")
    return windows


def task(work: Work) -> dict[str, Any]:
    return reach(work.model, work.prepared, seeds=work.options.audit_seeds, **work.passes)


def columns(name: str) -> tuple[Column, ...]:
    return (Column("reach", "kept beyond", ROUTING, {"kept": float, "kept_95": intervals.INTERVAL, "context": int},
                   _cell, lambda cell, versus: "{:.3f} [{:.3f}, {:.3f}] (to {context:,})".format(
                       cell["kept"], *cell["kept_95"], context=cell["context"]),
                   note="the share of what global attention is worth beyond the window that the learned decisions "
                        "keep, and the longest context."),)


def _cell(entry: dict[str, Any], other: Any, say: Any) -> dict[str, Any] | None:
    learned = entry["rows"].get("learned", {})
    return None if learned.get("kept") is None else {
        "kept": learned["kept"], "kept_95": learned["kept_95"], "worth": entry["worth"], "window": entry["window"],
        "context": entry["text"]["context"]}


def near(model: Pretrained) -> tuple[int, int]:
    """The window and the sinks of a model; of a plain one the unit of distance."""
    return (PLAIN_WINDOW, 0) if model.l2a_config is None else (model.l2a_config.window, model.l2a_config.sinks)


def distances(windows: Windows, model: Pretrained, flag: str = "context") -> tuple[list[int], Int[np.ndarray, "B T"]]:
    """(edges, the group of each place): group 0 is within the window and the sinks, group i has a past of more than
    edges[i - 1] and at most edges[i] keys (the last one: of any more), -1 is not scored. Edges are the window and the
    sinks, then 2, 4, 8 ... windows. UserError where no place is beyond the window."""
    length, (window, sinks) = windows.tokens.shape[1], near(model)
    edges = [window + sinks]
    while 2 ** len(edges) * window < length:
        edges.append(2 ** len(edges) * window)
    edges = sorted({edge for edge in edges if edge >= window + sinks})
    group = np.searchsorted(edges, np.arange(1, length + 1), side="left")
    groups = np.where(windows.scored, group, -1)
    if not (groups > 0).any():
        raise UserError(f"reach is about places whose past is longer than the window of {window} and {sinks} sinks; no "
                        f"place of {windows.about['name']} in windows of {length} tokens is: give a longer {flag}, or "
                        "a longer text")
    return edges, groups


def reach(
    model: Pretrained,
    windows: Windows,
    *,
    forced: Mapping[str, Bool[np.ndarray, "L B T"]] | None = None,
    seeds: int = 3,
    backend: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """The table over `windows` in JSON types; `forced` are more choices, by name.

    A row holds `nll`, nats a token of each group of distance (the first within the window), `beyond`, their mean over
    all places beyond the window, `kept` of it and `kept_by_distance` with 95 % intervals, `behind` the learned
    decisions, `density` (share routed of all tokens) and `density_beyond` (of those beyond the window), and each
    window's sums. Rows of several seeds are their mean. Of a plain model there is one row, its own. Raises UserError
    where no place is beyond the window.
    """
    edges, groups = distances(windows, model)
    tokens = sums(np.ones(groups.shape, int), groups, len(edges))
    layer = model.l2a_config
    if forced:
        check_routed(layer, "reach", f"{', '.join(forced)} cannot be forced on it")

    def score(decisions=None, label="the router's own decisions"):
        return score_windows(model, windows, decisions, backend=backend, batch_tokens=batch_tokens, mesh=mesh,
                             label=f"reach, {label}")

    own = score()
    scores: dict[str, list[Scores]] = {"plain" if layer is None else "learned": [own]}
    if layer is not None:
        for name, label, decisions in controls(own.decisions, windows.real, layer.pruned_layers, seeds):
            scores.setdefault(name, []).append(score(decisions, label))
        for name, decisions in (forced or {}).items():
            scores[name] = [score(decisions, name)]
    by_group = {name: np.mean([sums(one.token_nll, groups, len(edges)) for one in several], axis=0)
                for name, several in scores.items()}
    found: dict[str, Any] = {
        **dict(zip(("window", "sinks"), near(model), strict=True)), "edges": edges,
        "tokens": tokens.sum(axis=0)[1:], "tokens_within": int(tokens[:, 0].sum()), "text": windows.about,
        "seeds": seeds, "interval": "Student's t over windows of text, paired",
        "window_tokens": tokens,
    }
    if layer is not None:
        found |= worth(by_group["none"], by_group["all"], tokens)
    beyond = groups > 0
    rows = {}
    for name, several in scores.items():
        row: dict[str, Any] = {"nll": _means(by_group[name], tokens), "beyond": float(by_group[name][:, 1:].sum() /
                                                                                  tokens[:, 1:].sum()),
                               "window_nll": np.round(by_group[name], 4)}
        if layer is not None:
            row |= kept(by_group["none"], by_group[name], by_group["all"])
            row["behind"], row["behind_95"] = ratio(by_group[name][:, 1:].sum(1) - by_group["learned"][:, 1:].sum(1),
                                                    (by_group["none"] - by_group["all"])[:, 1:].sum(1))
            row |= {"density": _density(several, windows.real), "density_beyond": _density(several, beyond)}
        rows[name] = row
    return {**found, "rows": rows}


def worth(none: Shaped[np.ndarray, "B G"], everything: Shaped[np.ndarray, "B G"],
          tokens: Shaped[np.ndarray, "B G"]) -> dict[str, Any]:
    """Nats a token that global attention is worth beyond the window, in all and by distance, with 95 % intervals; from
    sums of nats by window and group of distance."""
    gain = none - everything
    by = [ratio(gain[:, group], tokens[:, group]) for group in range(1, gain.shape[1])]
    whole, interval = ratio(gain[:, 1:].sum(1), tokens[:, 1:].sum(1))
    return {"worth": whole, "worth_95": interval, "worth_by_distance": [one for one, _ in by],
            "worth_by_distance_95": [one for _, one in by]}


def kept(none: Shaped[np.ndarray, "B G"], chosen: Shaped[np.ndarray, "B G"],
         everything: Shaped[np.ndarray, "B G"]) -> dict[str, Any]:
    """The share of that worth which a choice keeps, in the same form; None where nothing is worth anything."""
    by = [ratio((none - chosen)[:, group], (none - everything)[:, group]) for group in range(1, none.shape[1])]
    whole, interval = ratio((none - chosen)[:, 1:].sum(1), (none - everything)[:, 1:].sum(1))
    return {"kept": whole, "kept_95": interval, "kept_by_distance": [one for one, _ in by],
            "kept_by_distance_95": [one for _, one in by]}


def ratio(top: Shaped[np.ndarray, " B"], bottom: Shaped[np.ndarray, " B"]) -> tuple[float | None, list[float] | None]:
    """(sum of `top` over sum of `bottom`, its 95 % interval over windows); (None, None) where the latter is not above
    0. Windows without a part in either are no sample."""
    there = (top != 0) | (bottom != 0)
    if not bottom[there].sum() > 0:
        return None, None
    mean, error = intervals.ratio(top[there], bottom[there])
    half = intervals.student(int(there.sum()) - 1) * error
    return mean, [mean - half, mean + half]


def told(entry: dict[str, Any]) -> str:
    """The choices, one a line: how local, the share kept in all and by distance."""
    edges, rows = entry["edges"], entry["rows"]
    unit = f"window of {entry['window']:,}" + (f" and {entry['sinks']} sinks" if entry["sinks"] else "")
    heads = [f"> {edge:,}" for edge in edges]
    lines = [f"reach: {entry['text']['name']}, windows of {entry['text']['context']:,} tokens, {unit}"]
    if entry.get("worth") is None:
        lines.append(f"{'nats a token':<12}" + "".join(f"{head:>12}" for head in ["within", *heads]))
        lines += [f"{name:<12}" + "".join(_number(value, "12.4f") for value in row["nll"])
                  for name, row in rows.items()]
        return "\n".join(lines)
    low, high = entry["worth_95"]
    lines += [f"global attention is worth {entry['worth']:.4f} nats a token [{low:.4f}, {high:.4f}] beyond the window; "
              "share of that which is kept:",
              f"{'routing':<12} {'local':>7} {'kept [95 %]':>22}" + "".join(f"{head:>10}" for head in heads)]
    for name, row in rows.items():
        low, high = row["kept_95"]
        lines.append(f"{name:<12} {1 - row['density']:>7.1%} {row['kept']:>7.3f} [{low:.3f}, {high:.3f}]".ljust(43)
                     + "".join(_number(value, "10.3f") for value in row["kept_by_distance"]))
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    width = int(form.split(".")[0])
    return f"{'-':>{width}}" if value is None or not math.isfinite(value) else f"{value:{form}}"


def sums(values: Shaped[np.ndarray, "B T"], groups: Int[np.ndarray, "B T"], edges: int) -> Shaped[np.ndarray, "B G"]:
    """Sums of each window over its places of each group."""
    return np.stack([np.where(groups == group, values, 0).sum(axis=1) for group in range(edges + 1)], axis=1)


def _means(sums: Shaped[np.ndarray, "B G"], tokens: Shaped[np.ndarray, "B G"]) -> list[float | None]:
    return [float(top / bottom) if bottom else None for top, bottom in zip(sums.sum(0), tokens.sum(0), strict=True)]


def _density(scores: Sequence[Scores], places: Bool[np.ndarray, "B T"]) -> float:
    """The share routed of some places, over all layers and seeds."""
    return float(np.mean([one.decisions[:, places].mean() for one in scores]))
