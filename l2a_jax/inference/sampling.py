"""The next token from logits: greedy, or sampled with temperature and top-p (nucleus sampling, arXiv 1904.09751)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, ""] | float) -> Float[Array, "B V"]:
    """Logits with all but the likeliest tokens at -inf: the fewest whose probabilities add up to `top_p`.

    Tokens as likely as the last one that is kept are kept too.
    """
    ordered = jnp.sort(jax.nn.softmax(logits, axis=-1), axis=-1, descending=True)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    smallest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(jax.nn.softmax(logits, axis=-1) >= smallest, logits, -jnp.inf)


def sample(
    logits: Float[Array, "B V"],
    key: PRNGKeyArray | None,
    temperature: Float[Array, ""] | float,
    top_p: Float[Array, ""] | float | None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """(token, its log-probability under the model itself, before temperature and top-p) of each row.

    `key` None: the likeliest token, the first of equals. `top_p` None: no cut.
    """
    if key is None:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        # A quotient that overflows would make equals, or NaN, of all that are as likely: what counts is the distance
        # to the likeliest.
        top = jnp.max(logits, axis=-1, keepdims=True)
        scaled = jnp.where(jnp.isfinite(top / temperature), logits / temperature, (logits - top) / temperature)
        tokens = jax.random.categorical(key, scaled if top_p is None else nucleus(scaled, top_p), axis=-1)
    tokens = tokens.astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)
