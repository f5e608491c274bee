"""Pallas kernels through Triton: windows, sinks, packed rows and routed rows, forward and backward, on NVIDIA GPUs.

This file joins the kernels of `kernels/` into differentiable functions; each says for itself what it computes.

Gradients of scores are rounded to the inputs' dtype before their products, as in FlashAttention-2. Those of float16 are
lost where they fall below 6e-8 (long rows, small cotangents): scale the loss, or use bfloat16.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from l2a_jax import device
from l2a_jax.attention.api import Call
from l2a_jax.attention.kernels import blocks
from l2a_jax.attention.kernels.backward_kv import backward_kv
from l2a_jax.attention.kernels.backward_q import backward_q
from l2a_jax.attention.kernels.blocks import Blocks
from l2a_jax.attention.kernels.forward import forward
from l2a_jax.attention.kernels.launch import lost
from l2a_jax.attention.kernels.plan import Spec, make_plan
from l2a_jax.attention.kernels.sinks import MAX_SINKS, add_sink_gradients
from l2a_jax.attention.kernels.tile import DEAD, LOG2_E
from l2a_jax.attention.reference import Heads, Ids, Keys, PerRow, Places, take
from l2a_jax.attention.rows import token_rows

DTYPES = ("bfloat16", "float16", "float32")


def machine_why_not() -> str | None:
    """The Triton lowering wants an NVIDIA GPU of the Ampere generation or newer."""
    if device.platform() != "gpu":
        return "the kernels are compiled for NVIDIA GPUs; pallas_interpret runs them elsewhere"
    if device.capability() < 8:
        return f"the kernels need compute capability 8.0, this device has {device.capability()}"
    return None


def why_not(call: Call) -> str | None:
    """What the kernels decline on any device."""
    if lost():
        return lost()
    if jax.config.jax_enable_x64:
        return "the kernels count in 32 bits, and jax_enable_x64 is on"
    if call.width not in blocks.WIDTHS:
        return f"head width {call.width} is none of {blocks.WIDTHS}"
    if call.dtype not in DTYPES:
        return f"dtype {call.dtype} is none of {DTYPES}"
    if call.sinks > MAX_SINKS:
        return f"{call.sinks} sinks are more than {MAX_SINKS}"
    return None


def full(q: Heads, k: Keys, v: Keys, *, segment_ids: Ids | None = None, places: Places | None = None, **kernel: Any
         ) -> Heads:
    return _call("all", q, k, v, None, segment_ids, places, **kernel)


def local(q: Heads, k: Keys, v: Keys, *, window: int, sinks: int = 0, segment_ids: Ids | None = None,
          places: Places | None = None, **kernel: Any) -> Heads:
    return _call("all", q, k, v, None, segment_ids, places, window=window, sinks=sinks, **kernel)


def local_with_lse(q: Heads, k: Keys, v: Keys, *, window: int, sinks: int = 0, segment_ids: Ids | None = None,
                   places: Places | None = None, **kernel: Any) -> tuple[Heads, Float[Array, "B Q N"]]:
    """The forward kernel leaves the log-sum-exp for its backward pass; here it is handed out too."""
    limits = None if window >= k.shape[1] else window
    how = _how("all", q, k, segment_ids, places, limits, sinks, **kernel)
    return _attend_with_lse(q, k, v, segment_ids, places, how)


def routed(q: Heads, k: Keys, v: Keys, decisions: PerRow, *, segment_ids: Ids | None = None,
           places: Places | None = None, **kernel: Any) -> Heads:
    return _call("routed", q, k, v, decisions, segment_ids, places, **kernel)


def mixed(q: Heads, k: Keys, v: Keys, decisions: PerRow, *, window: int, sinks: int = 0, segment_ids: Ids | None = None,
          places: Places | None = None, **kernel: Any) -> Heads:
    """Both kinds of rows are tiles of one launch: routed ones first (they take longest), then the local ones."""
    return _call("mixed", q, k, v, decisions, segment_ids, places, window=window, sinks=sinks, **kernel)


def both(q: Heads, k: Keys, v: Keys, decisions: PerRow, *, window: int, sinks: int = 0, segment_ids: Ids | None = None,
         places: Places | None = None, **kernel: Any) -> tuple[Heads, Heads]:
    """Two forward passes, and the one backward pass of `mixed`."""
    if window >= k.shape[1]:
        out = full(q, k, v, segment_ids=segment_ids, places=places, **kernel)
        return out, jnp.zeros_like(out)
    hows = tuple(_how(kind, q, k, segment_ids, places, limits, sinks, **kernel)
                 for kind, limits in (("all", None), ("all", window), ("mixed", window)))
    return _both(q, k, v, decisions, segment_ids, places, hows)


class _How(NamedTuple):
    """What is static in a call."""

    spec: Spec
    blocks: Blocks


def _how(kind: str, q: Heads, k: Keys, segment_ids: Ids | None, places: Places | None, window: int | None, sinks: int,
         interpret: bool = False, table: Blocks | None = None) -> _How:
    queries, heads, width = q.shape[1:]
    length = k.shape[1]
    spec = Spec(kind, length, heads, k.shape[2], width, window, 0 if window is None else min(sinks, length),
                segment_ids is not None, interpret, None if places is None else queries)
    table = table or blocks.table(blocks.architecture(), width, q.dtype.itemsize, blocks.loop_of(spec))
    return _How(spec, table)


def _call(kind: str, q: Heads, k: Keys, v: Keys, decisions: PerRow | None, segment_ids: Ids | None,
          places: Places | None, window: int | None = None, sinks: int = 0, **kernel: Any) -> Heads:
    if window is not None and window >= k.shape[1]:
        window, kind = None, "all" if kind == "mixed" else kind
        decisions = decisions if kind == "routed" else None
    how = _how(kind, q, k, segment_ids, places, window, sinks, **kernel)
    return _attend(q, k, v, decisions, segment_ids, places, how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q: Heads, k: Keys, v: Keys, decisions: PerRow | None, segment_ids: Ids | None, places: Places | None,
            how: _How) -> Heads:
    return _attend_forward(q, k, v, decisions, segment_ids, places, how)[0]


def _attend_forward(q, k, v, decisions, segment_ids, places, how):
    plan = make_plan(how.spec, q.shape[0], decisions, segment_ids, places)
    # Named, so that a rematerialised layer may keep them and spare its backward pass this kernel.
    out, lse = checkpoint_name(forward(how.spec, how.blocks.forward, q, k, v, plan), "attention")
    return out, (q, k, v, decisions, segment_ids, places, plan, out, lse)


def _attend_backward(how, saved, d_out):
    """Cotangents of _attend's arrays; of what is saved, `lse` is in working order."""
    (spec, tiles), (q, k, v, decisions, segment_ids, places, plan, out, lse) = how, saved
    d_out = d_out.astype(q.dtype)
    d_q, delta, ordered_q, ordered_d_out = backward_q(spec, tiles.backward_q, q, k, v, plan, out, lse, d_out)
    d_k, d_v = backward_kv(spec, tiles.backward_kv, ordered_q, k, v, plan, lse, delta, ordered_d_out)
    if spec.sinks:
        rows = None
        if spec.explicit:
            rows = token_rows(k.shape[:2], segment_ids, window=spec.window, sinks=spec.sinks, everything=decisions,
                              places=places)
        if spec.kind == "mixed":
            lse, delta = (take(x.swapaxes(1, 2), plan.rank).swapaxes(1, 2) for x in (lse, delta))
        d_k, d_v = add_sink_gradients(spec, tiles.sinks, d_k, d_v, q, k, v, rows, lse, delta, d_out)
    return d_q, d_k, d_v, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend_with_lse(q: Heads, k: Keys, v: Keys, segment_ids: Ids | None, places: Places | None, how: _How
                     ) -> tuple[Heads, Float[Array, "B Q N"]]:
    return _attend_with_lse_forward(q, k, v, segment_ids, places, how)[0]


