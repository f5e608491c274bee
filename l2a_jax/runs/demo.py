"""The embedded demo's scores: does the router find the tokens that need memory, and what does leaving the rest cost?

Ground truth comes with the corpus: position t needs memory where token t + 1 is the answer to a question about a fact
beyond the window. Every row of the table is the same held-out text under another choice of decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Bool, Int, Shaped

from l2a_jax.data.batch import Batch
from l2a_jax.data.recall import PREDICTED, needs_memory, predicted
from l2a_jax.models.params import Tree, add_routing
from l2a_jax.nn import routing
from l2a_jax.training.step import Evaluation, TrainState, evaluate_batch

if TYPE_CHECKING:
    from l2a_jax.runs.plan import Run

Score = Callable[[Batch, Any], Evaluation]


def recall_report(run: Run, state: TrainState, frozen: Tree, source_params: Tree, held_out: list[Batch]) -> dict:
    """The report of a demo run that has ended."""
    plan = run.plan
    plain = run.objective._replace(l2a_config=None, mesh=None)  # its weights were never dealt
    if plan.l2a_config is None:
        rows = score(lambda batch, _: run.evaluate(state.trainable, frozen, batch, None), held_out)[0]
        return {"rows": {"this model (full attention)": rows}}
    baseline = jax.jit(lambda params, batch: evaluate_batch(params, batch, None, objective=plain))

    def model(trainable: Tree, frozen: Tree) -> Score:
        return lambda batch, decisions: run.evaluate(
            trainable, frozen, batch, run.forced(batch.tokens.shape) if decisions is None else decisions)

    trained = model(state.trainable, frozen)
    untrained = model(*run.split(source_params if plan.source_routed else
                                 add_routing(source_params, plan.config, plan.l2a_config)))
    own, routed = score(trained, held_out)

    def nothing(index, batch):
        return np.zeros((routed.shape[0], *batch.tokens.shape), bool)

    rows = {"baseline (full attention)": score(lambda batch, _: baseline(source_params, batch), held_out)[0],
            "local only, untrained": score(untrained, held_out, nothing)[0],
            "trained router": own,
            "random routing, same rates": score(trained, held_out, random_like(routed, plan.settings.seed))[0],
            "trained, nothing routed": score(trained, held_out, nothing)[0]}
    needed, kinds = (np.concatenate([of(batch.tokens) for batch in held_out]) for of in (needs_memory, predicted))
    return {"rows": rows, "router_any_layer": agreement(routed.any(axis=0), needed),
            "router_per_layer": [agreement(layer, needed) for layer in routed],
            "routed_by_kind": by_kind(routed.any(axis=0), kinds),
            "share_by_kind": {name: float((kinds == kind).mean()) for kind, name in enumerate(PREDICTED)}}


def score(
    evaluate: Score,
    batches: Iterable[Batch],
    decisions: Callable[[int, Batch], Any] = lambda index, batch: None,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Perplexity on ordinary tokens, accuracy on recall tokens (share of 1), nats by what is predicted, sparsity; and
    the decisions [L, ...]."""
    nll, correct, needed, kinds, routed = [], [], [], [], []
    for index, batch in enumerate(batches):
        result = jax.device_get(evaluate(batch, decisions(index, batch)))
        needed.append(needs_memory(batch.tokens))
        kinds.append(predicted(batch.tokens))
        nll.append(result.nll)
        correct.append(result.correct)
        routed.append(result.decisions)
    nll, correct, needed, kinds = (np.concatenate(parts) for parts in (nll, correct, needed, kinds))
    row = {"ordinary_perplexity": float(np.exp(nll[~needed].mean(dtype=np.float64))),
           "recall_accuracy": float(correct[needed].mean()), "recall_tokens": int(needed.sum()),
           "nats_by_kind": by_kind(nll, kinds)}
    if routed[0] is None:
        return row, None
    routed = np.concatenate(routed, axis=1)
    return {**row, "sparsity": float(1 - routed.mean())}, routed


def by_kind(values: Shaped[np.ndarray, "B T"], kinds: Int[np.ndarray, "B T"]) -> dict[str, float]:
    """The mean of `values` over the tokens that predict each kind."""
    return {name: float(values[kinds == kind].mean()) for kind, name in enumerate(PREDICTED)}


def random_like(routed: Bool[np.ndarray, "L B T"], seed: int) -> Callable[[int, Batch], jax.Array]:
    """Decisions at random, at the rate of each layer of `routed`."""
    rates = routed.mean(axis=(1, 2))
    return lambda index, batch: routing.random(jax.random.fold_in(jax.random.key(seed), index), rates,
                                               *batch.tokens.shape)


def agreement(routed: Bool[np.ndarray, "B T"], needed: Bool[np.ndarray, "B T"]) -> dict[str, float | None]:
    """Precision and recall of routing as a prediction of need; None where nothing was predicted."""
    hits = float((routed & needed).sum())
    return {"precision": hits / routed.sum() if routed.any() else None,
            "recall": hits / needed.sum() if needed.any() else None, "routed": float(routed.mean())}


def format_report(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{'':<28} {'ordinary ppl':>12} {'recall acc.':>12} {'local':>12}"]
    for name, row in report["rows"].items():
        sparsity = f"{row['sparsity']:.1%}" if "sparsity" in row else "-"
        lines.append(f"{name:<28} {row['ordinary_perplexity']:>12.3f} {row['recall_accuracy']:>12.1%} {sparsity:>12}")
    if "router_any_layer" in report:
        lines += ["", "router against the tokens that need memory:",
                  f"{'':<12} {'precision':>10} {'recall':>10} {'routed':>10}"]
        rows = [("any layer", report["router_any_layer"])]
        rows += [(f"layer {index}", entry) for index, entry in enumerate(report["router_per_layer"])]
        for name, entry in rows:
            precision = "-" if entry["precision"] is None else f"{entry['precision']:.1%}"
            recall = "-" if entry["recall"] is None else f"{entry['recall']:.1%}"
            lines.append(f"{name:<12} {precision:>10} {recall:>10} {entry['routed']:>10.1%}")
        lines += _kinds(report)
    return "\n".join(lines + _success(report["rows"]))


def _kinds(report: dict[str, Any]) -> list[str]:
    """What memory is worth to the model before any training, by what a token predicts, and what the router makes of it.
    Precision above counts answers alone; a router that loses nothing routes whatever memory is worth nats to."""
    names = ("baseline (full attention)", "local only, untrained")
    if not {*names} <= {*report["rows"]}:
        return []
    full, near = (report["rows"][name]["nats_by_kind"] for name in names)
    lines = ["", "what memory is worth, and what is routed, by what a token predicts (nats, untrained):",
             f"{'':<24} {'of tokens':>10} {'full':>8} {'local':>8} {'routed':>10}"]
    return lines + [f"{name:<24} {share:>10.1%} {full[name]:>8.2f} {near[name]:>8.2f} "
                    f"{report['routed_by_kind'][name]:>10.1%}" for name, share in report["share_by_kind"].items()]


def _success(rows: dict[str, Any]) -> list[str]:
    """What a loss that hardly moves is to be judged by."""
    names = ("baseline (full attention)", "trained router", "random routing, same rates")
    if not set(names) <= set(rows):
        return []
    full, own, random = (f"{rows[name]['recall_accuracy']:.1%}" for name in names)
    local = f"{rows[names[1]]['sparsity']:.1%}"
    return ["", "A flat loss is no failure: the model knows this corpus, and only which tokens need memory is left to "
            "learn.", f"Success is recall near full attention's: {own} with {local} of decisions local, against {full} "
            f"(as many at random: {random})."]
