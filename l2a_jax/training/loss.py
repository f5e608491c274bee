"""Next-token cross-entropy over a large vocabulary, without ever holding [B, T, V] logits.

Tokens are taken in chunks: a chunk's logits live only as long as it takes to reduce them. Where gradients are wanted,
the forward pass computes them right there (d nll / d logits = softmax - onehot), so that the logits, the largest
matrix product of a small model, are computed once and not again in the backward pass.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from l2a_jax.config import ModelConfig
from l2a_jax.models.params import Tree

CHUNK = 1_024  # tokens; x 152K vocabulary x 4 bytes = 0.6 GB of float32 logits at a time


class TokenLoss(NamedTuple):
    """Sum over tokens of weight x negative log-likelihood (nats), and of weight x [the target is the top token]."""

    nll: Float[Array, ""]
    correct: Float[Array, ""]


def cross_entropy(
    params: Tree,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    config: ModelConfig,
    chunk: int = CHUNK,
) -> TokenLoss:
    """Weighted sums over all tokens; divide by the weights' sum for means. Differentiable in hidden and in the head."""
    kernel = params["embed"]["embedding"] if config.tie_embeddings else params["unembed"]["kernel"].T
    rows = hidden.reshape(-1, hidden.shape[-1])
    return TokenLoss(*_summed(chunk, rows, kernel, targets.reshape(-1), weights.reshape(-1).astype(jnp.float32)))


def token_nll(params: Tree, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], config: ModelConfig,
              chunk: int = CHUNK) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Negative log-likelihood of each target in nats, and whether it is the top token; for evaluation."""
    kernel = params["embed"]["embedding"] if config.tie_embeddings else params["unembed"]["kernel"].T
    rows = hidden.reshape(-1, hidden.shape[-1])

    def one(inputs):
        logits, normaliser, picked = _chunk_logits(inputs[0], kernel, inputs[1])
        return normaliser - picked, jnp.argmax(logits, axis=-1) == inputs[1]

    nll, correct = jax.lax.map(one, (_chunked(rows, chunk), _chunked(targets.reshape(-1), chunk)))
    return tuple(out.reshape(-1)[: targets.size].reshape(targets.shape) for out in (nll, correct))


def _chunked(x, chunk):
    """[n, ...] as [chunks, chunk, ...], padded with zeros."""
    size = min(chunk, x.shape[0])
    count = -(-x.shape[0] // size)
    padded = jnp.pad(x, ((0, count * size - x.shape[0]), *((0, 0),) * (x.ndim - 1)))
    return padded.reshape(count, size, *x.shape[1:])


def _chunk_logits(rows, kernel, targets):
    """(logits in float32, their log-sum-exp, the target's logit) of some tokens."""
    logits = jnp.einsum("nd,vd->nv", rows, kernel.astype(rows.dtype), preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return logits, jax.nn.logsumexp(logits, axis=-1), picked


def _is_top(logits, picked):
    """1 where the target is the top token, 1/n where it shares the top with others (all of them, where a broken model
    scores every token alike). Two sums over the logits; an argmax would be a pass of its own."""
    above, level = jnp.sum(logits > picked[:, None], axis=-1), jnp.sum(logits == picked[:, None], axis=-1)
    return jnp.where((above == 0) & (level > 0), 1.0 / jnp.maximum(level, 1), 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(chunk, rows, kernel, targets, weights):
    return _forward(chunk, rows, kernel, targets, weights, False, False)[0]


def _forward(chunk, rows, kernel, targets, weights, need_rows, need_kernel):
    """Sums over all chunks, and the gradients of the summed nll that are needed (None: not needed)."""

    def step(carry, inputs):
        sums, kernel_gradient = carry
        x, target, weight = inputs
        logits, normaliser, picked = _chunk_logits(x, kernel, target)
        sums = (sums[0] + jnp.sum(weight * (normaliser - picked)),
                sums[1] + jnp.sum(weight * _is_top(logits, picked)))
        row_gradient = None
        if need_rows or need_kernel:
            onehot = jnp.arange(kernel.shape[0])[None, :] == target[:, None]
            slope = ((jnp.exp(logits - normaliser[:, None]) - onehot) * weight[:, None]).astype(x.dtype)
            if need_rows:
                row_gradient = slope @ kernel.astype(x.dtype)
            if need_kernel:
                kernel_gradient += jnp.einsum("nv,nd->vd", slope, x, preferred_element_type=jnp.float32)
        return (sums, kernel_gradient), row_gradient

    start = (jnp.zeros(()), jnp.zeros(())), jnp.zeros(kernel.shape, jnp.float32) if need_kernel else None
    inputs = tuple(_chunked(x, chunk) for x in (rows, targets, weights))
    (sums, kernel_gradient), row_gradient = jax.lax.scan(step, start, inputs)
    if row_gradient is not None:
        row_gradient = row_gradient.reshape(-1, rows.shape[-1])[: rows.shape[0]]
    return sums, (row_gradient, kernel_gradient)


def _summed_fwd(chunk, rows, kernel, targets, weights):
    # Symbolic zeros tell a frozen head from a trained one: its [V, D] gradient is made only where it is wanted.
    sums, gradients = _forward(chunk, rows.value, kernel.value, targets.value, weights.value, rows.perturbed,
                               kernel.perturbed)
    # Zero-sized stand-ins carry the dtypes, since a residual must be an array.
    return sums, (gradients, rows.value[:0], kernel.value[:0])


def _summed_bwd(chunk, residuals, cotangents):
    (row_gradient, kernel_gradient), rows, kernel = residuals
    scale = cotangents[0]  # the count of correct tokens is piecewise constant
    if not isinstance(scale, jax.Array):
        return None, None, None, None

    def scaled(gradient, like):
        return None if gradient is None else (gradient * scale).astype(like.dtype)

    return scaled(row_gradient, rows), scaled(kernel_gradient, kernel), None, None


_summed.defvjp(_summed_fwd, _summed_bwd, symbolic_zeros=True)
