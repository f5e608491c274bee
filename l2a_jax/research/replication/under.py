"""Trained under one kind of decisions, evaluated under the others: does attention absorb whatever it was trained with?

The kinds are the learned decisions, decisions drawn once for every place of a row ("frozen"), whole layers ("static"),
coins tossed anew ("random"), everything and nothing, all but the last two at the same rates. Rows of one comparison
take the same decisions of each kind over the same windows, so that their weights are compared window by window: a
row whose router learned leaves its decisions beside its file, where the others find them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from l2a_jax.errors import UserError
from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.controls import random_decisions, static_rates
from l2a_jax.evaluation.perplexity import Scores, Windows, routing_rates, score_windows
from l2a_jax.files import whole
from l2a_jax.sources import Pretrained
from l2a_jax.training.settings import Settings
from l2a_jax.training.step import forced_decisions


def static_shares(rates: tuple[float, ...]) -> tuple[float, ...]:
    """The shares of whole layers, those of the highest rates first, that route as much as these rates."""
    return tuple(round(share, 4) for share in static_rates(np.array(rates), sum(rates)).tolist())


def drawn(shares: Sequence[float], run: Settings, count: int, length: int) -> Bool[np.ndarray, "L B T"]:
    """The decisions that a training run at these shares would force on the first `length` places of its rows."""
    if length > run.seq_len:
        raise UserError(f"decisions are drawn for the {run.seq_len} places of a row of training; windows of {length} "
                        "tokens have more")
    found = forced_decisions(jax.random.key(run.seed), jnp.array(shares, jnp.float32), (count, run.seq_len))
    return np.asarray(found)[..., :length]


def choices(rates: tuple[float, ...], run: Settings, learned: Bool[np.ndarray, "L B T"]
            ) -> dict[str, Bool[np.ndarray, "L B T"]]:
    """Every kind of decisions by name, for weights of a run: its own frozen ones, or those of a run of its seed."""
    if len(rates) != len(learned):
        raise UserError(f"under: there are {len(rates)} rates for {len(learned)} layers")
    shape = learned.shape[1:]
    return {"learned": learned, "frozen": drawn(rates, run, *shape), "static": drawn(static_shares(rates), run, *shape),
            "random": random_decisions(run.seed, np.array(rates), *shape), "all": np.ones_like(learned),
            "none": np.zeros_like(learned)}


def under(model: Pretrained, windows: Windows, own: Scores, decisions: dict[str, Bool[np.ndarray, "L B T"]],
          **passes: Any) -> dict[str, Any]:
    """By kind: nats a token with each window's sum, the share routed, and how much worse than under the decisions that
    the weights were trained with (`own`: that pass)."""
    rows = {}
    for name, chosen in decisions.items():
        scores = score_windows(model, windows, chosen, label=f"under {name} decisions", **passes)
        worse, interval = intervals.paired_windows(scores.nll, own.nll, own.tokens)
        rows[name] = {"nll": float(scores.nll.sum() / own.tokens.sum()), "window_nll": np.round(scores.nll, 4),
                      "density": float(routing_rates(scores.decisions, windows.real).mean()), "worse": worse,
                      "worse_95": list(interval)}
    return {"rows": rows, "own": float(own.nll.sum() / own.tokens.sum()), "window_tokens": own.tokens,
            "text": windows.about}


def keep(decisions: Bool[np.ndarray, "L B T"], path: Path) -> None:
    """Write a row's decisions for the others."""
    with whole(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, bits=np.packbits(decisions), shape=decisions.shape)


def kept(path: Path, shape: tuple[int, ...], row: str) -> Bool[np.ndarray, "L B T"]:
    """The decisions that `row` has left. UserError where it has not, or over other windows."""
    if not path.exists():
        raise UserError(f"{path} is missing: these are the decisions of {row}; run --rows {row} into this --out first, "
                        "without its file if that is there already")
    try:
        with np.load(path) as file:
            found, bits = tuple(file["shape"].tolist()), file["bits"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} does not hold the decisions of {row} ({error}); move it away and run {row} again"
                        ) from error
    if found != shape:
        raise UserError(f"{path} holds decisions of [L, B, T] = {found}; expected {shape}: move it away and run {row} "
                        "again")
    return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool)
