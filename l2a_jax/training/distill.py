"""Distillation from the model itself: in the shared layer, with everything routed, it is the base model, the teacher.

    KL(teacher || student) = sum over the vocabulary of q (log q - log p),    q of the teacher, p of the routed student

at every token, on the same weights and rows. What next-token loss says of a decision is mostly noise that has nothing
to do with routing: whether the text went the likely way. The divergence is 0 where local attention changes nothing.

Like next-token loss it is taken in chunks of tokens. The teacher's logits are made from its hidden states chunk by
chunk, in the dtype of the student's, and live as long as theirs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l2a_jax.config import L2AConfig, ModelConfig, rope_of
from l2a_jax.data.batch import Batch
from l2a_jax.models.params import Tree, output_matrix
from l2a_jax.models.transformer import hidden_states
from l2a_jax.nn.shard import ALONE, Shard
from l2a_jax.training.loss import CHUNK, chunked, correctness, logit_of, logits_dtype_of, make_logits, softmax


class _How(NamedTuple):
    chunk: int
    logits: Any


class Distilled(NamedTuple):
    """The weighted sum of both losses, which alone has a gradient; and per token the nats of the target, the divergence
    in nats, and the share to which the target is the top token."""

    loss: Float[Array, ""]
    nll: Float[Array, "B T"]
    kl: Float[Array, "B T"]
    correct: Float[Array, "B T"]


def everything_routed(params: Tree, batch: Batch, config: ModelConfig, l2a_config: L2AConfig, *, backend: str = "auto",
                      unroll: bool = False, shard: Shard = ALONE) -> Float[Array, "B T D"]:
    """The teacher's hidden states, without gradient: the plain model on the routed model's own weights (shared layer),
    which costs full attention once and decides nothing."""
    layers = {name: part for name, part in params["layers"].items() if name != "router"}
    plain = dataclasses.replace(config, rope=rope_of(config, l2a_config))
    hidden, _ = hidden_states({**params, "layers": layers}, batch.tokens, plain, positions=batch.positions,
                              segment_ids=batch.segment_ids, backend=backend, unroll=unroll, shard=shard)
    return jax.lax.stop_gradient(hidden)


def distillation(params: Tree, hidden: Float[Array, "B T D"], teacher: Float[Array, "B T D"],
                 targets: Int[Array, "B T"], next_weights: Float[Array, "B T"], kl_weights: Float[Array, "B T"],
                 config: ModelConfig, chunk: int | None = None) -> Distilled:
    """The sum over tokens of `next_weights` x next-token loss + `kl_weights` x divergence from the teacher's `teacher`.

    Differentiable in `hidden` alone: the head is the teacher's too. `chunk`: tokens at a time (None: half as many as
    next-token loss takes, for there are two of everything)."""
    dtype, shape = jnp.dtype(logits_dtype_of(hidden.dtype)), targets.shape
    how = _How(CHUNK * 2 // dtype.itemsize if chunk is None else chunk, dtype)
    kernel = jax.lax.stop_gradient(output_matrix(params, config))
    rows = (x.reshape(-1, x.shape[-1]) for x in (hidden, jax.lax.stop_gradient(teacher)))
    numbers = (weights.reshape(-1).astype(jnp.float32) for weights in (next_weights, kl_weights))
    loss, *told = _summed(how, *rows, kernel, targets.reshape(-1), *numbers)
    return Distilled(loss, *(jax.lax.stop_gradient(x).reshape(shape) for x in told))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(how, rows, teacher, kernel, targets, next_weights, kl_weights):
    return _forward(how, rows, teacher, kernel, targets, next_weights, kl_weights, False)[0]


def _forward(how, rows, teacher, kernel, targets, next_weights, kl_weights, need_rows):
    """Loss, nll, divergence and correctness; and the gradient of the loss in `rows` (None: not needed)."""
    logits_of = make_logits(kernel, how.logits)

    def step(loss, inputs):
        x, taught, target, to_next, to_teacher = inputs
        logits, known = logits_of(x), logits_of(taught)
        top, level, normaliser, _ = softmax(logits, target, to_next, None)
        _, _, known_normaliser, _ = softmax(known, target, to_next, None)
        picked = logit_of(logits, target).astype(jnp.float32)
        log_p = logits.astype(jnp.float32) - normaliser[:, None]
        log_q = known.astype(jnp.float32) - known_normaliser[:, None]
        nll, kl = normaliser - picked, jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
        gradient = None
        if need_rows:
            onehot = jnp.arange(logits.shape[1])[None, :] == target[:, None]
            p, q = jnp.exp(log_p), jnp.exp(log_q)
            # One rounding, of the difference: where the two nearly agree it is far smaller than either.
            slopes = to_next[:, None] * (p - onehot) + to_teacher[:, None] * (p - q)
            gradient = slopes.astype(x.dtype) @ kernel.astype(x.dtype)
        loss += jnp.sum(to_next * nll) + jnp.sum(to_teacher * kl)
        return loss, ((nll, kl, correctness(picked, top, level)), gradient)

    inputs = tuple(chunked(x, how.chunk) for x in (rows, teacher, targets, next_weights, kl_weights))
    loss, (told, gradient) = jax.lax.scan(step, jnp.zeros(()), inputs)
    told = tuple(x.reshape(-1)[: rows.shape[0]] for x in told)
    if gradient is not None:
        gradient = gradient.reshape(-1, rows.shape[-1])[: rows.shape[0]]
    return (loss, *told), gradient


def _summed_fwd(how, rows, teacher, kernel, targets, next_weights, kl_weights):
    return _forward(how, rows, teacher, kernel, targets, next_weights, kl_weights, True)


def _summed_bwd(how, gradient, cotangents):
    return (gradient * cotangents[0]).astype(gradient.dtype), None, None, None, None, None


_summed.defvjp(_summed_fwd, _summed_bwd)
