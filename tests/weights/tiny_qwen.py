"""Tiny Qwen2 models in every shape that the family takes, with weights from a formula.

The weights come out of `numpy.random.RandomState`, whose stream numpy guarantees never to change, so a stored
reference value needs no stored weights.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BASE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}


def _yarn(**more: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **more}


FAMILIES: dict[str, dict[str, Any]] = {
    "tied": BASE,
    "untied": {**BASE, "tie_word_embeddings": False},
    "many_groups": {**BASE, "hidden_size": 56, "num_attention_heads": 14, "num_key_value_heads": 2},
    "one_group": {**BASE, "num_key_value_heads": 1},
    "no_groups": {**BASE, "num_key_value_heads": 4},
    "wide_heads": {**BASE, "head_dim": 16},
    "narrow_heads": {**BASE, "head_dim": 6, "tie_word_embeddings": False},
    "large_base": {**BASE, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5},
    "parameters_spelling": {
        **{key: value for key, value in BASE.items() if key != "rope_theta"},
        "rope_parameters": {"rope_theta": 5_000.0, "rope_type": "default"},
    },
    "linear": {**BASE, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "yarn": {**BASE, "rope_scaling": _yarn()},
    "yarn_parameters": {
        **BASE,
        "rope_parameters": {**_yarn(beta_fast=16.0, beta_slow=2.0, attention_factor=1.3), "rope_theta": 20_000.0},
    },
    "yarn_mscale": {**BASE, "rope_scaling": _yarn(mscale=1.2, mscale_all_dim=0.7)},
}

TOKENS = np.random.RandomState(7).randint(0, BASE["vocab_size"], (2, 48))
"""Token ids [2, 48] for every family."""


def shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes, written out by hand: the library's own table is what is under test."""
    hidden, inner, heads = fields["hidden_size"], fields["intermediate_size"], fields["num_attention_heads"]
    width = fields.get("head_dim", hidden // heads)
    queries, keys = heads * width, fields["num_key_value_heads"] * width
    found = {"model.embed_tokens.weight": (fields["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        found |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (queries, hidden),
            f"{prefix}.self_attn.q_proj.bias": (queries,),
            f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.k_proj.bias": (keys,),
            f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.v_proj.bias": (keys,),
            f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
    if not fields["tie_word_embeddings"]:
        found["lm_head.weight"] = (fields["vocab_size"], hidden)
    return found


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values from the name alone; large enough for attention to be far from uniform, norms around 1."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name:
        return (1 + 0.2 * draw).astype(np.float32)
    return (draw * (0.3 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1]))).astype(np.float32)


def weights(fields: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor of a model under its Hugging Face name."""
    return {name: weight(name, shape) for name, shape in shapes(fields).items()}


def write_folder(
    folder: Path, fields: dict[str, Any] = BASE, tensors: dict[str, np.ndarray] | None = None, shards: int = 1
) -> Path:
    """A Hugging Face folder with one safetensors file, or several and an index."""
    tensors = weights(fields) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[shard::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def bfloat16(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors rounded to bfloat16."""
    return {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
