"""Perplexity of a whole text, the mean over its tokens, with per-layer sparsity beside it.

The convention, exactly (n token ids x_0 .. x_{n-1}; context C, stride S <= C):
  - window k reads the inputs x[kS : kS + C] and predicts at each of them the next token, x[kS + 1 : kS + C + 1];
  - the first window is scored at all its places, every later one at its last S places only: so each of x_1 .. x_{n-1}
    is scored once, by a model that has seen at least C - S + 1 tokens before it (or the whole text so far);
  - windows begin afresh: positions 0..C-1, no special token, nothing carried over;
  - the last window is shorter and padded to C on the right, where causality keeps padding from mattering;
  - perplexity = exp(sum of all nats / (n - 1)), summed in float64.
With transformers: logits = model(x[kS : kS + C]).logits, cross-entropy against x[kS + 1 : ...] at the scored places.
S = C are disjoint windows, as in most published WikiText-2 numbers (which often leave each window's first token out).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Float64, Int, Int32, Shaped

from l2a_jax.data.batch import Batch
from l2a_jax.data.counts import format_count
from l2a_jax.errors import UserError
from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.columns import CELL, ROUTING, SCORE, Column, interval
from l2a_jax.evaluation.loglikelihood import power_of_two
from l2a_jax.evaluation.registry import Work
from l2a_jax.models.params import check_layers
from l2a_jax.models.transformer import check_tokens, hidden_states
from l2a_jax.nn import routing
from l2a_jax.nn.shard import ALONE
from l2a_jax.progress import progress
from l2a_jax.shapes import at_least, share, some
from l2a_jax.sharding import whole
from l2a_jax.sharding.mesh import ROWS, STACKED, axes_of
from l2a_jax.sources import Pretrained
from l2a_jax.training.loss import token_nll

CONVENTION = ("window k reads tokens [kS, kS+C) and predicts the next of each; the first window is scored everywhere, "
              "later ones at their last S places; mean over all tokens but the text's first")
BATCH_TOKENS = 16_384


SHAPE = {"perplexity": float, "perplexity_95": intervals.INTERVAL, "tokens": at_least(1),
         "text": {"name": str, "rule": str, "hash": str, "context": int, "stride": int},
         "window_nll": some(float), "window_tokens": some(at_least(0)), "sparsity?": share,
         "sparsity_per_layer?": [share], "recall_accuracy?": share}
LENGTHS = {"window_tokens": "window_nll"}


class Windows(NamedTuple):
    """B windows of T tokens. `scored`: places whose target counts; `real`: not padding. `marked`: places of special
    interest, whose accuracy is reported apart. `about`: what a result says of the text."""

    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]
    scored: Bool[np.ndarray, "B T"]
    real: Bool[np.ndarray, "B T"]
    about: dict[str, Any]
    marked: Bool[np.ndarray, "B T"] | None = None


class Scores(NamedTuple):
    """What a pass over windows gives: per window the nats, tokens and right top tokens at scored places; and, of a
    routed model, its decisions at every real place and the router's mean entropy (nats) per layer. `token_nll`: the
    nats of each place, 0 where it is not scored."""

    nll: Float64[np.ndarray, " B"]
    tokens: Int[np.ndarray, " B"]
    correct: Int[np.ndarray, " B"]
    marked_accuracy: float | None
    decisions: Bool[np.ndarray, "L B T"] | None
    entropy: Float64[np.ndarray, " L"] | None
    token_nll: Float64[np.ndarray, "B T"] | None = None


def text_windows(ids: Int32[np.ndarray, " n"], context: int, stride: int, about: dict[str, Any],
                 limit: int | None = None) -> Windows:
    """Cut a text into windows as the module says; `limit` keeps the first so many. UserError where it cannot be cut."""
    if not 1 <= stride <= context:
        raise UserError(f"--stride is {stride}; expected between 1 and the context of {context} tokens, so that every "
                        "token is scored once")
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} tokens; expected at least 2")
    predicted = len(ids) - 1
    count = 1 + max(0, -(-(predicted - context) // stride))
    kept = count if limit is None else min(limit, count)
    starts = np.arange(kept)[:, None] * stride
    places = starts + np.arange(context)
    real = places < predicted
    scored = real & ((starts == 0) | (np.arange(context) >= context - stride))
    padded = np.pad(ids, (0, int(places.max()) + 2 - len(ids) if places.max() + 2 > len(ids) else 0))
    tokens, targets = (np.where(real, padded[places + shift], 0).astype(np.int32) for shift in (0, 1))
    return Windows(tokens, targets, scored, real, {
        **about, "context": context, "stride": stride, "text_tokens": len(ids), "windows": kept, "all_windows": count,
        "convention": CONVENTION, "hash": _hash(tokens, targets, scored)})


def batch_windows(batches: list[Batch], about: dict[str, Any],
                  mark: Callable[[np.ndarray], np.ndarray] | None = None) -> Windows:
    """Rows of a corpus that is not one text (whole rows, each scored everywhere its weight is above 0)."""
    tokens, targets, weights = (np.concatenate([getattr(batch, name) for batch in batches])
                                for name in ("tokens", "targets", "weights"))
    return Windows(tokens, targets, weights > 0, np.ones(tokens.shape, bool), {
        **about, "context": tokens.shape[1], "stride": tokens.shape[1], "windows": len(tokens),
        "convention": "whole rows, every token but a row's first", "hash": _hash(tokens, targets, weights > 0),
    }, None if mark is None else mark(tokens))


def score_windows(
    model: Pretrained,
    windows: Windows,
    decisions: Bool[np.ndarray, "L B T"] | None = None,
    *,
    heads: Bool[np.ndarray, "L K"] | None = None,
    cut: Float[np.ndarray, " L"] | None = None,
    backend: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    mesh: Mesh | None = None,
    label: str = "perplexity",
) -> Scores:
    """One pass over the windows under the router's own decisions, or under `decisions`; `heads` and `cut` are those of
    `hidden_states`.

    Where few places are scored (the answer of a needle), the vocabulary's logits are computed at those alone. `mesh`:
    deals the windows of a batch, and their tokens; `batch_tokens` are those of each device. Raises
    UserError where no place is scored at all, and naming the window where a loss is not finite.
    """
    count, length = windows.tokens.shape
    if not windows.scored.any():
        raise UserError(f"{label}: no token of {windows.about.get('name', 'the text')} is to be scored")
    for ids in (windows.tokens, np.where(windows.scored, windows.targets, 0)):
        check_tokens(jnp.asarray(ids), model.config)
    axes, params = axes_of(mesh), whole.put(model.params, mesh)
    rows = axes.data * max(1, min(-(-count // axes.data), batch_tokens * axes.context // length))
    width = -(-length // axes.context) * axes.context
    layer, pruned = model.l2a_config, None
    if layer is not None:  # as numbers: one program for every choice of layers
        check_layers(model.config, layer)
        pruned = np.isin(np.arange(model.config.num_layers), layer.pruned_layers)
        layer = dataclasses.replace(layer, pruned_layers=())
    nll, correct = np.zeros((count, length)), np.zeros((count, length), bool)
    places = _scored_places(windows.scored)
    routed, entropy = [], 0.0
    with progress(label, count) as report:
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            tokens, targets, real = (_filled(x[start:stop], rows, width) for x in (*windows[:2], windows.real))
            picks = None if places is None else _filled(places[start:stop], rows, places.shape[1])
            forced = None if decisions is None else _filled(decisions[:, start:stop], rows, width)
            *found, decided, doubt = jax.device_get(_score(
                params, tokens, targets, real, forced, (pruned, heads, cut), picks, model.config, layer, backend, mesh))
            at = np.arange(length)[None, :] if picks is None else places[start:stop]
            for all_windows, part in zip((nll, correct), found, strict=True):
                part = part[: stop - start, : at.shape[1]]
                np.put_along_axis(all_windows[start:stop], np.broadcast_to(at, part.shape), part, axis=1)
            _check_finite(nll, windows, start, stop)
            if decided is not None:
                routed.append(decided[:, : stop - start, :length] & windows.real[None, start:stop])
                entropy = entropy + doubt.astype(np.float64)
            seen = windows.scored[:stop]
            report(stop, f"{stop} of {count} windows, perplexity {_so_far(nll[:stop][seen])}")
    marked = None
    if windows.marked is not None and (windows.marked & windows.scored).any():
        marked = float(correct[windows.marked & windows.scored].mean())
    nll = np.where(windows.scored, nll, 0)
    return Scores(
        nll.sum(axis=1), windows.scored.sum(axis=1),
        (correct & windows.scored).sum(axis=1), marked, np.concatenate(routed, axis=1) if routed else None,
        np.asarray(entropy / windows.real.sum()) if routed else None, nll)


def task(work: Work) -> dict[str, Any]:
    return result(work.score(), work.windows)


def columns(name: str) -> tuple[Column, ...]:
    difference = {"ratio": float, "ratio_95": intervals.INTERVAL}
    shape = {"value": CELL["value"], "interval": CELL["interval"], "tokens": int, "difference?": difference}
    return (Column("perplexity", "perplexity", SCORE, shape, _cell, _text, "{:.2f}".format, always=True),
            Column("sparsity", "local", ROUTING, float, lambda entry, other, say: entry.get("sparsity"),
                   lambda cell, versus: f"{cell:.1%}", always=True))


def _cell(entry: dict[str, Any], other: dict[str, Any] | None, say: Callable[[str], None]) -> dict[str, Any]:
    cell = {"value": entry["perplexity"], "interval": entry["perplexity_95"], "tokens": entry["tokens"],
            "text": entry["text"]["name"], "context": entry["text"]["context"], "stride": entry["text"]["stride"],
            "difference": None}
    if other is None:
        return cell
    if entry["text"]["hash"] != other["text"]["hash"] or entry["window_tokens"] != other["window_tokens"]:
        say("perplexity is of other windows than the baseline's: no paired difference")
        return cell
    nll, base, tokens = (np.asarray(x) for x in (entry["window_nll"], other["window_nll"], entry["window_tokens"]))
    nats, (low, high) = intervals.paired_windows(nll, base, tokens)
    return cell | {"difference": {"nats": nats, "interval": [low, high], "ratio": intervals.exp(nats),
                                  "ratio_95": [intervals.exp(low), intervals.exp(high)]}}


def _text(cell: dict[str, Any], versus: bool) -> str:
    shown = interval(cell, f"{format_count(cell['tokens'])} tokens", 1, 2)
    if versus and cell["difference"]:
        low, high = cell["difference"]["ratio_95"]
        shown += f"<br>Δ x{cell['difference']['ratio']:.3f} [{low:.3f}, {high:.3f}]"
    return shown


def routing_rates(decisions: Bool[np.ndarray, "L B T"], real: Bool[np.ndarray, "B T"]) -> Float64[np.ndarray, " L"]:
    """Share of the real tokens that each layer routes."""
    return (decisions & real).sum(axis=(1, 2), dtype=np.float64) / real.sum()


def result(scores: Scores, windows: Windows) -> dict[str, Any]:
    """The scores as a result: perplexity with its 95 % interval, sparsity per layer, and each window's nats, with which
    two runs over the same windows (the same `hash`) are compared pair by pair."""
    mean, error = intervals.token_mean(scores.nll, scores.tokens)
    out: dict[str, Any] = {
        "perplexity": intervals.exp(mean),
        "perplexity_95": [intervals.exp(bound) for bound in intervals.around(mean, error)],
        "nll": mean, "nll_stderr": error, "accuracy": float(scores.correct.sum() / scores.tokens.sum()),
        "tokens": int(scores.tokens.sum()), "text": windows.about,
        "interval": "normal, over windows as clusters",
        "window_nll": np.round(scores.nll, 4), "window_tokens": scores.tokens,
    }
    if scores.marked_accuracy is not None:
        out["recall_accuracy"] = scores.marked_accuracy
    if scores.decisions is not None:
        sparsity = 1 - routing_rates(scores.decisions, windows.real)
        out |= {"sparsity": float(sparsity.mean()), "sparsity_per_layer": sparsity,
                "router_entropy_per_layer": scores.entropy}
    return out


def told(entry: dict[str, Any]) -> str:
    """Perplexity with its interval and text, and what stayed local."""
    low, high = entry["perplexity_95"]
    text = entry["text"]
    lines = [f"perplexity {entry['perplexity']:.3f} [{low:.3f}, {high:.3f}] over {entry['tokens']:,} tokens of "
             f"{text['name']} (context {text['context']}, stride {text['stride']}, {text['rule']})"]
    if entry.get("recall_accuracy") is not None:
        lines.append(f"recall accuracy {entry['recall_accuracy']:.1%}")
    if entry.get("sparsity") is not None:
        layers = " ".join(f"{value:.0%}" for value in entry.get("sparsity_per_layer") or ())
        lines.append(f"local: {entry['sparsity']:.1%} (by layer: {layers})")
    return "\n".join(lines)


@functools.partial(jax.jit, static_argnums=(7, 8, 9, 10))
def _score(params, tokens, targets, real, decisions, by_layer, picks, config, l2a_config, backend, mesh):
    """Nats and right top tokens at all places, or at `picks` of each row; decisions, and each layer's sum of entropy
    over real tokens."""
    if mesh is None:
        return _scored(params, tokens, targets, real, decisions, by_layer, picks, config, l2a_config, backend, ALONE)
    shard = whole.dealt(mesh, config, l2a_config)
    on_device = jax.shard_map(lambda *given: _scored(*given, config, l2a_config, backend, shard), mesh=mesh,
                              in_specs=(P(), ROWS, ROWS, ROWS, STACKED, P(), ROWS),
                              out_specs=(ROWS, ROWS, STACKED, P()), check_vma=False)
    return on_device(params, tokens, targets, real, decisions, by_layer, picks)


def _scored(params, tokens, targets, real, decisions, by_layer, picks, config, l2a_config, backend, shard):
    """Of the rows that `shard` has a part of, whole."""
    pruned, heads, cut = by_layer
    tokens, real, decisions = jax.tree.map(shard.tokens, (tokens, real, decisions))
    hidden, routed = hidden_states(params, tokens, config, l2a_config, decisions=decisions, pruned=pruned, heads=heads,
                                   cut=cut, backend=backend, shard=shard)
    if picks is None:
        found = jax.tree.map(shard.joined, token_nll(params, hidden, shard.tokens(targets), config))
    else:
        hidden = shard.chosen(hidden, picks)
        found = token_nll(params, hidden, jnp.take_along_axis(targets, picks, axis=1), config)
    if routed is None:
        return *found, None, None
    entropy = routing.entropy(routed.probabilities, real) * jnp.sum(real)
    return *found, shard.joined(routed.decisions), shard.total(entropy)


def _scored_places(scored: Bool[np.ndarray, "B T"]) -> Int32[np.ndarray, "B M"] | None:
    """The scored places of every window, the last of them repeated up to a power of two; None where they are so many
    that nothing would be saved."""
    counts = scored.sum(axis=1)
    width = power_of_two(int(counts.max()), 8)
    if 4 * width > scored.shape[1]:
        return None
    order = np.argsort(~scored, axis=1, kind="stable")  # the scored ones first, in their order
    chosen = np.minimum(np.arange(width), np.maximum(counts, 1)[:, None] - 1)
    return np.take_along_axis(order, chosen, axis=1).astype(np.int32)


def _filled(x: Shaped[np.ndarray, "*A b t"], rows: int, width: int) -> Shaped[np.ndarray, "*A B T"]:
    """Padded with zeros, so that every batch has one shape."""
    missing = [(0, size - have) for size, have in zip((*x.shape[:-2], rows, width), x.shape, strict=True)]
    return np.pad(x, missing) if any(size for _, size in missing) else x


def _check_finite(nll, windows, start, stop):
    bad = np.argwhere(~np.isfinite(nll[start:stop]) & windows.scored[start:stop])
    if bad.size:
        window, place = int(bad[0][0]) + start, int(bad[0][1])
        raise UserError(f"perplexity of {windows.about.get('name', 'the text')}: the loss in window {window}, first at "
                        f"its token {place}, is not finite; `--tasks collapse` says where the model breaks")


def _so_far(nll: np.ndarray) -> str:
    return f"{intervals.exp(nll.mean()):.3f}" if nll.size else "-"


def _hash(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
