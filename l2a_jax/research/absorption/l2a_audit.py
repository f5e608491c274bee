"""The absorption question asked of L2A: how much of a trained run's quality do its *learned* decisions carry?

The same weights score the same held-out text under learned decisions, random ones at the same rate in every layer,
shuffled ones, another run's, everything routed, and nothing. Once with attention as the run trained it ("after"), and
once with attention as it was before the run, forced to take the run's decisions ("before"): where decisions matter
before and no longer after, attention has absorbed them.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2a_jax import device
from l2a_jax.attention.reference import real_tokens
from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.data.batch import Batch
from l2a_jax.data.dataset import open_data
from l2a_jax.data.recall import needs_memory
from l2a_jax.errors import UserError
from l2a_jax.evaluation.subject import check_routed
from l2a_jax.models.params import Tree
from l2a_jax.nn import routing
from l2a_jax.research.absorption import outcome
from l2a_jax.research.absorption.outcome import Cell, Report, Table, perplexity
from l2a_jax.runs.plan import load_tree, plan_of
from l2a_jax.sources import load_pretrained, locate, run_source
from l2a_jax.training.run_files import read_run
from l2a_jax.training.step import Objective, evaluate_batch

log = logging.getLogger("l2a_jax")
_evaluate = jax.jit(evaluate_batch, static_argnames="objective")


class Audited(NamedTuple):
    """What is audited: the trained parameters, those from before the run (None: unknown), and held-out text."""

    config: ModelConfig
    l2a_config: L2AConfig
    after: Tree
    before: Tree | None
    batches: list[Batch]
    is_recall: bool
    dtype: Any


class Score(NamedTuple):
    """Nats per counted token, accuracy on recall answers (recall corpus only), share of decisions that were global."""

    nll: float
    recall: float | None
    routed: float


def open_audited(source: str, data: Sequence[str], batches: int | None, seq_len: int | None, batch_size: int | None
                 ) -> Audited:
    """A run folder with its own data, or (with `--data`) any L2A model; UserError where there is nothing to audit."""
    run = run_source(locate(source))
    if run is not None and not data:
        plan = plan_of(read_run(run.folder).whole(), source)
        if plan.l2a_config is None:
            raise UserError(f"{source} was trained without an L2A layer; expected a run of a routed regime")
        held_out = list(plan.data.held_out(batches or plan.settings.eval_batches))
        if not held_out:
            raise UserError(f"the data of {source} has no held-out documents; give text with --data")
        after = load_pretrained(source, plan.dtype)
        return Audited(plan.config, after.l2a_config, after.params, load_tree(plan)[0], held_out, plan.is_demo,
                       plan.dtype)
    dtype = jnp.dtype(device.default_dtype())
    loaded = load_pretrained(source, dtype)
    check_routed(loaded.l2a_config, "audit", model=source)
    if not data or loaded.tokenizer is None:
        raise UserError(f"{source} says nothing of its data; give text with --data (and a model with a tokenizer)")
    packed = open_data(data, loaded.tokenizer, seq_len=seq_len or 1_024, batch_size=batch_size or 4, seed=0,
                       held_out=0.02, vocab_size=loaded.config.vocab_size)
    held_out = list(packed.held_out(batches or 16))
    if not held_out:
        raise UserError(f"--data {' '.join(data)} has no held-out documents; give more text")
    return Audited(loaded.config, loaded.l2a_config, loaded.params, None, held_out, False, dtype)


def audit(audited: Audited, others: Sequence[tuple[str, Tree, L2AConfig]], seeds: Sequence[int]) -> Report:
    """Every choice of decisions under the weights before and after; random and shuffled ones once for each seed."""
    choices = _choices(audited, others, seeds)
    scores: dict[str, dict[str, list[Score]]] = {}
    for when, params in (("after", audited.after), ("before", audited.before)):
        if params is not None:
            score = _scorer(audited, params)
            scores[when] = {name: [score(drawn) for drawn in draws] for name, draws in choices.items()}
    table = Table("Held-out perplexity by whose decisions are taken", note="Carried: (random - learned) / (nothing - "
                  "learned), in nats: 1 where random decisions at the same rates are as bad as none, 0 where they are "
                  "as good as the learned ones; no number where routing nothing costs less than 0.001 nats.")
    carried = Table("Share of quality that the learned decisions carry")
    for name in choices:
        table.rows[name] = {"routed": Cell([one.routed for one in scores["after"][name]], digits=3)}
    for when, found in scores.items():
        own, nothing = found["learned"][0].nll, found["nothing"][0].nll
        for name, draws in found.items():
            nll = np.array([one.nll for one in draws])
            table.rows[name] |= {f"{when} training": Cell(perplexity(nll), digits=3),
                                 f"nats above learned, {when}": Cell(nll - own, digits=4)}
            if audited.is_recall:
                table.rows[name][f"recall accuracy, {when}"] = Cell([one.recall for one in draws], digits=3)
        random = np.array([one.nll for one in found["random, same rates"]])
        carried.rows[f"attention {when} the run"] = {
            "carried": Cell((random - own) / (nothing - own), digits=3) if nothing - own > 1e-3 else "-"}
    panel = outcome.bars("Nats above the learned decisions, attention as trained", "nats", table,
                         "nats above learned, after")
    return Report("l2a_audit", "What L2A's learned decisions carry", [table, carried], [panel])


def _choices(audited: Audited, others, seeds) -> dict[str, list[list[np.ndarray]]]:
    """Whose decisions are taken: by name, a list of draws, each of them an array [L, B, T] a batch."""
    learned = _decisions(audited, audited.after, audited.l2a_config)
    real = [np.asarray(real_tokens(batch.segment_ids, batch.tokens.shape)) for batch in audited.batches]
    rates = sum((d & r).sum(axis=(1, 2)) for d, r in zip(learned, real, strict=True)) / sum(r.sum() for r in real)

    def drawn(draw):
        return [[draw(jax.random.fold_in(jax.random.key(seed), index), index) for index in range(len(learned))]
                for seed in seeds]

    return {
        "learned": [learned],
        "random, same rates": drawn(lambda key, index: routing.random(key, rates, *learned[index].shape[1:])),
        "shuffled": drawn(lambda key, index: routing.shuffled(key, jnp.asarray(learned[index]),
                                                              jnp.asarray(real[index]))),
        "everything": [[np.ones_like(one) for one in learned]], "nothing": [[np.zeros_like(one) for one in learned]],
        **{f"of {name}": [_decisions(audited, params, layer)] for name, params, layer in others}}


def _decisions(audited: Audited, params: Tree, layer: L2AConfig) -> list[np.ndarray]:
    """What a model decides for every batch."""
    objective = Objective(audited.config, layer, dtype=audited.dtype)
    return [np.asarray(_evaluate(params, batch, None, objective=objective).decisions) for batch in audited.batches]


def _scorer(audited: Audited, params: Tree) -> Callable[[list[np.ndarray]], Score]:
    """The score of weights that are forced to take decisions."""
    objective = Objective(audited.config, audited.l2a_config, dtype=audited.dtype)

    def score(decisions):
        nll = counted = right = asked = routed = real = 0.0
        for batch, chosen in zip(audited.batches, decisions, strict=True):
            result = jax.device_get(_evaluate(params, batch, jnp.asarray(chosen), objective=objective))
            nll += float((result.nll * batch.weights).sum(dtype=np.float64))
            counted += float(batch.weights.sum())
            routed += float((np.asarray(chosen) & result.real).mean(axis=0).sum())
            real += float(result.real.sum())
            if audited.is_recall:
                needed = needs_memory(batch.tokens)
                right, asked = right + float(result.correct[needed].sum()), asked + float(needed.sum())
        if not counted:
            raise UserError("the held-out text has no token that counts; give more text with --data")
        if not np.isfinite(nll):
            raise UserError("the model scores nats that are not finite; is the run sound?")
        return Score(nll / counted, right / asked if asked else None, routed / real)

    return score


def run(sources: Sequence[str], data: Sequence[str], out: pathlib.Path, *, eval_batches: int | None,
        seeds: Sequence[int] | None, seq_len: int | None, batch_size: int | None) -> Report:
    """`--experiment l2a_audit RUN [OTHER...]`: audit RUN, with the others' decisions among the choices."""
    if not sources:
        raise UserError("--experiment l2a_audit needs a run folder or an L2A model: l2a_audit RUN [OTHER_RUN]")
    outcome.check_place("l2a_audit", out)
    audited = open_audited(sources[0], data, eval_batches, seq_len, batch_size)
    others = []
    for source in sources[1:]:
        other = load_pretrained(source, audited.dtype)
        same_shapes = dataclasses.replace(other.config, rope=audited.config.rope) == audited.config
        if other.l2a_config is None or not same_shapes:
            raise UserError(f"{source} cannot decide for {sources[0]}; expected another L2A run of the same model")
        others.append((pathlib.Path(source).name, other.params, other.l2a_config))
    found = audit(audited, others, tuple(seeds or (0, 1, 2)))
    text = (f"{pathlib.Path(sources[0]).name} on {device.described()}; {len(audited.batches)} held-out "
            f"batches of {' x '.join(map(str, audited.batches[0].tokens.shape))} tokens; layer {audited.l2a_config}.")
    about = {"text": text, "run": pathlib.Path(sources[0]).name, "l2a_config": dataclasses.asdict(audited.l2a_config)}
    outcome.write(found, about, out)
    print(outcome.markdown(found, about))
    log.info("written to %s", out)
    return found
