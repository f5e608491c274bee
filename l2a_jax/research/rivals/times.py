"""What a choice costs: milliseconds of a prefill of its text, and of a decode step after it, on the device at hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32

from l2a_jax.evaluation.controls import random_decisions
from l2a_jax.inference.cache import layout_of
from l2a_jax.inference.forward import decode_params
from l2a_jax.inference.generate import Options, State, advance, bucket, start
from l2a_jax.research.speed.inference_steps import greedy
from l2a_jax.research.speed.timing import median_ms
from l2a_jax.sources import Pretrained

STEPS = 32
REPEATS = 5


class Times:
    """Prefill and decode of one row of a length, compiled once for every choice of decisions."""

    def __init__(self, model: Pretrained, tokens: Int32[np.ndarray, " T"], backend: str = "auto"):
        config, layer = model.config, model.l2a_config
        room = len(tokens) + bucket(STEPS, 16)
        self._options = Options(config, layer, layout_of(config, layer, room), False, False, backend)
        self._tokens, self._room = jnp.asarray(tokens)[None], room
        self._params, self._weights = model.params, jax.jit(decode_params)(model.params)
        self._start = jax.jit(functools.partial(start, options=self._options, room=bucket(STEPS, 16)))
        self._advance = jax.jit(functools.partial(advance, options=self._options))

    def prefill_ms(self, decisions: Bool[np.ndarray, "L 1 T"]) -> float:
        """One prefill under these decisions: the median of several."""
        inputs = self._inputs(decisions)
        jax.block_until_ready(self._start(*inputs))
        return median_ms(lambda: self._start(*inputs).next, repeats=REPEATS)

    def decode_ms(self, decisions: Bool[np.ndarray, "L 1 T"]) -> float:
        """A step after that prefill, each layer routing at random as often as there."""
        inputs = self._inputs(decisions)
        state: State = self._start(*inputs)
        jax.block_until_ready(self._advance(self._weights, state, inputs[3], until=STEPS))
        return median_ms(lambda: self._advance(self._weights, state, inputs[3], until=STEPS).next,
                         repeats=REPEATS) / (STEPS - 1)

    def _inputs(self, decisions):
        length = self._tokens.shape[1]
        after = random_decisions(0, decisions.mean(axis=(1, 2)), 1, self._room - length)
        every = jnp.asarray(np.concatenate([decisions, after], axis=2))
        return self._params, self._tokens, jnp.full((1,), length, jnp.int32), greedy(STEPS, every)
