"""Decisions that know nothing of the text, beside which learned ones are judged.

  all, none   every token routed, no token routed (pruned layers route nothing in either)
  random      each layer routes tokens at random at its own learned rate, several seeds
  shuffled    each layer's and window's decisions permuted over its tokens, several seeds: every count is kept
  static      whole layers instead of tokens: those with the highest learned rates, as many as give the same density;
              the last one routes the remaining fraction of its tokens at random, so that the density is the same
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float64, Int

from l2a_jax.errors import UserError
from l2a_jax.evaluation.perplexity import routing_rates
from l2a_jax.nn import routing


def controls(decisions: Bool[np.ndarray, "L B T"], real: Bool[np.ndarray, "B T"], pruned: Sequence[int],
             seeds: int) -> Iterator[tuple[str, str, Bool[np.ndarray, "L B T"]]]:
    """(control, what to call it, its decisions) of every control and seed, for learned `decisions` over `real` tokens
    of a model whose layers `pruned` never route."""
    layers, count, length = decisions.shape
    rates = routing_rates(decisions, real)
    able = np.ones((layers, 1, 1), bool)
    able[list(pruned)] = False
    yield "all", "all", np.broadcast_to(able, decisions.shape)
    yield "none", "none", np.zeros(decisions.shape, bool)
    for seed in range(seeds):
        yield "random", f"random {seed}", random_decisions(seed, rates, count, length)
    for seed in range(seeds):
        yield "shuffled", f"shuffled {seed}", shuffled_decisions(seed, decisions, real)
    yield "static", "static layers", static_decisions(0, rates, count, length)[0]


def random_decisions(seed: int, rates: Float64[np.ndarray, " L"], windows: int,
                     length: int) -> Bool[np.ndarray, "L B T"]:
    """Each layer's tokens at random at its rate; a window's draw depends on the seed and its index alone."""
    return np.asarray(_draw(_keys(seed, windows), jnp.asarray(rates, jnp.float32), length)).swapaxes(0, 1)


def shuffled_decisions(seed: int, decisions: Bool[np.ndarray, "L B T"],
                       real: Bool[np.ndarray, "B T"]) -> Bool[np.ndarray, "L B T"]:
    """Each layer's and window's decisions permuted over its real tokens."""
    return np.asarray(_permute(_keys(seed, len(real)), decisions.swapaxes(0, 1), real)).swapaxes(0, 1)


def static_decisions(seed: int, rates: Float64[np.ndarray, " L"], windows: int,
                     length: int) -> tuple[Bool[np.ndarray, "L B T"], Float64[np.ndarray, " L"]]:
    """(decisions, rate of each layer): whole layers by descending learned rate up to the learned density."""
    chosen = static_rates(rates, rates.sum())
    return random_decisions(seed, chosen, windows, length), chosen


def static_rates(worth: Float64[np.ndarray, " L"], layers: float) -> Float64[np.ndarray, " L"]:
    """The rate of each layer when as many whole `layers` route as asked, those of the highest worth first; the last
    one takes the fraction that is left. UserError where the model has not so many."""
    if not 0 <= layers <= len(worth):
        raise UserError(f"no choice of layers routes as much as {layers:g} of {len(worth)} layers")
    order: Int[np.ndarray, " L"] = np.argsort(-np.asarray(worth), kind="stable")
    rates = np.zeros(len(worth))
    # What a sum of shares leaves behind by rounding is no layer.
    rates[order] = np.clip(round(layers, 12) - np.arange(len(worth)), 0.0, 1.0)
    return rates


@functools.partial(jax.jit, static_argnums=2)
def _draw(keys, rates, length):
    return jax.vmap(lambda key: routing.random(key, rates, 1, length)[:, 0])(keys)


@jax.jit
def _permute(keys, decisions, real):
    return jax.vmap(lambda key, d, r: routing.shuffled(key, d[:, None], r[None])[:, 0])(keys, decisions, real)


def _keys(seed, windows):
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(jnp.arange(windows))
