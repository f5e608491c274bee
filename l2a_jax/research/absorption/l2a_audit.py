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
from jaxtyping import Bool

from l2a_jax.attention.reference import real_tokens
from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.data.batch import Batch
from l2a_jax.data.dataset import open_data
from l2a_jax.data.recall import needs_memory
from l2a_jax.errors import UserError
from l2a_jax.models.params import Tree
from l2a_jax.nn import routing
from l2a_jax.research.absorption import report
from l2a_jax.research.absorption.report import Cell, Report, Table, perplexity
from l2a_jax.runs.plan import load_tree, plan_of
from l2a_jax.sources import load_pretrained, locate, run_source
from l2a_jax.training.run_files import read_run
from l2a_jax.training.step import Objective, evaluate_batch

log = logging.getLogger("l2a_jax")


class Subject(NamedTuple):
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


def open_subject(source: str, data: Sequence[str], batches: int | None, seq_len: int | None, batch_size: int | None
                 ) -> Subject:
    """A run folder with its own data, or (with `--data`) any L2A model; UserError where there is nothing to audit."""
    run = run_source(locate(source))
    if run is not None and not data:
        plan = plan_of(read_run(run.folder).whole(), source)
        if plan.l2a_config is None:
            raise UserError(f"{source} was trained without an L2A layer; expected a run of a routed regime")
        held_out = list(plan.data.held_out(batches or plan.settings.eval_batches))
        if not held_out:
            raise UserError(f"the data of {source} has no held-out documents; give text with --data")
        after = load_pretrained(source, plan.dtype).params
        return Subject(plan.config, plan.l2a_config, after, load_tree(plan)[0], held_out, plan.is_demo, plan.dtype)
    dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    loaded = load_pretrained(source, dtype)
    if loaded.l2a_config is None:
        raise UserError(f"{source} is a plain model; expected one with an L2A layer")
    if not data or loaded.tokenizer is None:
        raise UserError(f"{source} says nothing of its data; give text with --data (and a model with a tokenizer)")
    packed = open_data(data, loaded.tokenizer, seq_len=seq_len or 1_024, batch_size=batch_size or 4, seed=0,
                       held_out=0.02, vocab_size=loaded.config.vocab_size)
    held_out = list(packed.held_out(batches or 16))
    if not held_out:
        raise UserError(f"--data {' '.join(data)} has no held-out documents; give more text")
    return Subject(loaded.config, loaded.l2a_config, loaded.params, None, held_out, False, dtype)


def audit(subject: Subject, others: Sequence[tuple[str, Tree, L2AConfig]], seeds: Sequence[int]) -> Report:
    """Every choice of decisions under the weights before and after; random and shuffled ones once for each seed."""
    score, decisions_of = _scorer(subject)
    learned = [decisions_of(subject.after, subject.l2a_config, batch) for batch in subject.batches]
    real = [np.asarray(real_tokens(batch.segment_ids, batch.tokens.shape)) for batch in subject.batches]
    rates = _rates(learned, real)
    shape = learned[0].shape

    def constant(value):
        return lambda seed, index: np.full(shape, value)

    def key(seed, index):
        return jax.random.fold_in(jax.random.key(seed), index)

    choices: dict[str, tuple[Callable, Sequence[int]]] = {
        "learned": (lambda seed, index: learned[index], [0]),
        "random, same rates": (lambda seed, index: routing.random(key(seed, index), rates, *shape[1:]), seeds),
        "shuffled": (lambda seed, index: routing.shuffled(
            key(seed, index), jnp.asarray(learned[index]), jnp.asarray(real[index])), seeds),
        "everything": (constant(True), [0]), "nothing": (constant(False), [0])}
    for name, params, l2a_config in others:
        theirs = [decisions_of(params, l2a_config, batch) for batch in subject.batches]
        choices[f"of {name}"] = (lambda seed, index, theirs=theirs: theirs[index], [0])

    table = Table("Held-out perplexity by whose decisions are taken", note="Carried: (random - learned) / (nothing - "
                  "learned), in nats: 1 where random decisions at the same rates are as bad as none, 0 where they are "
                  "as good as the learned ones; no number where routing nothing costs less than 0.001 nats.")
    weights = {"after": subject.after, **({"before": subject.before} if subject.before is not None else {})}
    found = {when: {name: [score(params, lambda index, make=make, seed=seed: make(seed, index)) for seed in draws]
                    for name, (make, draws) in choices.items()} for when, params in weights.items()}
    for name in choices:
        cells: dict[str, Cell | str] = {"routed": Cell([s.routed for s in found["after"][name]], digits=3)}
        for when, scores in found.items():
            nll = np.array([s.nll for s in scores[name]])
            own = scores["learned"][0].nll
            cells |= {f"{when} training": Cell(perplexity(nll), digits=3),
                      f"nats above learned, {when}": Cell(nll - own, digits=4)}
            if subject.is_recall:
                cells[f"recall accuracy, {when}"] = Cell([s.recall for s in scores[name]], digits=3)
        table.rows[name] = cells
    carried = Table("Share of quality that the learned decisions carry")
    for when, scores in found.items():
        own, nothing = scores["learned"][0].nll, scores["nothing"][0].nll
        random = np.array([s.nll for s in scores["random, same rates"]])
        carried.rows[f"attention {when} the run"] = {
            "carried": Cell((random - own) / (nothing - own), digits=3) if nothing - own > 1e-3 else "-"}
    panel = report.bars("Nats above the learned decisions, attention as trained", "nats", table,
                        "nats above learned, after")
    return Report("l2a_audit", "What L2A's learned decisions carry", [table, carried], [panel])


