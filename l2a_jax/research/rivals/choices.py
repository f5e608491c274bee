"""The rivals: for any density, how each of them spends as much global attention.

  learned      the router, its threshold moved until it routes as much
  ranked       whole layers, those with the highest learned rates
  searched     whole layers, found greedily by the loss of a calibration text
  alternating  whole layers at even distances, as hybrid models ship them
  heads        whole key/value heads, found greedily in the same way
  joined       half of it the first of these heads, half the router's tokens in all others
  random       tokens at random
  oracle       the decisions that are worth most on the scored text itself

Of the last layer as much is routed, at random, as the density leaves; heads are whole: as many as reach it.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

from l2a_jax.errors import UserError
from l2a_jax.evaluation.controls import random_decisions, static_rates
from l2a_jax.evaluation.perplexity import Scores, Windows, routing_rates, score_windows
from l2a_jax.research.rivals.cut import cut_at
from l2a_jax.research.rivals.oracle import decision_worth, most_worth
from l2a_jax.research.rivals.search import opened
from l2a_jax.sources import Pretrained


class Choice(NamedTuple):
    """A choice of what is routed: by the router, cut at a logit or as it is; by the rate of each layer; by heads, of
    whose rest a cut router decides where there is a cut; or outright. `density` is the share of all pairs of a token
    and a key/value head that see everything."""

    name: str
    density: float
    cut: float | None = None
    rates: Float64[np.ndarray, " L"] | None = None
    heads: Bool[np.ndarray, "L K"] | None = None
    decisions: Bool[np.ndarray, "L B T"] | None = None

    def given(self, layers: int, windows: int, length: int) -> dict:
        """What `score_windows` is given for windows of a shape, or `generate` for prompts and answers of it."""
        if self.cut is not None:
            cut = {"cut": np.full(layers, self.cut, np.float32)}
            return cut if self.heads is None else {**cut, "heads": self.heads}
        if self.heads is not None:
            return {"heads": self.heads, "decisions": np.zeros((layers, windows, length), bool)}
        if self.rates is not None:
            return {"decisions": random_decisions(0, self.rates, windows, length)}
        return {} if self.decisions is None else {"decisions": self.decisions}

    def spent(self, rates: Float64[np.ndarray, " L"]) -> float:
        """The density where each layer routes its share of the tokens."""
        whole = np.zeros(len(rates)) if self.heads is None else self.heads.mean(axis=1)
        return float(np.mean(whole + (1 - whole) * rates))


class Found(NamedTuple):
    """What the choices are made of: learned rates of each layer, and the orders in which search opens units."""

    rates: Float64[np.ndarray, " L"]
    layers: list[tuple[int, ...]]
    heads: list[tuple[int, ...]] | None


Known = dict[float, Float64[np.ndarray, " L"]]
"""By cut: the rates of each layer that a pass over the scored text found there, with no heads open."""


def able_layers(model: Pretrained) -> list[int]:
    """The layers that can route: those that are not pruned."""
    return [layer for layer in range(model.config.num_layers) if layer not in model.l2a_config.pruned_layers]


def check_density(density: float, model: Pretrained, flag: str) -> None:
    """UserError where no choice of the model routes this share of all decisions."""
    able, layers = len(able_layers(model)), model.config.num_layers
    if not 0 < density * layers <= able:
        raise UserError(f"{flag}: no choice routes {density:.0%} of a model with {layers - able} of {layers} layers "
                        "pruned")


def alternating(layers: int, count: float) -> Float64[np.ndarray, " L"]:
    """The rates of as many whole layers, at even distances; the last of them takes the fraction that is left."""
    whole = math.ceil(round(count, 12))
    rates = np.zeros(layers)
    for index in range(whole):
        rates[int((index + 0.5) * layers / whole)] = min(1.0, count - index)
    return rates


def static_choices(density: float, model: Pretrained, found: Found) -> list[Choice]:
    """The choices that know nothing of the text, at a density. Layers that are pruned take no part."""
    layers, able = model.config.num_layers, able_layers(model)
    count = density * layers
    places = {unit[0]: place for place, unit in enumerate(found.layers)}
    order = np.array([-places.get(layer, layers) for layer in able], float)
    rates = {"ranked": static_rates(found.rates[able], count), "searched": static_rates(order, count),
             "alternating": alternating(len(able), count), "random": np.full(len(able), count / len(able))}
    choices = []
    for name, of_able in rates.items():
        every = np.zeros(layers)
        every[able] = of_able
        choices.append(Choice(name, density, rates=every))
    if found.heads is not None:
        shape = layers, model.config.num_kv_heads
        mask = opened(found.heads[: math.ceil(round(count * shape[1], 12))], shape)
        choices.append(Choice("heads", float(mask.mean()), heads=mask))
    return choices


def joined_heads(density: float, model: Pretrained, found: Found) -> Bool[np.ndarray, "L K"] | None:
    """Half of the density in heads; None where there are no heads, or half is less than one."""
    shape = model.config.num_layers, model.config.num_kv_heads
    heads = (found.heads or [])[: int(0.5 * density * math.prod(shape))]
    return opened(heads, shape) if heads else None


def learned_choice(density: float, model: Pretrained, windows: Windows, known: Known, *,
                   heads: Bool[np.ndarray, "L K"] | None = None, **passes) -> tuple[Choice, Scores | None]:
    """The router cut at the logit with which it routes about the density of the windows, and its scores where a pass
    was made here. `known` says where to look, and keeps what passes find; `heads` see everything besides.

    On the scored text itself: routing less of one text or length than of another is no merit here, and how much is
    routed tells nothing of the loss.
    """
    choice = Choice("learned" if heads is None else "joined", density, heads=heads)
    made: dict[float, Scores] = {}

    def share_of(cut: float) -> float:
        made[cut] = scores = score_windows(
            model, windows, **choice._replace(cut=cut).given(model.config.num_layers, *windows.tokens.shape), **passes,
            label=f"{choice.name}, {density:.1%} routed: cut at {cut:.3f}")
        rates = routing_rates(scores.decisions, windows.real)
        if heads is None:
            known[cut] = rates
        return choice.spent(rates)

    shares = {cut: choice.spent(rates) for cut, rates in known.items()}
    tried, like = (shares, {}) if heads is None else ({}, shares)
    cut = cut_at(density, share_of, tried, like=like)
    return choice._replace(density=tried[cut], cut=cut), made.get(cut)


class Choices:
    """The choices of a model and a text by name, at any density. `passes`: how the text is read."""

    def __init__(self, model: Pretrained, text: Windows, found: Found, known: Known, passes: dict[str, Any]):
        self._model, self._text, self._found, self._known, self._passes = model, text, found, known, passes

    def names(self, density: float) -> list[str]:
        """In the order of the table."""
        joined = joined_heads(density, self._model, self._found) is not None
        static = [choice.name for choice in static_choices(density, self._model, self._found)]
        return ["learned", *static, *(["joined"] if joined else []), "oracle"]

    def make(self, name: str, density: float) -> tuple[Choice, Scores | None]:
        """The choice, and its scores where making it gave them."""
        if name == "learned":
            return learned_choice(density, self._model, self._text, self._known, **self._passes)
        if name == "joined":
            heads = joined_heads(density, self._model, self._found)
            return learned_choice(density, self._model, self._text, self._known, heads=heads, **self._passes)
        if name == "oracle":
            return Choice(name, density, decisions=most_worth(self._worth, self._text.real, density)), None
        static = static_choices(density, self._model, self._found)
        return next(choice for choice in static if choice.name == name), None

    @functools.cached_property
    def _worth(self) -> Float[np.ndarray, "L B T"]:
        return decision_worth(self._model, self._text, self._passes["backend"], self._passes["mesh"])
