"""Needle in a haystack: does a model find one sentence in a long text, by context length and depth?

Every prompt is built from tokens to an exact length, the answer's tokens included. It is scored in two ways, because
a small base model may know and not say it: would greedy decoding write the answer, and how does the answer's
log-probability rank among other codes of the same form?

Both come from teacher forcing. Greedy decoding writes a given answer exactly if at each of its positions, after the
answer so far, its next token is the most likely one; so one forward pass decides it and no cache is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from l2a_jax import fields
from l2a_jax.config import position_limit
from l2a_jax.data import recall
from l2a_jax.data.encoder import check_ids
from l2a_jax.errors import Missing, UserError, needs
from l2a_jax.evaluation import intervals, texts
from l2a_jax.evaluation.columns import CELL, SCORE, Column, interval
from l2a_jax.evaluation.loglikelihood import Request, log_likelihoods
from l2a_jax.evaluation.needle_text import (
    ADJECTIVES,
    PLACES,
    RECALL,
    SURPLUS,
    CodeForm,
    Haystack,
    RecallForm,
    recall_haystack,
    text_haystack,
)
from l2a_jax.evaluation.options import Generate, Hay, Lengths, NeedleFlags, Needles
from l2a_jax.evaluation.registry import Work
from l2a_jax.fields import SEED, Distinct, between, check_given
from l2a_jax.files import whole
from l2a_jax.shapes import at_least, share, some
from l2a_jax.sharding.mesh import axes_of
from l2a_jax.sources import Pretrained

log = logging.getLogger("l2a_jax.eval")
MOST_PROMPTS = 100_000
SHAPE = {"lengths": some(at_least(1)), "depths": some(share), "exact_match": [[share]], "ranked_first": [[share]],
         "distractors": at_least(1), "needles": int, "per_cell": int,
         "overall": {"n": at_least(1), "exact_match": share, "exact_match_stderr": float, "ranked_first": share,
                     "mean_rank": float}}
LENGTHS = {"exact_match": "depths", "ranked_first": "depths"}
RECALL_LENGTHS = (64, 128, 256)
"""What the embedded model, trained on rows of 128 tokens, can be asked."""
PANELS = {"exact_match": "greedy output is the answer\n{mean:.0%}",
          "ranked_first": "answer is the likeliest of {n}\n{mean:.0%} (chance {chance:.0%})"}


def spread(depths: int) -> tuple[float, ...]:
    """So many depths, from the beginning to the end."""
    return tuple(np.linspace(0, 1, depths).tolist())


@dataclass(frozen=True)
class NeedleOptions:
    """The grid and what is hidden in it.

    `lengths`: tokens of a context, the answer's included. `depths`: where the needle is, 0 before and 1 after all hay.
    `seeds`: one prompt a cell for each: other hay, key and answer. `needles`: facts in a context; one is asked for and
    lies at the cell's depth, the others lie anywhere. `digits` of a code. `distractors`: wrong answers the true one is
    ranked against (the facts not asked for among them); each costs one more forward pass. `haystack`: files, folders
    or globs of text, or `recall`, the synthetic corpus; records with the same `join` field, one after another, are one
    document. `generate`: so many prompts, spread over the grid, are also continued by real decoding, to be read.
    """

    lengths: Lengths = NeedleFlags.needle_lengths
    depths: Annotated[tuple[Annotated[float, between(0, 1)], ...], Distinct()] = spread(NeedleFlags.needle_depths)
    seeds: Annotated[tuple[Annotated[int, SEED], ...], Distinct()] = tuple(range(NeedleFlags.needle_seeds))
    needles: Needles = NeedleFlags.needle_needles
    digits: Annotated[int, between(1, 18)] = 5
    distractors: Annotated[int, between(1, 1_000)] = 7
    haystack: Hay = NeedleFlags.haystack
    join: str | None = "source"
    generate: Generate = NeedleFlags.needle_generate

    def __post_init__(self):
        fields.check(self, spell=lambda name: f"needle {name}")
        prompts = len(self.lengths) * len(self.depths) * len(self.seeds)
        if prompts > MOST_PROMPTS:
            raise UserError(f"the needle grid of {len(self.lengths)} lengths, {len(self.depths)} depths and "
                            f"{len(self.seeds)} seeds has {prompts:,} prompts; expected at most {MOST_PROMPTS:,}")
        if RECALL in self.haystack and len(self.haystack) > 1:
            raise UserError(f"the haystack {RECALL} cannot be mixed with files; got {', '.join(self.haystack)}")
        words = RECALL in self.haystack
        wrong, most = self.needles + self.distractors, 9 * 10 ** (self.digits - 1)
        if not words and wrong > most:
            raise UserError(f"codes of {self.digits} digits are only {most}; {wrong} different ones were asked for")
        keys = len(recall.SUBJECTS) if words else len(ADJECTIVES) * len(PLACES)
        if self.needles > keys:
            raise UserError(f"needle needles is {self.needles}; there are only {keys} keys")


def make_options(given: dict[str, Any], model: Pretrained) -> NeedleOptions:
    """NeedleOptions from the flags, where `depths` and `seeds` are counts; `model` needs no parameters yet.

    Builds the prompts once, so that an empty haystack or a context too long raises UserError before anything is
    computed.
    """
    fields = dict(given)
    check_given({f"needle_{name}": fields[name] for name in ("depths", "seeds") if name in fields}, NeedleFlags)
    if texts.speaks_recall(model.tokenizer) and "haystack" not in fields:
        log.info("no --haystack: needles are hidden in the synthetic recall corpus, whose words this model speaks")
        fields.setdefault("lengths", RECALL_LENGTHS)
    if "depths" in fields:
        fields["depths"] = spread(fields["depths"])
    if "seeds" in fields:
        fields["seeds"] = tuple(range(fields["seeds"]))
    options = NeedleOptions(**{name: tuple(value) if isinstance(value, list) else value for name, value in
                               fields.items()})
    build_prompts(model, options)
    return options


def prepare(name: str, options: Any, model: Pretrained) -> NeedleOptions:
    return make_options(options.needle, model)


def writes(name: str, options: Any, prepared: NeedleOptions, path: Path) -> list[str]:
    return [picture(path).name]


def task(work: Work) -> dict[str, Any]:
    found = evaluate_needle(work.model, work.prepared, backend=work.options.backend, mesh=work.mesh)
    drawn = picture(work.path)
    try:
        draw_heat_map(found, drawn)
    except Missing as lacking:
        log.warning("no %s: %s", drawn.name, lacking)
        return found
    return {**found, "heat_map": drawn.name}


def columns(name: str) -> tuple[Column, ...]:
    return (Column("needle", "needle", SCORE, {**CELL, "lengths": some(int)}, _cell, lambda cell, versus: interval(
        cell, f"n={cell['n']}, to {max(cell['lengths'])}", 100, 0), str, always=True),)


def _cell(entry: dict[str, Any], other: Any, say: Any) -> dict[str, Any]:
    value, count = entry["overall"]["exact_match"], entry["overall"]["n"]
    return {"value": value, "interval": list(intervals.share(value * count, count)), "n": count,
            "ranked_first": entry["overall"]["ranked_first"], "lengths": entry["lengths"]}


def picture(results: Path) -> Path:
    """Where the heat map goes."""
    return results.with_name(results.stem.replace("eval", "needle", 1) + ".png")


class Prompt(NamedTuple):
    """A context of exactly `length` tokens when the longest answer is added, and what may follow it."""

    length: int
    depth: float
    seed: int
    key: str
    tokens: list[int]
    answers: list[str]
    """The true one first."""
    answer_tokens: list[list[int]]
    position: int
    """Where the asked-for needle begins, in tokens."""


def evaluate_needle(model: Pretrained, options: NeedleOptions, *, backend: str = "auto",
                    mesh: Mesh | None = None) -> dict[str, Any]:
    """The grid's scores in JSON types: `exact_match`, `ranked_first`, `mean_rank` and `log_probability` as lists over
    depths of lists over lengths, `overall`, and every prompt's own under `prompts`.

    A rank is 1 where the true answer is more likely than every distractor; one of n at random has rank (n + 1) / 2.

    Raises UserError on an empty or too short haystack, lengths beyond the model's positions or too short for the
    question, and a model without a tokenizer.
    """
    prompts = build_prompts(model, options)
    requests = [Request(prompt.tokens, tokens) for prompt in prompts for tokens in prompt.answer_tokens]
    scores = log_likelihoods(model, requests, backend=backend, mesh=mesh, label="needle")
    rows, at = [], 0
    for prompt in prompts:
        mine = slice(at, at + len(prompt.answers))
        at = mine.stop
        log_p = scores.log_probabilities[mine]
        rows.append({
            "length": prompt.length, "depth": prompt.depth, "seed": prompt.seed, "key": prompt.key,
            "answer": prompt.answers[0], "position": prompt.position, "exact_match": bool(scores.greedy[mine][0]),
            "rank": 1 + int((log_p[1:] >= log_p[0]).sum()), "log_probability": float(log_p[0]),
            "best_distractor": prompt.answers[1 + int(log_p[1:].argmax())],
            "best_distractor_log_probability": float(log_p[1:].max()),
        })
    result = {
        "lengths": list(options.lengths), "depths": list(options.depths), "seeds": list(options.seeds),
        "needles": options.needles, "distractors": len(prompts[0].answers) - 1, "haystack": list(options.haystack),
        "chance_ranked_first": 1 / len(prompts[0].answers), "answer_tokens": len(prompts[0].answer_tokens[0]),
        "method": "teacher forcing",
        **{name: _grid(rows, options, field) for name, field in _GRIDS.items()},
        "per_cell": len(options.seeds), "overall": _overall(rows), "prompts": rows,
    }
    if options.generate:
        result["generated"] = _generated(model, prompts, options, backend, mesh)
    return result


_GRIDS = {"exact_match": lambda row: row["exact_match"], "ranked_first": lambda row: row["rank"] == 1,
          "mean_rank": lambda row: row["rank"], "log_probability": lambda row: row["log_probability"]}


def _grid(rows, options, field) -> list[list[float]]:
    return [[float(np.mean([field(row) for row in rows if row["depth"] == depth and row["length"] == length]))
             for length in options.lengths] for depth in options.depths]


def _overall(rows) -> dict[str, Any]:
    """Shares over all prompts with their standard errors, which count the prompts as independent."""
    out: dict[str, Any] = {"n": len(rows)}
    for name in ("exact_match", "ranked_first"):
        share = float(np.mean([_GRIDS[name](row) for row in rows]))
        out |= {name: share, f"{name}_stderr": float(np.sqrt(share * (1 - share) / len(rows)))}
    return out | {"mean_rank": float(np.mean([row["rank"] for row in rows]))}


def build_prompts(model: Pretrained, options: NeedleOptions) -> list[Prompt]:
    """The prompts of the grid, by length, depth and seed; see `evaluate_needle` for the errors.

    A seed draws the same facts at every depth of a length and cuts the same hay, so that depths differ in depth alone.
    """
    limit = position_limit(model.config, model.l2a_config)
    if max(options.lengths) > limit:
        raise UserError(f"a needle context of {max(options.lengths)} tokens is longer than the model's positions, "
                        f"which end at {limit}; expected lengths up to that")
    if model.tokenizer is None:
        raise UserError("the model has no tokenizer, which the needle test needs")
    if options.haystack == (RECALL,):
        if model.tokenizer.get_vocab() != recall.IDS:
            raise UserError(f"the haystack {RECALL} needs a model of the recall corpus's vocabulary; give files or "
                            "folders of text for this one")
        form: CodeForm | RecallForm = RecallForm(model.tokenizer)
        hay = recall_haystack(SURPLUS * max(options.lengths))
    else:
        form = CodeForm(model.tokenizer, options.digits)
        hay = text_haystack(options.haystack, model.tokenizer, max(options.lengths), options.join)
    prompts = [_prompt(form, hay, options, length, depth, seed)
               for length in options.lengths for depth in options.depths for seed in options.seeds]
    for prompt in prompts:
        for ids in (prompt.tokens, *prompt.answer_tokens):
            check_ids(ids, model.config.vocab_size, f"the haystack {', '.join(options.haystack)}")
    return prompts


def _prompt(form: CodeForm | RecallForm, hay: Haystack, options: NeedleOptions, length: int, depth: float,
            seed: int) -> Prompt:
    rng = np.random.default_rng((seed, length))
    facts, wrong = form.draw(rng, options.needles, options.distractors)
    key, answer = facts[0]
    answers = [answer, *([other for _, other in facts[1:]] + wrong)[: options.distractors]]
    answer_tokens = [form.answer(key, one) for one in answers]
    if not all(answer_tokens):
        raise UserError(f"the tokenizer leaves the answer {answers[answer_tokens.index([])]!r} no token of its own, so "
                        "there is nothing to find")
    budget = max(len(tokens) for tokens in answer_tokens)
    needles = [form.needle(*fact) for fact in facts]
    question = form.question(key)
    room = length - len(form.opening) - len(question) - budget - sum(map(len, needles))
    if room < 0:
        raise UserError(f"a needle context of {length} tokens is too short: the question, {options.needles} needle(s) "
                        f"and the answer alone need {length - room}")
    straw, places = hay.cut(room, rng)
    others = rng.random(options.needles - 1)
    at = [int(places[np.abs(places - one * room).argmin()]) for one in (depth, *others)]
    pieces: list[int] = []
    previous, position = 0, 0
    for place, index in sorted(zip(at, range(len(at)), strict=True)):
        pieces += straw[previous:place].tolist()
        if index == 0:
            position = len(form.opening) + len(pieces)
        pieces += needles[index]
        previous = place
    tokens = [*form.opening, *pieces, *straw[previous:].tolist(), *question]
    return Prompt(length, depth, seed, key, tokens, answers, answer_tokens, position)


def _generated(model: Pretrained, prompts: Sequence[Prompt], options: NeedleOptions, backend: str,
               mesh: Mesh | None) -> list[dict]:
    """What decoding really writes after some of the prompts, the same number of each length where possible. One at a
    time, or one on each device."""
    from l2a_jax.inference.generate import generate

    chosen = [prompts[int(index)] for index in np.linspace(0, len(prompts) - 1, min(options.generate, len(prompts)))]
    out, written, rows = [], [], axes_of(mesh).data
    for start in range(0, len(chosen), rows):
        together = chosen[start : start + rows]
        counts = [len(prompt.answer_tokens[0]) for prompt in together]
        result = generate(model.params, model.config, model.l2a_config, [prompt.tokens for prompt in together],
                          max_new_tokens=max(counts), stop_tokens=model.tokenizer.end_ids, backend=backend, mesh=mesh)
        written += [tokens[: min(length, count)].tolist() for tokens, length, count in
                    zip(*jax.device_get((result.tokens, result.lengths)), counts, strict=True)]
    for prompt, tokens in zip(chosen, written, strict=True):
        out.append({"length": prompt.length, "depth": prompt.depth, "seed": prompt.seed, "answer": prompt.answers[0],
                    "written": model.tokenizer.decode(tokens), "exact_match": tokens == prompt.answer_tokens[0]})
    return out


def told(result: dict[str, Any]) -> str:
    """Exact match and, in brackets, the share ranked first, in per cent: a row a depth, a column a length."""
    lengths, depths = result["lengths"], result["depths"]
    overall, answers = result["overall"], result["distractors"] + 1
    lines = [f"needle: exact match % (ranked first of {answers} %, chance {1 / answers:.0%}), {result['per_cell']} "
             f"prompts a cell, {result['needles']} needle(s)",
             f"{'depth':>6}" + "".join(f"{length:>14,}" for length in lengths)]
    for depth, exact, first in zip(depths, result["exact_match"], result["ranked_first"], strict=True):
        cells = (f"{100 * a:.0f} ({100 * b:.0f})" for a, b in zip(exact, first, strict=True))
        lines.append(f"{depth:>6.0%}" + "".join(f"{cell:>14}" for cell in cells))
    lines.append(f"all: exact match {overall['exact_match']:.1%} ± {overall['exact_match_stderr']:.1%}, ranked first "
                 f"{overall['ranked_first']:.1%}, mean rank {overall['mean_rank']:.2f}, n = {overall['n']}")
    return "\n".join(lines)


def draw_heat_map(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: a panel for each way of scoring, dark for 0 % and light for 100 %, the share in every cell."""
    figure_of = needs("matplotlib.figure", "eval", "a heat map").Figure
    lengths, depths, answers = result["lengths"], result["depths"], result["distractors"] + 1
    width, height = 1.6 + 0.75 * len(lengths), 1.9 + 0.42 * len(depths)
    figure = figure_of(figsize=(2 * max(width, 3.6), max(height, 2.6)), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        grid = np.asarray(result[name])
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for (row, column), found in np.ndenumerate(grid):
            axis.text(column, row, f"{100 * found:.0f}", ha="center", va="center", fontsize=13,
                      color="black" if found > 0.5 else "white")
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.set_xlabel("context length (tokens)")
        axis.set_title(title.format(n=answers, mean=np.mean(grid), chance=1 / answers), fontsize=10)
    axes[0].set_ylabel("needle depth")
    figure.colorbar(image, ax=axes, label="share of prompts", ticks=[0, 0.5, 1])
    figure.suptitle(f"{result['overall']['n']} prompts, {result['per_cell']} a cell, {result['needles']} needle(s)",
                    fontsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        figure.savefig(partial, format="png")
