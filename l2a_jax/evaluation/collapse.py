"""The collapse report: is this model still a language model, and what broke if not?

Measured on a few held-out windows and a few prompts: numbers that are not finite (weights, logits), whether later
tokens leak into earlier ones, how the router decides, what the model writes, and training loss beside held-out loss.

"Collapse" is a word for several things: weights that are no numbers, a target that the model can see, text that turns
in circles, a router that stopped deciding. Each has a rule of its own with a threshold in `RULES`, so that a verdict
can be argued with; the first that holds decides. Greedy text is measured but judges nothing: sound small models loop
under greedy decoding too.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2a_jax.errors import UserError
from l2a_jax.evaluation import texts
from l2a_jax.evaluation.columns import VERDICT, Column
from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.evaluation.registry import Work
from l2a_jax.models.transformer import hidden_states, unembed
from l2a_jax.nn import routing
from l2a_jax.shapes import nullable
from l2a_jax.sharding import whole
from l2a_jax.sources import Pretrained, locate, run_source
from l2a_jax.training.diagnose import not_finite
from l2a_jax.training.loss import CHUNK, chunked
from l2a_jax.training.metrics import read_metrics

WINDOWS, LENGTH = 8, 1_024
"""Held-out windows looked at, and tokens of each: enough for counts and means, a few seconds on any device."""
NEW_TOKENS = 96
MAX_PERIOD = 64
TIMES, TOKENS = 3, 16
"""A loop: a unit of at most `MAX_PERIOD` tokens at least `TIMES` times in a row, `TOKENS` tokens in all or more."""
PROMPTS = (
    "The first snow of the year fell on the town during the night, and when the baker opened her door",
    "To find the area of a triangle from the lengths of its three sides, we",
    "def moving_average(values, window):\n    \"\"\"Mean of the last `window` values at every place.\"\"\"\n",
    "Plants take up water through their roots. In the leaves,",
    "My grandfather kept bees. Every spring he would",
    "The committee met on Tuesday to discuss the new bridge. The chair began by",
    "Dear editor, I read your article on night trains with great interest, but",
    "Question: Why do we see lightning before we hear thunder?\nAnswer:",
)
"""Our own beginnings of a story, a proof, code, science, memory, news, a letter and an answer."""


_COMPARE = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}


class Rule(NamedTuple):
    """`verdict` holds where the measure named `measure` compares with `threshold`; a measure not taken says nothing."""

    verdict: str
    measure: str
    compare: str
    threshold: float
    meaning: str

    def holds(self, value: float | None) -> bool:
        """Whether the rule applies. A value that is not a number is out of bounds of every rule."""
        return value is not None and (math.isnan(value) or _COMPARE[self.compare](value, self.threshold))


_WRITTEN = {**{f"{name}?": float for name in ("distinct_1", "distinct_2", "distinct_4", "unigram_entropy",
                                              "ends_in_loop")}, "longest_loop": int}
SHAPE = {"verdict": str, "rule": str, "findings": [str], "not_measured": [str],
         "generation": nullable({"greedy": _WRITTEN, "sampled": _WRITTEN})}
HEALTHY = "healthy"
RULES = (
    Rule("non-finite", "weights_not_finite", ">", 0, "parameters that are NaN or infinite"),
    Rule("non-finite", "logits_not_finite", ">", 0, "logits on held-out text that are NaN or infinite"),
    Rule("non-finite", "training_losses_not_finite", ">", 0, "training steps whose loss was NaN or infinite"),
    Rule("leak", "future_seen", ">", 0.05, "change of the hidden state, as a share of its size, when only later tokens "
         "change: a causal model has none"),
    Rule("leak", "future_routing", ">", 0.01, "share of decisions that change when only later tokens change"),
    Rule("loss-perplexity mismatch", "training_loss", "<", 0.02, "a training loss (nats) that no text allows: a target "
         "that is seen, or NaN logged as zero"),
    Rule("loss-perplexity mismatch", "loss_gap", ">", 1.5, "held-out loss minus training loss, nats: a leak in "
         "training alone, or memorised text"),
    Rule("constant output", "logit_spread", "<", 1e-3, "largest minus smallest logit of a token, mean"),
    Rule("constant output", "top_token_share", ">", 0.9, "share of held-out places where one and the same token is "
         "the likeliest"),
    Rule("worse than chance", "loss_over_uniform", ">=", 1.0, "held-out loss over ln V, that of a uniform guess"),
    Rule("degenerate text", "sampled_ends_in_loop", ">", 0.5, "share of texts sampled at temperature 1 that end in a "
         "loop"),
    Rule("degenerate text", "sampled_distinct_2", "<", 0.3, "different bigrams over all, of texts sampled at "
         "temperature 1"),
    Rule("never routes", "sparsity", ">=", 0.999, "share of decisions that are local"),
    Rule("always routes", "sparsity", "<=", 0.001, "share of decisions that are local"),
)


def judge(measures: Mapping[str, float | None]) -> dict[str, Any]:
    """{"verdict", "rule", "findings", "rules"}: the first rule that holds, all that hold, and the table with what was
    measured. `healthy` where none holds, and then only as far as the rules not measured are listed."""
    table = [{**rule._asdict(), "value": measures.get(rule.measure),
              "holds": rule.holds(measures.get(rule.measure))} for rule in RULES]
    findings = [row for row in table if row["holds"]]
    missing = list(dict.fromkeys(row["measure"] for row in table if row["value"] is None))
    said = "no rule of the table holds" if not findings else (
        "{measure} = {value:.4g} {compare} {threshold:g} ({meaning})".format(**findings[0]))
    return {"verdict": findings[0]["verdict"] if findings else HEALTHY, "rule": said,
            "findings": list(dict.fromkeys(row["verdict"] for row in findings)), "not_measured": missing,
            "rules": table}


def collapse(
    model: Pretrained,
    windows: Windows,
    *,
    prompts: Sequence[Sequence[int]],
    stop_tokens: Sequence[int] = (),
    records: Sequence[dict[str, Any]] = (),
    new_tokens: int = NEW_TOKENS,
    seed: int = 0,
    backend: str = "auto",
) -> dict[str, Any]:
    """The report of a model, whatever its state; nothing that is not finite raises here.

    `windows`: held-out text, of which the first few are looked at. `prompts`: token ids to continue. `records`: the
    run's `metrics.jsonl`, where the model comes from one.
    """
    weights = {path: int(counts.sum()) for path, counts in not_finite(model.params).items()}
    text = text_measures(model, windows, backend)
    training = training_measures(records)
    report: dict[str, Any] = {"weights_not_finite": weights, "text": text, "training": training, "generation": None}
    if weights:
        report["not_generated"] = "the weights are not finite"
    else:
        report["generation"] = generation_measures(model, prompts, stop_tokens, new_tokens, seed, backend)
    sampled = (report["generation"] or {}).get("sampled", {})
    held_out = training.get("held_out_loss", text["loss"])
    gap = None if training.get("loss") is None or held_out is None else held_out - training["loss"]
    pruned = model.l2a_config is not None and len(model.l2a_config.pruned_layers) == model.config.num_layers
    measures = {
        "weights_not_finite": sum(weights.values()), "logits_not_finite": text["logits_not_finite"],
        "training_losses_not_finite": training.get("not_finite"), "future_seen": text["future_seen"],
        "future_routing": text["future_routing"], "training_loss": training.get("loss"), "loss_gap": gap,
        "logit_spread": text["logit_spread"], "top_token_share": text["top_token_share"],
        "loss_over_uniform": None if text["loss"] is None else text["loss"] / math.log(model.config.vocab_size),
        "sampled_ends_in_loop": sampled.get("ends_in_loop"), "sampled_distinct_2": sampled.get("distinct_2"),
        "sparsity": None if pruned else text["sparsity"],  # a layer cut off on purpose is no verdict on its router
    }
    return {**judge(measures), **report}


def text_measures(model: Pretrained, windows: Windows, backend: str = "auto") -> dict[str, Any]:
    """Loss, logits, routing and causality on the first windows; a number that cannot be had is None."""
    rows, length = min(WINDOWS, len(windows.tokens)), min(LENGTH, windows.tokens.shape[1])
    tokens, targets, real = (x[:rows, :length] for x in (windows.tokens, windows.targets, windows.real))
    options = (model.config, model.l2a_config, backend)
    found = jax.device_get(_probe(model.params, tokens, targets, real, *options))
    count = int(real.sum())
    top = found["top"][real]
    finite = int(found["not_finite"][real].sum())
    out = {
        "windows": rows, "length": length, "tokens": count, "name": windows.about.get("name"),
        "logits_not_finite": finite,
        "loss": _number(found["nll"][real].mean(dtype=np.float64)),
        "logit_spread": _number(found["spread"][real].mean()),
        "predictive_entropy": _number(found["entropy"][real].mean()),
        "top_token_share": float(np.bincount(top).max() / count),
        "sparsity": None, "sparsity_per_layer": None, "router_entropy_per_layer": None,
        "future_seen": None, "future_routing": None,
    }
    if found["decisions"] is not None:
        sparsity = (~found["decisions"] & real).sum(axis=(1, 2)) / real.sum()
        out |= {"sparsity": float(sparsity.mean()), "sparsity_per_layer": sparsity,
                "router_entropy_per_layer": found["router_entropy"]}
    half = length // 2
    if half and not finite:
        other = tokens.copy()
        other[:, half:] = (tokens[:, half:] + 1 + np.arange(length - half)) % model.config.vocab_size
        forced = jax.device_get(_hidden(model.params, other, found["decisions"], *options))
        before = np.asarray(found["hidden"], np.float64)[:, :half]
        change = np.linalg.norm(np.asarray(forced[0], np.float64)[:, :half] - before, axis=-1)
        out["future_seen"] = _number(np.max(change / np.maximum(np.linalg.norm(before, axis=-1), 1e-30)))
        if found["decisions"] is not None:
            free = jax.device_get(_hidden(model.params, other, None, *options)[1])
            out["future_routing"] = float((free != found["decisions"])[:, :, :half].mean())
    return out


def generation_measures(model: Pretrained, prompts: Sequence[Sequence[int]], stop_tokens: Sequence[int],
                        new_tokens: int, seed: int, backend: str) -> dict[str, Any]:
    """Repetition of greedy text and of text sampled at temperature 1, with the texts."""
    from l2a_jax.inference.generate import generate

    out: dict[str, Any] = {"prompts": len(prompts), "new_tokens": new_tokens, "seed": seed}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        made = jax.device_get(generate(
            model.params, model.config, model.l2a_config, prompts, max_new_tokens=new_tokens, temperature=temperature,
            key=jax.random.key(seed) if temperature else None, stop_tokens=tuple(stop_tokens), backend=backend))
        texts = [row[:length].tolist() for row, length in zip(made.tokens, made.lengths, strict=True)]
        own = np.concatenate([row[:length] for row, length in zip(made.log_probabilities, made.lengths, strict=True)])
        out[name] = {**repetition(texts), "not_finite": int((~made.finite).sum()),
                     "own_perplexity": float(np.exp(-own.mean(dtype=np.float64))) if own.size else None}
        if model.tokenizer is not None:
            out[name]["texts"] = [model.tokenizer.decode(text) for text in texts]
    return out


class Loop(NamedTuple):
    """`length` tokens from `start` on that repeat with `period`; 0 tokens where there is no loop."""

    start: int
    length: int
    period: int


def distinct(tokens: Sequence[int], n: int) -> float | None:
    """Different n-grams over all n-grams (Li et al., 2016); None for a text shorter than n."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Entropy of the text's own token frequencies, in nats: 0 for one token over and over."""
    counts = np.array(list(Counter(tokens).values()), np.float64)
    return float(-(counts / counts.sum() * np.log(counts / counts.sum())).sum()) if len(counts) else 0.0


