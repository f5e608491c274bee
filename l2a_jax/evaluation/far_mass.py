"""Where a token's full attention lies: on the sinks, in the window, and by how far back beyond it.

Of some tokens of each layer, whether they are routed or not, the softmax over all keys up to them is written out, from
the residual stream that enters the layer, with the layer's own norm, projections and rotation. All rows of a long
window would be too many; the tokens are the caller's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from l2a_jax.attention import reference
from l2a_jax.models.layer import Attention, context_of, far_queries_and_keys
from l2a_jax.models.transformer import probe_layers
from l2a_jax.sources import Pretrained


def far_mass(model: Pretrained, tokens: Int[np.ndarray, " T"], decisions: Bool[np.ndarray, "L T"],
             places: Int[np.ndarray, "L R"], distances: Sequence[int], *, backend: str = "auto"
             ) -> Float32[np.ndarray, "L R M"]:
    """The mass that the tokens at `places` of each layer give, as a mean over heads, in M = 2 + len(distances) parts
    that sum to 1: the sinks, then keys less than `distances[0]` back, then those from each of the distances on, up to
    the next one. The window is run under `decisions`, so that the streams are those of the router's own pass."""
    return np.asarray(_far_mass(model.params, jnp.asarray(tokens)[None], jnp.asarray(decisions)[:, None],
                                jnp.asarray(places), model.config, model.l2a_config, tuple(distances), backend))


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _far_mass(params, tokens, decisions, places, config, l2a, distances, backend):
    streams = probe_layers(params, tokens, config, l2a, probe=lambda stream: stream, decisions=decisions,
                           backend=backend)
    positions = jnp.arange(tokens.shape[1])[None]
    context = context_of(config, l2a, positions, jnp.ones(tokens.shape, bool), Attention(l2a, None, backend))

    def of_layer(_, inputs):
        x, layer, rows = inputs
        q, k = far_queries_and_keys(x, layer, context)
        weights = attention_rows(q[0, rows], k[0], rows)
        return None, mass_by_distance(weights, rows, l2a.sinks, distances)

    return jax.lax.scan(of_layer, None, (streams[:-1], params["layers"], places))[1]


def attention_rows(q: Float[Array, "R N H"], k: Float[Array, "T K H"], places: Int[Array, " R"]
                   ) -> Float[Array, "R T"]:
    """The weights of full attention of the tokens at `places`, whose queries are q, as a mean over heads."""
    seen = jnp.arange(k.shape[0]) <= places[:, None]
    return reference.masked_softmax(reference.scores(q[None], k[None])[0], seen).mean(axis=(0, 1))


def mass_by_distance(weights: Float[Array, "R T"], places: Int[Array, " R"], sinks: int, distances: Sequence[int]
                     ) -> Float[Array, "R M"]:
    """Weights of rows summed in the parts of `far_mass`; a sink counts as one however near it is."""
    keys = jnp.arange(weights.shape[1])
    part = 1 + jnp.searchsorted(jnp.asarray(distances), places[:, None] - keys, side="right")
    part = jnp.where(keys < sinks, 0, part)
    return jnp.stack([jnp.where(part == one, weights, 0).sum(axis=1) for one in range(2 + len(distances))], axis=1)
