"""Cross-entropy over the vocabulary for many small models side by side.

Differs from `l2a_jax.training.loss` in what speed asks of a model whose head is most of its work: the logits of a
chunk are kept in the compute dtype (the models are vmapped, so they are several times as large), and the vocabulary
is padded to a multiple of 128 columns, without which matrix units cannot take an odd 50,257.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK = 2_048  # tokens; x 50,304 x 2 bytes = 206 MB of bfloat16 logits a model
ALIGN = 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def summed_nll(hidden: Float[Array, "M D"], kernel: Float[Array, "V D"], targets: Int[Array, " M"],
               chunk: int = CHUNK) -> Float[Array, ""]:
    """Sum over M tokens of -log softmax(hidden . kernel)[target], in nats; differentiable in hidden and kernel."""
    return _scan(hidden, kernel, targets, chunk, False)[0]


def token_nll(hidden: Float[Array, "M D"], kernel: Float[Array, "V D"], targets: Int[Array, " M"],
              chunk: int = CHUNK) -> Float[Array, " M"]:
    """The same of each token, from float32 logits; for evaluation."""
    padded = _padded(kernel, hidden.dtype)

    def one(inputs):
        logits = _logits(inputs[0], padded, kernel.shape[0], jnp.float32)
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, inputs[1][:, None], axis=-1)[:, 0]

    return jax.lax.map(one, (_chunks(hidden, chunk), _chunks(targets, chunk))).reshape(-1)[: targets.shape[0]]


def _padded(kernel, dtype):
    return jnp.pad(kernel.astype(dtype), ((0, -kernel.shape[0] % ALIGN), (0, 0)))


def _chunks(x, chunk):
    size = min(chunk, x.shape[0])
    padded = jnp.pad(x, ((0, -x.shape[0] % size), *((0, 0),) * (x.ndim - 1)))
    return padded.reshape(-1, size, *x.shape[1:])


def _logits(x, padded, vocabulary, dtype):
    logits = jnp.einsum("md,vd->mv", x, padded, preferred_element_type=dtype)
    return jnp.where(jnp.arange(padded.shape[0]) < vocabulary, logits, -jnp.inf)


def _scan(hidden, kernel, targets, chunk, gradients):
    """The sum, and with `gradients` those of the sum; a chunk's logits live only as long as the chunk."""
    padded, vocabulary = _padded(kernel, hidden.dtype), kernel.shape[0]
    counts = _chunks(jnp.ones(targets.shape, jnp.float32), chunk)

    def step(carry, inputs):
        total, kernel_gradient = carry
        x, target, weight = inputs
        logits = _logits(x, padded, vocabulary, hidden.dtype)
        normaliser = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
        picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        total += jnp.sum(weight * (normaliser - picked))
        if not gradients:
            return (total, kernel_gradient), None
        onehot = jnp.arange(padded.shape[0])[None, :] == target[:, None]
        slope = (jnp.exp(logits.astype(jnp.float32) - normaliser[:, None]) - onehot) * weight[:, None]
        slope = slope.astype(x.dtype)
        kernel_gradient += jnp.einsum("mv,md->vd", slope, x, preferred_element_type=jnp.float32)
        return (total, kernel_gradient), slope @ padded

    start = jnp.zeros(()), jnp.zeros(padded.shape, jnp.float32) if gradients else None
    (total, kernel_gradient), rows = jax.lax.scan(step, start, (_chunks(hidden, chunk), _chunks(targets, chunk),
                                                                counts))
    if not gradients:
        return total, None
    return total, (rows.reshape(-1, hidden.shape[1])[: hidden.shape[0]], kernel_gradient[:vocabulary])


def _forward(hidden, kernel, targets, chunk):
    total, gradients = _scan(hidden, kernel, targets, chunk, True)
    return total, (gradients, kernel[:0])  # the empty rows carry the kernel's dtype


def _backward(chunk, residuals, slope):
    (rows, kernel_gradient), like = residuals
    return (rows * slope.astype(rows.dtype)), (kernel_gradient * slope).astype(like.dtype), None


summed_nll.defvjp(_forward, _backward)