def longest_loop(tokens: Sequence[int]) -> Loop:
    """The longest loop anywhere in the text, its shortest period first."""
    return max(_loops(tokens), key=lambda loop: (loop.length, -loop.period), default=Loop(0, 0, 0))


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether a loop reaches the end of the text, its last unit perhaps unfinished."""
    return any(loop.start + loop.length == len(tokens) for loop in _loops(tokens))


def _loops(tokens):
    x = np.asarray(tokens)
    for period in range(1, min(MAX_PERIOD, len(x) // TIMES) + 1):
        same = np.concatenate([[False], x[period:] == x[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1]).reshape(-1, 2)
        for begin, end in edges:  # x[begin : end + period] repeats with this period
            length = int(end - begin) + period
            if length >= max(TIMES * period, TOKENS):
                yield Loop(int(begin), length, period)


def repetition(generations: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The means over generations (those long enough for each number; None where none is)."""

    def mean(values):
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    usable = [tokens for tokens in generations if len(tokens) >= TOKENS]
    return {
        "generations": len(generations), "too_short": len(generations) - len(usable),
        "mean_length": mean([len(tokens) for tokens in generations]),
        **{f"distinct_{n}": mean([distinct(tokens, n) for tokens in usable]) for n in (1, 2, 3, 4)},
        "unigram_entropy": mean([unigram_entropy(tokens) for tokens in usable]),
        "longest_loop": max((longest_loop(tokens).length for tokens in usable), default=0),
        "ends_in_loop": mean([float(ends_in_loop(tokens)) for tokens in usable]),
        "loop_rule": f"a unit of up to {MAX_PERIOD} tokens {TIMES} times or more, {TOKENS} tokens in all or more",
    }


