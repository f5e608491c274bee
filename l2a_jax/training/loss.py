"""Next-token cross-entropy over a large vocabulary, without ever holding [B, T, V] logits.

Tokens are taken in chunks: a chunk's logits live only as long as it takes to reduce them. Where gradients are wanted,
the forward pass computes them right there (d nll / d logits = softmax - onehot), so that the logits, the largest
matrix product of a small model, are computed once and not again in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from l2a_jax.attention.kernels.launch import on_gpu
from l2a_jax.config import ModelConfig
from l2a_jax.models.params import Tree, output_matrix
from l2a_jax.nn.softmax_kernel import softmax_rows

CHUNK = 2_048  # tokens; x 152K vocabulary x 4 bytes = 1.2 GB of float32 logits at a time, twice as many in float16


class _How(NamedTuple):
    chunk: int
    logits: Any


class TokenLoss(NamedTuple):
    """Sum over tokens of weight x negative log-likelihood (nats), and of weight x [the target is the top token]."""

    nll: Float[Array, ""]
    correct: Float[Array, ""]


def cross_entropy(params: Tree, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], weights: Float[Array, "B T"],
                  config: ModelConfig, chunk: int | None = None, logits_dtype: Any = None) -> TokenLoss:
    """Weighted sums over all tokens; divide by the weights' sum for means. Differentiable in hidden and in the head.

    `chunk`: tokens at a time (None: `CHUNK` float32 logits' worth of memory). `logits_dtype`: None for
    `logits_dtype_of` the dtype of `hidden`."""
    dtype = jnp.dtype(logits_dtype_of(hidden.dtype) if logits_dtype is None else logits_dtype)
    kernel = output_matrix(params, config)
    rows = hidden.reshape(-1, hidden.shape[-1])
    how = _How(CHUNK * 4 // dtype.itemsize if chunk is None else chunk, dtype)
    return TokenLoss(*_summed(how, rows, kernel, targets.reshape(-1), weights.reshape(-1).astype(jnp.float32)))


def logits_dtype_of(compute_dtype: Any) -> Any:
    """What a training step keeps its logits in: float16 where it computes in bfloat16, else float32.

    float16 takes half the memory and so twice the tokens a product, with 11 bits where bfloat16, in which others keep
    logits, has 8: a logit below 16 is off by at most 0.004, less than the rounding of bfloat16 activations makes it.
    Beyond 65,504 it is infinite, and the loss not finite. Evaluation (`token_nll`) always keeps float32.
    """
    return jnp.float16 if jnp.dtype(compute_dtype) == jnp.bfloat16 else jnp.float32


def token_nll(params: Tree, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], config: ModelConfig,
              chunk: int = CHUNK) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Negative log-likelihood of each target in nats, and whether it is the top token; for evaluation."""
    logits_of = make_logits(output_matrix(params, config), jnp.float32)
    rows = hidden.reshape(-1, hidden.shape[-1])

    def one(inputs):
        logits = logits_of(inputs[0])
        return (jax.nn.logsumexp(logits, axis=-1) - logit_of(logits, inputs[1]),
                jnp.argmax(logits, axis=-1) == inputs[1])

    nll, correct = jax.lax.map(one, (chunked(rows, chunk), chunked(targets.reshape(-1), chunk)))
    return tuple(out.reshape(-1)[: targets.size].reshape(targets.shape) for out in (nll, correct))


def chunked(x: Shaped[Array, " n ..."], chunk: int) -> Shaped[Array, "chunks chunk ..."]:
    """[n, ...] as [chunks, chunk, ...], padded with zeros."""
    size = min(chunk, x.shape[0])
    count = -(-x.shape[0] // size)
    padded = jnp.pad(x, ((0, count * size - x.shape[0]), *((0, 0),) * (x.ndim - 1)))
    return padded.reshape(count, size, *x.shape[1:])


def make_logits(kernel: Float[Array, "V D"], dtype: Any) -> Callable[[Float[Array, "n D"]], Float[Array, "n V"]]:
    """A function that makes the logits of some tokens in `dtype`, float32 or float16."""
    if dtype != jnp.float16:
        return lambda rows: jnp.einsum("nd,vd->nv", rows, kernel.astype(rows.dtype),
                                       preferred_element_type=jnp.float32)
    half = kernel.astype(jnp.float16)  # once, not once a chunk
    # What reads them reads them as float32: without the barrier the product itself would be made so.
    return lambda rows: jax.lax.optimization_barrier(jnp.einsum("nd,vd->nv", rows.astype(jnp.float16), half))


def logit_of(logits: Float[Array, "n V"], targets: Int[Array, " n"]) -> Float[Array, " n"]:
    """The logit of each row's target."""
    return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


def softmax(logits: Float[Array, "n V"], targets: Int[Array, " n"], weights: Float[Array, " n"], slopes_dtype: Any):
    """What `softmax_rows` says, by that kernel on the GPUs that it can be compiled for."""
    return on_gpu(functools.partial(softmax_rows, slopes_dtype=slopes_dtype),
                         functools.partial(_plain_softmax, slopes_dtype=slopes_dtype), logits, targets, weights)


def _plain_softmax(logits, targets, weights, slopes_dtype):
    """The oracle of `softmax_rows`, and what other devices run."""
    logits = logits.astype(jnp.float32)
    top, normaliser = jnp.max(logits, axis=-1), jax.nn.logsumexp(logits, axis=-1)
    level = jnp.sum(logits == top[:, None], axis=-1, dtype=jnp.float32)
    if slopes_dtype is None:
        return top, level, normaliser, None
    onehot = jnp.arange(logits.shape[1])[None, :] == targets[:, None]
    slopes = (jnp.exp(logits - normaliser[:, None]) - onehot) * weights[:, None]
    return top, level, normaliser, slopes.astype(slopes_dtype)


def correctness(picked: Float[Array, " n"], top: Float[Array, " n"], level: Float[Array, " n"]) -> Float[Array, " n"]:
    """1 where the target is the top token, 1/n where it shares the top with others (with all of them, where a broken
    model scores every token alike)."""
    return jnp.where(picked == top, 1.0 / level, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(how, rows, kernel, targets, weights):
    return _forward(how, rows, kernel, targets, weights, False, False)[0]


def _forward(how, rows, kernel, targets, weights, need_rows, need_kernel):
    """Sums over all chunks, and the gradients of the summed nll that are needed (None: not needed)."""
    logits_of = make_logits(kernel, how.logits)

    def step(carry, inputs):
        sums, kernel_gradient = carry
        x, target, weight = inputs
        logits = logits_of(x)
        picked = logit_of(logits, target).astype(jnp.float32)
        slopes_dtype = x.dtype if need_rows or need_kernel else None
        top, level, normaliser, slopes = softmax(logits, target, weight, slopes_dtype)
        correct = correctness(picked, top, level)
        sums = (sums[0] + jnp.sum(weight * (normaliser - picked)), sums[1] + jnp.sum(weight * correct))
        row_gradient = slopes @ kernel.astype(x.dtype) if need_rows else None
        if need_kernel:
            kernel_gradient += jnp.einsum("nv,nd->vd", slopes, x, preferred_element_type=jnp.float32)
        return (sums, kernel_gradient), row_gradient

    start = (jnp.zeros(()), jnp.zeros(())), jnp.zeros(kernel.shape, jnp.float32) if need_kernel else None
    inputs = tuple(chunked(x, how.chunk) for x in (rows, targets, weights))
    (sums, kernel_gradient), row_gradient = jax.lax.scan(step, start, inputs)
    if row_gradient is not None:
        row_gradient = row_gradient.reshape(-1, rows.shape[-1])[: rows.shape[0]]
    return sums, (row_gradient, kernel_gradient)


def _summed_fwd(how, rows, kernel, targets, weights):
    # Symbolic zeros tell a frozen head from a trained one: its [V, D] gradient is made only where it is wanted.
    sums, gradients = _forward(how, rows.value, kernel.value, targets.value, weights.value, rows.perturbed,
                               kernel.perturbed)
    # Zero-sized stand-ins carry the dtypes, since a residual must be an array.
    return sums, (gradients, rows.value[:0], kernel.value[:0])


def _summed_bwd(how, residuals, cotangents):
    (row_gradient, kernel_gradient), rows, kernel = residuals
    scale = cotangents[0]  # the count of correct tokens is piecewise constant
    if not isinstance(scale, jax.Array):
        return None, None, None, None

    def scaled(gradient, like):
        return None if gradient is None else (gradient * scale).astype(like.dtype)

    return scaled(row_gradient, rows), scaled(kernel_gradient, kernel), None, None


_summed.defvjp(_summed_fwd, _summed_bwd, symbolic_zeros=True)
