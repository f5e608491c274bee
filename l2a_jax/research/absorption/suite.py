"""What the command does: settings to a laboratory, experiments to files."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from l2a_jax.errors import UserError
from l2a_jax.provenance import provenance
from l2a_jax.research.absorption import corpora, outcome
from l2a_jax.research.absorption.definitions import Arm, SuiteConfig
from l2a_jax.research.absorption.experiments import EXPERIMENTS
from l2a_jax.research.absorption.lab import Lab
from l2a_jax.research.absorption.small_model import count_parameters

log = logging.getLogger("l2a_jax")


def make_corpus(preset: SuiteConfig, spec: Sequence[str], tokenizer: str | None, held_out: float,
                cache_dir: pathlib.Path | None) -> corpora.Corpus:
    """The text of `--data`, or the synthetic recall corpus (as much of it as one pass needs)."""
    recipe = preset.recipe
    if not spec:
        needed = recipe.steps * recipe.batch_size
        return corpora.recall_corpus(recipe.seq_len, min(needed, 20_000), preset.eval_batches * recipe.batch_size)
    if tokenizer is None:
        raise UserError("--data needs --tokenizer: a folder or file, or a hub name such as openai-community/gpt2")
    return corpora.text_corpus(spec, corpora.gpt2_tokenizer(tokenizer), recipe.seq_len, held_out, cache_dir)


def setting(lab: Lab, preset_name: str) -> dict[str, Any]:
    """What every report says about how its figures came about."""
    recipe, counts = lab.recipe, count_parameters(lab.config)
    tokens = recipe.steps * recipe.batch_size * recipe.seq_len
    origin = provenance()
    available = lab.corpus.train.starts.size * recipe.seq_len
    text = (
        f"`{' '.join(origin['command'])}`: preset `{preset_name}` on {origin['device']}, jax "
        f"{origin['versions']['jax']}. Every arm: "
        f"{recipe.steps:,} steps of {recipe.batch_size} x {recipe.seq_len} tokens ({tokens:,} tokens, "
        f"{tokens / available:.2f} passes over "
        f"{available:,}), AdamW, peak learning rate {recipe.learning_rate:g}, {recipe.warmup} steps of warm-up, cosine "
        f"to 0, weight decay {recipe.weight_decay:g}, clip {recipe.clip:g}, dropout {lab.config.dropout:g}, "
        f"{recipe.dtype}; seeds {', '.join(map(str, lab.preset.seeds))}, mean ± standard deviation over them. "
        f"Transformer: {lab.config.layers} layers, width {lab.config.width}, {lab.config.heads} heads, vocabulary "
        f"{lab.config.vocab_size:,}; {counts['tied']:,} parameters with a tied head, {counts['untied']:,} untied, "
        f"gates {counts['gates']:,} of them; trained {'tied' if lab.config.tied else 'untied'}. Held out: "
        f"{lab.scored.size * recipe.seq_len:,} tokens. Distilled gates: {recipe.distill_steps:,} steps, learning rate "
        f"{recipe.distill_learning_rate:g}. Only the `paper` preset on WikiText-103 may be compared with the reported "
        "figures; elsewhere arms may be compared with each other.")
    return {"text": text, "preset": preset_name, **{name: origin[name] for name in ("device", "versions", "revision")},
            "parameters": counts, "tokens_per_arm": tokens, "recipe": dataclasses.asdict(recipe),
            "model": dataclasses.asdict(lab.config), "seeds": list(lab.preset.seeds), "top_k": lab.preset.top_k,
            "corpus": {"fingerprint": lab.corpus.fingerprint, **lab.corpus.description}}


def run(names: Sequence[str], lab: Lab, preset_name: str, out: pathlib.Path) -> list[pathlib.Path]:
    """Run experiments and write their reports as each is done. `OutOfTime` and UserError pass through."""
    written = []
    about = setting(lab, preset_name)
    log.info("%s", about["text"])
    for name in names:
        began = time.monotonic()
        found = EXPERIMENTS[name](lab)
        written += outcome.write(found, about, out)
        print(outcome.markdown(found, about))
        log.info("%s: %.0f s; written to %s", name, time.monotonic() - began, out)
    return written


class _Planned(Exception):
    """The arms that an experiment asks for, in place of their training."""


def arms_of(names: Sequence[str], lab: Lab) -> list[Arm]:
    """The distinct arms of experiments, in their order."""
    def tell(arms):
        raise _Planned(*arms)

    planner = copy.copy(lab)
    planner.prepare = tell
    found: dict[str, Arm] = {}
    for name in names:
        try:
            EXPERIMENTS[name](planner)
        except _Planned as planned:
            for arm in planned.args:
                found.setdefault(lab.key(arm), arm)
    return list(found.values())


def dry_run(names: Sequence[str], lab: Lab) -> str:
    """The arms that experiments need, their tokens over all seeds, and the sum of what is not trained yet."""
    recipe, seeds = lab.recipe, len(lab.preset.seeds)
    tokens, lines, left = recipe.steps * recipe.batch_size * recipe.seq_len * seeds, [], 0
    for arm in arms_of(names, lab):
        trained = lab.is_trained(arm)
        left += not trained
        lines.append(f"{arm.name}: {recipe.steps:,} steps of {recipe.batch_size} x {recipe.seq_len} tokens, {seeds} "
                     f"seeds, learning rate {arm.rate * recipe.learning_rate:.3g}, of the gate "
                     f"{arm.gate_rate * recipe.learning_rate:.3g}; " + ("trained" if trained else f"{tokens:,} tokens"))
    return "\n".join([*lines, f"in all {left} arms to train, {left * tokens:,} tokens"])


def check_names(names: Sequence[str]) -> list[str]:
    """`all` and experiments by name, in the order in which they share the most. UserError for unknown ones."""
    known = [*EXPERIMENTS]
    for name in names:
        if name not in (*known, "all"):
            raise UserError(f"--experiment {name}: unknown; expected all, {', '.join(known)} or l2a_audit")
    return known if "all" in names else [name for name in known if name in names]
