"""Will it fit? The compiler's own figures for a step, before a byte of it is allocated."""

from __future__ import annotations

import math
import os
import pathlib
from typing import Any

import jax

from l2a_jax.errors import UserError
from l2a_jax.models.params import Tree


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves; shapes suffice."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def step_bytes(compiled: Any) -> int:
    """Peak bytes of a compiled step: arguments, temporaries and the outputs that do not reuse an argument."""
    analysis = compiled.memory_analysis()
    return (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
            - analysis.alias_size_in_bytes)


def device_bytes() -> int:
    """Memory that this process may use: the accelerator's limit, or the machine's (or container's) on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return physical if text == "max" else min(physical, int(text))


BATCH_BYTES = 20
"""Of a token in a `Batch`: five arrays of four bytes."""


def check_batch(batch_size: int, seq_len: int, token_bytes: int, *, grad_accum: int = 1, eval_batches: int = 0) -> None:
    """UserError, naming the flag, where the tokens of a batch alone, before any work on them, exceed the device.

    `token_bytes`: of one token's hidden state. `eval_batches`: that are generated and held for scoring.
    """
    have, micro = device_bytes(), batch_size * seq_len
    for need, what in (
            (micro * (token_bytes + BATCH_BYTES), f"--batch-size {batch_size} rows of {seq_len} tokens"),
            (micro * grad_accum * BATCH_BYTES, f"--grad-accum {grad_accum} batches of {micro} tokens"),
            (micro * eval_batches * BATCH_BYTES, f"--eval-batches {eval_batches} batches of {micro} tokens")):
        if need > have:
            raise UserError(f"{what} need at least {need / 1e9:,.0f} GB and the device has {have / 1e9:.1f} GB; "
                            "expected fewer")


def check_fits(compiled: Any, state: Any, frozen: Tree) -> int:
    """The estimate in bytes; UserError with its parts where it exceeds the device."""
    need, have = step_bytes(compiled), device_bytes()
    if need > have:
        masters, optimizer, base = (tree_bytes(part) / 1e9 for part in (state.trainable, state.optimizer, frozen))
        rest = need / 1e9 - masters - optimizer - base
        raise UserError(
            f"this run needs about {need / 1e9:.1f} GB and the device has {have / 1e9:.1f} GB: frozen weights "
            f"{base:.1f}, trained masters {masters:.1f}, optimizer {optimizer:.1f}, gradients and activations "
            f"{rest:.1f}. Ways out: a smaller --batch-size (with --grad-accum), a shorter --seq-len, "
            "--remat layer, --master-dtype bfloat16, or a regime that trains less")
    return need
