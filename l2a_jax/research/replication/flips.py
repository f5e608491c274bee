"""Routing noise: perplexity as a share of a trained router's decisions is inverted.

    independent  every decision of a real token is inverted with the same probability: at a sparsity above one half
                 this routes more tokens, so noise and a higher rate come together
    matched      in each layer and window as many routed tokens are closed as closed ones are routed: the rate stays,
                 only the choice suffers; the share that can be swapped is at most twice the rarer kind's

Layers that are pruned route nothing and are left alone. For training with noise see `L2AConfig.flip`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray

from l2a_jax.errors import UserError
from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.perplexity import Scores, Windows, score_windows
from l2a_jax.evaluation.subject import check_routed
from l2a_jax.nn import routing
from l2a_jax.sources import Pretrained

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
KINDS = ("independent", "matched")


def flip_matched(key: PRNGKeyArray, decisions: Bool[Array, " T"], real: Bool[Array, " T"],
                 share: Any) -> Bool[Array, " T"]:
    """One row's decisions with `share` of the real ones swapped: half of them on to off, as many off to on."""
    noise = jax.random.uniform(key, decisions.shape)
    on, off = decisions & real, ~decisions & real
    swaps = jnp.minimum(jnp.round(share * jnp.sum(real) / 2), jnp.minimum(jnp.sum(on), jnp.sum(off)))

    def first(where):  # the `swaps` places of `where` with the least noise
        return where & (jnp.argsort(jnp.argsort(jnp.where(where, noise, 2.0))) < swaps)

    return decisions ^ (first(on) | first(off))


def flipped_decisions(seed: int, decisions: Bool[np.ndarray, "L B T"], real: Bool[np.ndarray, "B T"], share: float,
                      kind: str, pruned: Sequence[int] = ()) -> Bool[np.ndarray, "L B T"]:
    """Decisions with a share inverted as the module says; a window's draw depends on the seed and its index alone.

    Raises UserError on a share outside 0 to 1 or an unknown kind.
    """
    if not 0 <= share <= 1:
        raise UserError(f"the share of decisions to flip is {share}; expected 0 to 1")
    if kind not in KINDS:
        raise UserError(f"flips are {kind!r}; expected one of {', '.join(KINDS)}")
    able = np.broadcast_to(real, decisions.shape).copy()
    able[list(pruned)] = False
    return np.asarray(_flip(jax.random.key(seed), decisions, able, share, kind == "matched"))


def flip_sweep(model: Pretrained, windows: Windows, learned: Scores, *, shares: Sequence[float] = SHARES,
               kinds: Sequence[str] = KINDS, seeds: int = 2, **passes: Any) -> dict[str, Any]:
    """Rows of {kind, share, flipped (as drawn), density, perplexity, worse (nats a token, mean over seeds), worse_95
    (paired over windows), perplexity_by_seed}, where `learned` is the router's own pass over `windows`; `passes` are
    options of `score_windows`.

    Raises UserError for a plain model.
    """
    check_routed(learned.decisions, "flips")
    pruned, layers = model.l2a_config.pruned_layers, learned.decisions.shape[0]
    able = windows.real.sum() * (layers - len(pruned))
    rows = []
    for kind, share in itertools.product(kinds, shares):
        drawn = [flipped_decisions(seed, learned.decisions, windows.real, share, kind, pruned) for seed in range(seeds)]
        scores = [score_windows(model, windows, decisions, label=f"{kind} flips of {share:.0%}, seed {seed}", **passes)
                  for seed, decisions in enumerate(drawn)]
        flipped = np.mean([(decisions != learned.decisions).sum() / able for decisions in drawn])
        rows.append({"kind": kind, "share": share, "flipped": float(flipped), **_row(scores, learned, windows)})
    return {"learned": _row([learned], learned, windows), "rows": rows, "seeds": seeds, "text": windows.about,
            "interval": "normal over windows, paired with the learned row; nats per token"}


def format_flips(report: dict[str, Any]) -> str:
    """The sweep as a text table."""
    lines = [f"{'flips':<12} {'share':>6} {'flipped':>8} {'routed':>7} {'perplexity':>11} {'worse, nats [95 %]':>28}"]
    for row in ({"kind": "none", "share": 0.0, "flipped": 0.0, **report["learned"]}, *report["rows"]):
        low, high = row["worse_95"]
        lines.append(f"{row['kind']:<12} {row['share']:>6.0%} {row['flipped']:>8.1%} {row['density']:>7.1%} "
                     f"{row['perplexity']:>11.3f} {row['worse']:>+10.4f} [{low:+.4f}, {high:+.4f}]")
    return "\n".join(lines)


def _row(scores: list[Scores], learned: Scores, windows: Windows) -> dict[str, Any]:
    worse, interval = intervals.paired_windows(np.mean([one.nll for one in scores], axis=0), learned.nll,
                                               learned.tokens)
    by_seed = [intervals.exp(one.nll.sum() / one.tokens.sum()) for one in scores]
    density = np.mean([(one.decisions & windows.real).mean(axis=0).sum() / windows.real.sum() for one in scores])
    return {"density": float(density), "perplexity": float(np.mean(by_seed)), "perplexity_by_seed": by_seed,
            "worse": worse, "worse_95": list(interval)}


@functools.partial(jax.jit, static_argnums=4)
def _flip(key, decisions, able, share, matched):
    def window(index, decisions, able):
        own = jax.random.fold_in(key, index)
        if not matched:
            return routing.flipped(own, decisions, share) & able | decisions & ~able
        keys = jax.random.split(own, decisions.shape[0])
        return jax.vmap(flip_matched, in_axes=(0, 0, 0, None))(keys, decisions, able, share)

    return jax.vmap(window, in_axes=(0, 1, 1), out_axes=1)(jnp.arange(decisions.shape[1]), decisions, able)