def training_measures(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The loss at the end of training (mean of the last 5 % of steps), the run's own last held-out loss, and the steps
    whose loss was not finite; empty where there are no records."""
    losses = [float(record["loss"]) for record in records]
    if not losses:
        return {}
    held_out = [float(record["held_out_loss"]) for record in records if "held_out_loss" in record]
    out = {"steps": len(losses), "loss": float(np.mean(losses[-max(1, len(losses) // 20):])),
           "not_finite": int(np.sum(~np.isfinite(losses)))}
    return out | ({"held_out_loss": held_out[-1]} if held_out else {})


def columns(name: str) -> tuple[Column, ...]:
    return (Column("verdict", "verdict", VERDICT, str, lambda entry, other, say: entry["verdict"],
                   lambda cell, versus: cell or "-", always=True),)


def task(work: Work) -> dict[str, Any]:
    model, source = work.model, work.options.source
    if work.mesh is not None:  # a few windows and prompts, and texts that are drawn: one device's work
        model = model._replace(params=whole.alone(model.params))
    run = run_source(locate(source))
    records = [] if run is None else read_metrics(run.folder / "metrics.jsonl")
    if texts.speaks_recall(model.tokenizer):  # its words are the corpus's: prompts are the beginnings of held-out rows
        prompts, stops = [row[:24].tolist() for row in work.windows.tokens[:8]], ()
    elif model.tokenizer is None:
        raise UserError(f"{source} has no tokenizer, which collapse needs for its prompts")
    else:
        prompts = model.tokenizer.encode_batch(list(PROMPTS), add_special_tokens=False)
        stops = model.tokenizer.end_ids
    return collapse(model, work.windows, prompts=prompts, stop_tokens=stops, records=records,
                    seed=work.options.seed, backend=work.options.backend)


def told(report: dict[str, Any]) -> str:
    """The report as a few lines."""
    lines = [f"verdict: {report['verdict']} - {report['rule']}"]
    if len(report["findings"]) > 1:
        lines.append(f"also: {', '.join(report['findings'][1:])}")
    if report["not_measured"]:
        lines.append(f"not measured: {', '.join(report['not_measured'])}")
    for name in ("greedy", "sampled") if report["generation"] else ():
        row = report["generation"][name]
        shown = ", ".join(f"{key.replace('_', ' ')} {row[key]:.2f}" for key in _SHOWN if row.get(key) is not None)
        lines.append(f"{name} text: {shown}, longest loop {row['longest_loop']} tokens")
    return "\n".join(lines)


_SHOWN = ("distinct_1", "distinct_2", "distinct_4", "unigram_entropy", "ends_in_loop")


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _hidden(params, tokens, decisions, config, l2a_config, backend):
    hidden, routed = hidden_states(params, tokens, config, l2a_config, decisions=decisions, backend=backend)
    return hidden.astype(jnp.float32), None if routed is None else routed.decisions


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _probe(params, tokens, targets, real, config, l2a_config, backend):
    """Per token: nats, spread, entropy, likeliest token, logits not finite; and the hidden states and routing."""
    hidden, routed = hidden_states(params, tokens, config, l2a_config, backend=backend)

    def look(inputs):
        rows, target = inputs
        logits = unembed(params, rows[None], config)[0]
        log_p = jax.nn.log_softmax(logits)
        return {"nll": -jnp.take_along_axis(log_p, target[:, None], axis=-1)[:, 0],
                "spread": logits.max(axis=-1) - logits.min(axis=-1),
                "entropy": -jnp.sum(jnp.exp(log_p) * log_p, axis=-1),
                "top": jnp.argmax(logits, axis=-1), "not_finite": jnp.sum(~jnp.isfinite(logits), axis=-1)}

    chunks = (chunked(hidden.reshape(-1, hidden.shape[-1]), CHUNK), chunked(targets.reshape(-1), CHUNK))
    seen = jax.tree.map(lambda x: x.reshape(-1)[: tokens.size].reshape(tokens.shape), jax.lax.map(look, chunks))
    return {**seen, "hidden": hidden.astype(jnp.float32), "decisions": None if routed is None else routed.decisions,
            "router_entropy": None if routed is None else routing.entropy(routed.probabilities, real)}
