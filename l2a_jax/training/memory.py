"""What a training step holds in memory: what a layer keeps for its backward pass, and whether it all fits.

The parts of a layer carry names (`checkpoint_name`); a mode of `--remat` says which named values are kept from the
forward pass. Everything else is computed again where the backward pass needs it, all but the decisions, which
`hidden_states` keeps in every mode. Per token and layer of the 0.5B model in bfloat16, "layer" keeps 2 KB, "mlp" 13 KB
(two attention sets: 20 KB), "elementwise" 19 KB more, "none" about 100 KB. Whether a step fits is told by the
compiler's own figures, before a byte of it is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from l2a_jax import device
from l2a_jax.errors import UserError
from l2a_jax.fields import check_value
from l2a_jax.models.params import Tree
from l2a_jax.training.tables import KEPT, Remat


def checkpoint_policy(mode: str, sharded: bool = False) -> Callable | bool:
    """The `remat` argument of `hidden_states`: a policy, True (keep nothing) or False (no rematerialisation).

    Where weights are `sharded`, they are gathered again in the backward pass in every mode: what was kept of them would
    be the whole model on every device. Raises UserError on an unknown mode.
    """
    check_value(mode, Remat, "--remat")
    if mode == "none":
        return _all_but_weights if sharded else False
    return jax.checkpoint_policies.save_only_these_names(*KEPT[mode]) if KEPT[mode] else True


def _all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """Neither what is gathered (of weights a `linear_call`) nor what is joined of it (q, k and v); nothing else of a
    layer is worth as much."""
    return primitive.name not in ("linear_call", "all_gather", "concatenate")


def tree_bytes(tree: Any) -> int:
    """Bytes that a device holds of all leaves; shapes suffice."""

    def held(leaf):
        sharding = getattr(leaf, "sharding", None)
        return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)

    return sum(math.prod(held(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def step_bytes(compiled: Any) -> int:
    """Peak bytes of a compiled step, on each device: arguments, temporaries and the outputs that do not reuse an
    argument."""
    analysis = compiled.memory_analysis()
    return (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
            - analysis.alias_size_in_bytes)


BATCH_BYTES = 20
"""Of a token in a `Batch`: five arrays of four bytes."""


def check_batch(batch_size: int, seq_len: int, token_bytes: int, *, grad_accum: int = 1, eval_batches: int = 0) -> None:
    """UserError, naming the flag, where the tokens of a batch alone, before any work on them, exceed the device.

    `token_bytes`: of one token's hidden state. `eval_batches`: that are generated and held for scoring.
    """
    have, micro = device.memory_bytes(), batch_size * seq_len
    for need, what in (
            (micro * (token_bytes + BATCH_BYTES), f"--batch-size {batch_size} rows of {seq_len} tokens"),
            (micro * grad_accum * BATCH_BYTES, f"--grad-accum {grad_accum} batches of {micro} tokens"),
            (micro * eval_batches * BATCH_BYTES, f"--eval-batches {eval_batches} batches of {micro} tokens")):
        if need > have:
            raise UserError(f"{what} need at least {need / 1e9:,.0f} GB and the device has {have / 1e9:.1f} GB; "
                            "expected fewer")


def check_fits(need: int, state: Any, frozen: Tree) -> None:
    """UserError with its parts where a compiled step needs more than the device has."""
    masters, optimizer, base = (tree_bytes(part) / 1e9 for part in (state.trainable, state.optimizer, frozen))
    rest = need / 1e9 - masters - optimizer - base
    refuse(need, f"frozen weights {base:.1f}, trained masters {masters:.1f}, optimizer {optimizer:.1f}, gradients and "
                 f"activations {rest:.1f}")


def refuse(need: int, parts: str) -> None:
    """UserError where a step's bytes on a device, with their `parts` in words, are more than it has."""
    have = device.memory_bytes()
    if need > have:
        raise UserError(f"this run needs about {need / 1e9:.1f} GB and the device has {have / 1e9:.1f} GB: {parts}. "
                        "Ways out: a smaller --batch-size (with --grad-accum), a shorter --seq-len, --remat layer, "
                        "--master-dtype bfloat16, a regime that trains less, or more devices (--mesh)")