def _attend_with_lse_forward(q, k, v, segment_ids, places, how):
    out, saved = _attend_forward(q, k, v, None, segment_ids, places, how)
    return (out, saved[-1].swapaxes(1, 2) / LOG2_E), saved


def _attend_with_lse_backward(how, saved, cotangents):
    return *_attend_backward(how, saved, cotangents[0])[:3], None, None


_attend_with_lse.defvjp(_attend_with_lse_forward, _attend_with_lse_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _both(q: Heads, k: Keys, v: Keys, decisions: PerRow, segment_ids: Ids | None, places: Places | None,
          hows: tuple[_How, _How, _How]) -> tuple[Heads, Heads]:
    return _both_forward(q, k, v, decisions, segment_ids, places, hows)[0]


def _both_forward(q, k, v, decisions, segment_ids, places, hows):
    (far, far_lse), (near, near_lse) = (
        forward(spec, tiles.forward, q, k, v, make_plan(spec, q.shape[0], None, segment_ids, places))
        for spec, tiles in hows[:2])
    out = jnp.where(decisions[:, :, None, None], far, near)
    lse = jnp.where(decisions[:, None, :], far_lse, near_lse)
    out, lse, difference = checkpoint_name((out, lse, far - near), "attention")
    return (out, difference), (q, k, v, decisions, segment_ids, places, out, lse)


def _both_backward(hows, saved, cotangents):
    *call, out, lse = saved
    q, _, _, decisions, segment_ids, places = call
    plan = make_plan(hows[2].spec, q.shape[0], decisions, segment_ids, places)
    index = plan.index[:, None, :]
    lse = jnp.where(index >= 0, jnp.take_along_axis(lse, jnp.maximum(index, 0), axis=2), DEAD)
    return _attend_backward(hows[2], (*call, plan, out, lse), cotangents[0])


_both.defvjp(_both_forward, _both_backward)
