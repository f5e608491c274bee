"""The router's logit, and what it sees beside the stream:

    z = w . h + u . s + v . silu(A h + C s + b)

h is the layer's input, s are signals that cost nothing to have. The linear router is the first term alone; the others
are there where a layer asks for signals (`router_sees`) or for hidden units (`router_hidden`). Everything is float32 at
highest precision, as `routing.router_logits` says why. u and v start at 0 as w does: everything is routed at first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l2a_jax.nn import routing

FARTHEST = 1_024
"""Windows of past at which the signal of position stops growing."""


def signals(names: tuple[str, ...], positions: Int[Array, "B T"], window: int) -> Float[Array, "B T S"] | None:
    """The signals of each token, in the order of `names` (None: there are none).

    `position`: ln of the token's past, itself included, in windows; 0 within the first window, where a decision changes
    nothing.
    """
    past = (positions + 1).astype(jnp.float32) / window
    made = {"position": jnp.log(jnp.clip(past, 1.0, FARTHEST))}
    return jnp.stack([made[name] for name in names], axis=-1) if names else None


def logits(h: Float[Array, "B T D"], seen: Float[Array, "B T S"] | None, router: dict[str, Any]) -> Float[Array, "B T"]:
    """z of each token from the layer's input and its signals; `router` holds the leaves of one layer."""
    z = routing.router_logits(h, router["kernel"])
    if "signals" in router:
        z = z + _product(seen, router["signals"][:, None])[..., 0]
    if "hidden" in router:
        hidden = router["hidden"]
        units = _product(h.astype(jnp.float32), hidden["kernel"]) + hidden["bias"]
        if "signals" in hidden:
            units = units + _product(seen, hidden["signals"])
        z = z + _product(jax.nn.silu(units), hidden["out"][:, None])[..., 0]
    return z


def _product(x: Float[Array, "B T I"], kernel: Float[Array, "I O"]) -> Float[Array, "B T O"]:
    return jnp.einsum("bti,io->bto", x, kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
