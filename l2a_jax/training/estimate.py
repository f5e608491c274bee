"""What a step holds on each device of a mesh, reckoned from shapes alone: for a mesh that is not there.

The compiler's own figures (`memory`) are exact and need the devices, or some made up. Of what is stored this is exact
too; of what lives for a while it is on the high side, as if nothing that could be freed early were.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.models.params import Tree, map_with_path, param_dtype, param_shapes
from l2a_jax.sharding import leaves
from l2a_jax.sharding.axes import Axes
from l2a_jax.training.loss import CHUNK
from l2a_jax.training.step import TrainState
from l2a_jax.training.tables import KEPT

_EVERYTHING = 3
"""With no rematerialisation a layer keeps about so many times what "elementwise" keeps: each operand of each product,
norm and activation."""


class Held(NamedTuple):
    """Bytes on each device. `gathered`: the weights that are whole for a while, with their gradients; `kept`: what the
    layers keep for the backward pass; `working`: what one layer and a chunk of logits need while they run."""

    frozen: int
    masters: int
    optimizer: int
    gradients: int
    gathered: int
    kept: int
    working: int

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = {"frozen weights": self.frozen, "trained masters": self.masters, "optimizer": self.optimizer,
                 "gradients": self.gradients, "weights gathered for a layer": self.gathered,
                 "kept for the backward pass": self.kept, "one layer and its logits at work": self.working}
        return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())


def held(like: TrainState, frozen: Tree, config: ModelConfig, layer: L2AConfig | None, *, axes: Axes, rows: int,
         seq_len: int, remat: str, dtype: Any, accumulate: int = 1, shards: int | None = None) -> Held:
    """Of a step from the state `like` (shapes suffice, of whole leaves) over micro-batches of `rows` x `seq_len` tokens
    of all devices together. `shards`: over how many leaves are dealt (None: all devices)."""
    shards, tokens = shards or axes.devices, -(-rows // axes.data) * -(-seq_len // axes.context)
    size = jnp.dtype(dtype).itemsize
    masters, base = (leaves.held_bytes(tree, shards) for tree in (like.trainable, frozen))
    gradients = leaves.held_bytes(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
                                               like.trainable), shards) * min(accumulate, 2)
    one, ends = weight_bytes(config, layer, dtype)
    # A layer at work and the next one on its way; of what is trained, gradients before they are dealt out.
    gathered = (2 * one + ends) if shards > 1 else 0
    if "mlp" in like.trainable.get("layers", {}):
        # Summed over devices in the dtype of masters, and that of the head over tokens in float32.
        wide = max(leaf.dtype.itemsize for leaf in jax.tree.leaves(like.trainable["layers"]["mlp"]))
        gathered += one * max(wide // size, 1) + 2 * ends
    return Held(base, masters, leaves.held_bytes(like.optimizer, shards), gradients, gathered,
                tokens * config.num_layers * kept_of_token(config, layer, remat, size),
                tokens * working_of_token(config, layer, size, rows_joined=axes.context)
                + 2 * min(CHUNK, tokens) * config.vocab_size * 4)


def weight_bytes(config: ModelConfig, layer: L2AConfig | None, dtype: Any) -> tuple[int, int]:
    """Of one layer, and of all that is outside the layers, in the dtype in which they compute."""
    one = ends = 0

    def add(path, shape):
        nonlocal one, ends
        count = math.prod(shape) * param_dtype(path, dtype).itemsize
        if path.startswith("layers/"):
            one += count // config.num_layers
        else:
            ends += count

    map_with_path(add, param_shapes(config, layer))
    return one, ends


def kept_of_token(config: ModelConfig, layer: L2AConfig | None, remat: str, size: int) -> int:
    """Bytes that a layer keeps of a token for its backward pass in this mode of `--remat`; `size`: of a number."""
    sets = 1 if layer is None or layer.share_attention else 2
    paths = 1 if layer is None else 2
    heads = config.num_heads * config.head_dim
    named = {"qkv": sets * (heads + 2 * config.num_kv_heads * config.head_dim) * size,
             "attention": paths * (heads * size + 4 * config.num_heads),  # with the log of each row's sum
             "residual": (2 if layer is not None and layer.topology == "sequential" else 1) * config.hidden_size * size,
             "mlp": 2 * config.intermediate_size * size}
    stream = config.hidden_size * size
    if remat == "none":
        return _EVERYTHING * (stream + sum(named.values()))
    return stream + sum(named[name] for name in KEPT[remat])


def working_of_token(config: ModelConfig, layer: L2AConfig | None, size: int, rows_joined: int = 1) -> int:
    """Bytes of a token while one layer runs backward: what it would keep without rematerialisation and the gradients of
    that; with the keys and values of all `rows_joined` parts of its row, and their gradients."""
    sets = 1 if layer is None or layer.share_attention else 2
    keys = 2 * config.num_kv_heads * config.head_dim
    joined = sets * keys * 2 * size * rows_joined if rows_joined > 1 else 0
    return 2 * kept_of_token(config, layer, "elementwise", size) + joined
