"""Normalisation, projections and the gated MLP: the parts of Qwen2.5 that routing does not touch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

Params = Mapping[str, Any]


def rms_norm(x: Float[Array, "*B D"], params: Params, eps: float) -> Float[Array, "*B D"]:
    """x / rms(x) * scale (arXiv 1910.07467): statistics in float32, the scale applied in x's dtype as in Qwen2."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * params["scale"].astype(x.dtype)


def linear(x: Float[Array, "*B I"], params: Params) -> Float[Array, "*B O"]:
    """x W in x's dtype; W is [in, out]. A bias is left to whoever reads the product (`rope.split_heads`)."""
    return x @ params["kernel"].astype(x.dtype)


def joined(params: Mapping[str, Params], names: tuple[str, ...]) -> Params:
    """The linear layers `names`, which read the same input, as one whose outputs lie side by side."""
    return {part: jnp.concatenate([params[name][part] for name in names], axis=-1) for part in params[names[0]]}


def gated_mlp(x: Float[Array, "*B D"], params: Params) -> Float[Array, "*B D"]:
    """down(silu(gate(x)) * up(x)); gate and up may be one "gate_up", whose outputs lie side by side."""
    if "gate_up" in params:
        gate, up = jnp.split(linear(x, params["gate_up"]), 2, axis=-1)
    else:
        gate, up = linear(x, params["gate"]), linear(x, params["up"])
    gate, up = checkpoint_name((gate, up), "mlp")
    return linear(jax.nn.silu(gate) * up, params["down"])
