"""The needle as windows: exact match by teacher forcing, with the programs that perplexity has compiled already.

`evaluation.needle` also ranks distractors, which takes a forward pass each. Here only the true answer is scored: its
prompt and answer fill a window whose scored places are the answer's, so that decisions can be forced too, and
`score_windows` does the work. Exact match is the same: every token of the answer is the most likely one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.controls import random_decisions, static_decisions
from l2a_jax.evaluation.loglikelihood import Request
from l2a_jax.evaluation.needle import NeedleOptions, build_prompts
from l2a_jax.evaluation.perplexity import Scores, Windows, routing_rates, score_windows
from l2a_jax.research.replication.windows import of_requests
from l2a_jax.sources import Pretrained


def prepare(model: Pretrained, options: NeedleOptions) -> dict[int, Windows]:
    """Windows by context length, in the order of `build_prompts` (by depth, then seed); `model` needs no parameters."""
    prompts = build_prompts(model, options)
    return {length: of_requests([Request(one.tokens, one.answer_tokens[0]) for one in prompts if one.length == length],
                                length, f"needle in {length} tokens") for length in options.lengths}


def score(model: Pretrained, prepared: dict[int, Windows], options: NeedleOptions, *, controls: bool = False,
          forced: Callable[[Windows], Any] = lambda windows: None, **passes: Any) -> dict[str, Any]:
    """By length: exact match with Wilson's interval, by depth, log-probability of the answer (nats, mean), and the bits
    by depth and seed. With `controls`, of a routed model also under random decisions at each layer's own rate, under a
    static choice of layers of the same density, and with nothing routed. `forced`: decisions of windows in place of the
    router's (None: its own)."""
    out: dict[str, Any] = {"depths": list(options.depths), "seeds": len(options.seeds), "lengths": {}}
    for length, windows in prepared.items():
        learned = score_windows(model, windows, forced(windows), label=f"needle {length}", **passes)
        entry = _entry(learned, len(options.depths))
        if learned.decisions is not None:
            rates = routing_rates(learned.decisions, windows.real)
            entry["sparsity"] = float(1 - rates.mean())
            if controls:
                count = len(windows.tokens)
                chosen = {"random": random_decisions(0, rates, count, length),
                          "static": static_decisions(0, rates, count, length)[0],
                          "none": np.zeros_like(learned.decisions)}
                entry["controls"] = {name: _entry(score_windows(model, windows, decisions, **passes,
                                                                label=f"needle {length}, {name}"),
                                                  len(options.depths)) for name, decisions in chosen.items()}
        out["lengths"][str(length)] = entry
    right = sum(entry["correct"] for entry in out["lengths"].values())
    count = sum(entry["n"] for entry in out["lengths"].values())
    return {**out, "exact_match": right / count, "exact_match_95": list(intervals.share(right, count)), "n": count,
            "correct": right}


def _entry(scores: Scores, depths: int) -> dict[str, Any]:
    exact = scores.correct == scores.tokens
    right, count = int(exact.sum()), len(exact)
    return {"exact_match": right / count, "exact_match_95": list(intervals.share(right, count)), "n": count,
            "correct": right, "by_depth": exact.reshape(depths, -1).mean(axis=1).tolist(),
            "log_probability": float(-scores.nll.mean()), "bits": "".join(str(int(one)) for one in exact)}
