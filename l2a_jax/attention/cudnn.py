"""cuDNN's fused attention through `jax.nn.dot_product_attention`, where its semantics are ours."""

from __future__ import annotations

import jax

from l2a_jax import device
from l2a_jax.attention.api import Call
from l2a_jax.attention.reference import Heads, Keys


def machine_why_not() -> str | None:
    """cuDNN is NVIDIA's."""
    return None if device.platform() == "gpu" else "cuDNN needs an NVIDIA GPU"


def why_not(call: Call) -> str | None:
    """cuDNN knows causal and windowed causal attention in half precision, nothing else."""
    if call.operation == "decode":
        return "cuDNN has no per-row range of keys"
    if call.operation in ("routed", "mixed", "both"):
        return "cuDNN has no per-token choice of keys"
    if call.operation == "local_with_lse":
        return "cuDNN keeps its log-sum-exp to itself"
    if call.placed:
        return "cuDNN has no queries that are a part of the tokens"
    if call.dtype not in ("bfloat16", "float16"):
        return f"cuDNN attention takes bfloat16 or float16, not {call.dtype}"
    if call.sinks:
        return "cuDNN has no attention sinks in a window"
    if call.segmented:
        return "cuDNN's packed rows are Hopper-only and know no padding rows"
    if call.width % 8 or call.width > 128:
        return f"cuDNN attention takes head widths up to 128 in steps of 8, not {call.width}"
    return None


def full(q: Heads, k: Keys, v: Keys, *, segment_ids: None = None) -> Heads:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def local(q: Heads, k: Keys, v: Keys, *, window: int, sinks: int = 0, segment_ids: None = None) -> Heads:
    # W keys with the token itself are W - 1 to the left. is_causal must be named: without it the window
    # (W - 1, 0) silently attends to the future (jax pull request 39576).
    left = min(window, q.shape[1]) - 1
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=(left, 0), implementation="cudnn")