def _rates(learned: list[Bool[np.ndarray, "L B T"]], real: list[Bool[np.ndarray, "B T"]]) -> np.ndarray:
    """Share of real tokens routed, per layer."""
    return sum((d & r).sum(axis=(1, 2)) for d, r in zip(learned, real, strict=True)) / sum(r.sum() for r in real)


def _scorer(subject: Subject):
    """`score(params, decisions(index)) -> Score` over all batches, and `decisions_of(params, layer, batch)`."""
    objective = Objective(subject.config, subject.l2a_config, dtype=subject.dtype)
    forced = jax.jit(lambda params, batch, decisions: evaluate_batch(params, batch, decisions, objective=objective))

    def decisions_of(params, l2a_config, batch):
        own = objective._replace(l2a_config=l2a_config)
        found = jax.jit(lambda p, b: evaluate_batch(p, b, None, objective=own).decisions)(params, batch)
        return np.asarray(found)

    def score(params, decisions):
        nll = counted = right = asked = routed = real = 0.0
        for index, batch in enumerate(subject.batches):
            chosen = jnp.asarray(decisions(index))
            result = jax.device_get(forced(params, batch, chosen))
            nll += float((result.nll * batch.weights).sum(dtype=np.float64))
            counted += float(batch.weights.sum())
            routed += float((np.asarray(chosen) & result.real).mean(axis=0).sum())
            real += float(result.real.sum())
            if subject.is_recall:
                needed = needs_memory(batch.tokens)
                right, asked = right + float(result.correct[needed].sum()), asked + float(needed.sum())
        if not counted:
            raise UserError("the held-out text has no token that counts; give more text with --data")
        if not np.isfinite(nll):
            raise UserError("the model scores nats that are not finite; is the run sound?")
        return Score(nll / counted, right / asked if asked else None, routed / real)

    return score, decisions_of


def run(sources: Sequence[str], data: Sequence[str], out: pathlib.Path, batches: int | None,
        seeds: Sequence[int] | None, seq_len: int | None, batch_size: int | None) -> Report:
    """`--experiment l2a_audit RUN [OTHER...]`: audit RUN, with the others' decisions among the choices."""
    if not sources:
        raise UserError("--experiment l2a_audit needs a run folder or an L2A model: l2a_audit RUN [OTHER_RUN]")
    report.check_place("l2a_audit", out)
    subject = open_subject(sources[0], data, batches, seq_len, batch_size)
    others = []
    for source in sources[1:]:
        other = load_pretrained(source, subject.dtype)
        same = ("num_layers", "vocab_size")
        if other.l2a_config is None or any(getattr(other.config, n) != getattr(subject.config, n) for n in same):
            raise UserError(f"{source} cannot decide for {sources[0]}; expected an L2A model of as many layers and the "
                            "same vocabulary")
        others.append((pathlib.Path(source).name, _with(other.params, other.config, subject), other.l2a_config))
    found = audit(subject, others, tuple(seeds or (0, 1, 2)))
    text = (f"{pathlib.Path(sources[0]).name} on {jax.devices()[0].device_kind}; {len(subject.batches)} held-out "
            f"batches of {' x '.join(map(str, subject.batches[0].tokens.shape))} tokens; layer {subject.l2a_config}.")
    about = {"text": text, "run": pathlib.Path(sources[0]).name, "l2a_config": dataclasses.asdict(subject.l2a_config)}
    report.write(found, about, out)
    print(report.markdown(found, about))
    log.info("written to %s", out)
    return found


def _with(params: Tree, config: ModelConfig, subject: Subject) -> Tree:
    if dataclasses.replace(config, rope=subject.config.rope) != subject.config:
        raise UserError("the other run's model has other shapes; expected two runs of one model")
    return params
