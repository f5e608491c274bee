"""Two tables of names: where each leaf of our tree, and each size of a model, stands in a Hugging Face folder and in a
GGUF file.

Both directions read it: `tensor_map` lists every tensor that a model must have, so whatever a source holds beyond it
is left over and whatever it lacks is missing. The second attention set and the router carry the names of the L2A
authors' release (arXiv 2603.17484): plain names are the local set, `*_global` the global one, `sigmoid_linear` the
router, and `sigmoid_*` what ours has beyond it. GGUF knows no routing, so only plain models come from there.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.models.params import by_path, param_shapes

KEEP, TRANSPOSE, ROW = "keep", "transpose", "row"
"""How a stored tensor becomes a leaf: as it is; [out, in] -> [in, out]; or [1, D] -> [D]."""

IGNORED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Stored by old versions of transformers, derived from the configuration by everybody."""


class Row(NamedTuple):
    """A leaf (or one layer of it), its Hugging Face name and its GGUF name; `{layer}` counts from 0."""

    path: str
    hf: str
    gguf: str | None
    transform: str


def _attention(name: str, norm: str, suffix: str = "") -> list[Row]:
    rows = [Row(f"layers/{norm}/scale", f"model.layers.{{layer}}.input_layernorm{suffix}.weight",
                "blk.{layer}.attn_norm.weight", KEEP)]
    for short, long in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")):
        hf, gguf = f"model.layers.{{layer}}.self_attn.{short}_proj{suffix}", f"blk.{{layer}}.attn_{long}"
        rows.append(Row(f"layers/{name}/{short}/kernel", f"{hf}.weight", f"{gguf}.weight", TRANSPOSE))
        if short != "o":
            rows.append(Row(f"layers/{name}/{short}/bias", f"{hf}.bias", f"{gguf}.bias", KEEP))
    return rows


_TWO_SETS = _attention("attention_local", "norm_local") + _attention("attention_global", "norm_global", "_global")
TABLE: dict[str, Row] = {
    row.path: row
    for row in (
        Row("embed/embedding", "model.embed_tokens.weight", "token_embd.weight", KEEP),
        *_attention("attention", "norm_attention"),
        *(row._replace(gguf=None) for row in _TWO_SETS),
        Row("layers/router/kernel", "model.layers.{layer}.self_attn.sigmoid_linear.weight", None, ROW),
        *(Row(f"layers/router/{leaf}", f"model.layers.{{layer}}.self_attn.sigmoid_{name}", None, transform)
          for leaf, name, transform in (
              ("signals", "signals.weight", ROW), ("hidden/kernel", "hidden.weight", TRANSPOSE),
              ("hidden/bias", "hidden.bias", KEEP), ("hidden/signals", "hidden_signals.weight", TRANSPOSE),
              ("hidden/out", "hidden_out.weight", ROW))),
        Row("layers/mlp/gate/kernel", "model.layers.{layer}.mlp.gate_proj.weight", "blk.{layer}.ffn_gate.weight",
            TRANSPOSE),
        Row("layers/mlp/up/kernel", "model.layers.{layer}.mlp.up_proj.weight", "blk.{layer}.ffn_up.weight", TRANSPOSE),
        Row("layers/mlp/down/kernel", "model.layers.{layer}.mlp.down_proj.weight", "blk.{layer}.ffn_down.weight",
            TRANSPOSE),
        Row("layers/norm_mlp/scale", "model.layers.{layer}.post_attention_layernorm.weight",
            "blk.{layer}.ffn_norm.weight", KEEP),
        Row("norm_final/scale", "model.norm.weight", "output_norm.weight", KEEP),
        Row("unembed/kernel", "lm_head.weight", "output.weight", TRANSPOSE),
    )
}


class Size(NamedTuple):
    """A size of `ModelConfig`, by its key in `config.json` and its field in a GGUF file."""

    hf: str
    gguf: str


SIZES = {
    "hidden_size": Size("hidden_size", "embedding_length"),
    "intermediate_size": Size("intermediate_size", "feed_forward_length"),
    "num_layers": Size("num_hidden_layers", "block_count"),
    "num_heads": Size("num_attention_heads", "attention.head_count"),
    "num_kv_heads": Size("num_key_value_heads", "attention.head_count_kv"),
    "head_dim": Size("head_dim", "attention.key_length"),
    "max_positions": Size("max_position_embeddings", "context_length"),
}
"""But for the vocabulary's: of a GGUF file it is the number of rows of its embedding."""


class Place(NamedTuple):
    """Where a stored tensor goes: a leaf, the layer in it (None: the whole leaf), how, and its stored shape."""

    path: str
    layer: int | None
    transform: str
    shape: tuple[int, ...]


def tensor_map(config: ModelConfig, l2a_config: L2AConfig | None = None, kind: str = "hf") -> dict[str, Place]:
    """Every tensor of a model by its stored name, layer by layer; `kind` is "hf" or "gguf".

    Shapes are as stored by Hugging Face ([out, in] for kernels), which are the reversed dimensions of GGUF.
    """
    leaves = by_path(param_shapes(config, l2a_config))

    def place(path: str, layer: int | None, shape: tuple[int, ...]) -> tuple[str, Place]:
        row = TABLE[path]
        stored = {KEEP: shape, TRANSPOSE: shape[::-1], ROW: (1, *shape)}[row.transform]
        return getattr(row, kind).format(layer=layer), Place(path, layer, row.transform, stored)

    layered = [path for path in leaves if path.startswith("layers/")]
    return dict([place(path, None, shape) for path, shape in leaves.items() if path not in layered]
                + [place(path, layer, leaves[path][1:]) for layer in range(config.num_layers) for path in layered])


def put(leaf: Float[np.ndarray, "*shape"], transform: str, rows: Float[np.ndarray, "rows ..."], start: int) -> None:
    """Write stored rows `start`, `start + 1`, ... into one layer of a leaf."""
    if transform == ROW:
        leaf[...] = rows[0]
    elif transform == TRANSPOSE:
        leaf[:, start : start + len(rows)] = rows.T
    else:
        leaf[start : start + len(rows)] = rows


def take(leaf: Float[Array, "*shape"], transform: str) -> Float[np.ndarray, "*stored"]:
    """The stored tensor of one layer of a leaf: the inverse of `put` over all rows."""
    array = np.asarray(leaf)
    return array[None] if transform == ROW else array.T if transform == TRANSPOSE else array
