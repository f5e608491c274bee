"""A tiny GGUF model with a toy byte-level vocabulary, written with the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_qwen import weights

FIELDS: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
SPECIAL, ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</tool_call>"]
MERGES = [
    "Ġ t", "h e", "Ġt he", "i n", "e r", "a n", "Ġ a", "Ġa n", "Ġan d", "Ġ Ġ", "ĠĠ ĠĠ", "Ã ©", "â Ģ", "1 2",
    "' s", "Ċ Ċ",
]


def vocabulary() -> tuple[list[str], list[int]]:
    """Tokens and their GGUF types: 256 bytes, the merges' results, marks, and padding up to 320."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    tokens = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    tokens += [merge.replace(" ", "") for merge in MERGES]
    types = [1] * len(tokens) + [3] * len(SPECIAL) + [4] * len(ADDED)
    tokens += SPECIAL + ADDED
    padding = 320 - len(tokens)
    return tokens + [f"[PAD{i}]" for i in range(padding)], types + [5] * padding


def gguf_name(hf: str) -> str:
    """The GGUF name of a Hugging Face tensor, written out by hand."""
    for old, new in (
        ("model.layers.", "blk."), ("self_attn.o_proj", "attn_output"), ("self_attn.", "attn_"), ("_proj", ""),
        ("mlp.", "ffn_"), ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
        ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output"),
    ):
        hf = hf.replace(old, new)
    return hf


def write_gguf(
    path: Path,
    fields: dict[str, Any] = FIELDS,
    tensors: dict[str, np.ndarray] | None = None,
    formats: tuple[str, ...] = ("F32",),
    metadata: dict[str, Any] | None = None,
    tokenizer: bool = True,
) -> dict[str, np.ndarray]:
    """Write the file; matrices take the formats in turn. Returns what they dequantise to, under Hugging Face names.

    `metadata` replaces fields of the file by name, or leaves one out where it is None.
    """
    writer = gguf.GGUFWriter(path, (metadata or {}).get("general.architecture", "qwen2"))
    values: dict[str, Any] = {
        "qwen2.block_count": fields["num_hidden_layers"],
        "qwen2.context_length": fields["max_position_embeddings"],
        "qwen2.embedding_length": fields["hidden_size"],
        "qwen2.feed_forward_length": fields["intermediate_size"],
        "qwen2.attention.head_count": fields["num_attention_heads"],
        "qwen2.attention.head_count_kv": fields["num_key_value_heads"],
        "qwen2.rope.freq_base": fields["rope_theta"],
        "qwen2.attention.layer_norm_rms_epsilon": fields["rms_norm_eps"],
    }
    if tokenizer:
        tokens, types = vocabulary()
        values |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
            "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
            "tokenizer.ggml.bos_token_id": tokens.index("<|endoftext|>"),
            "tokenizer.ggml.add_bos_token": False,
        }
    for key, value in (values | (metadata or {})).items():
        if value is None or key == "general.architecture":
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}[type(value)]
        add(key, value)
    stored = {}
    for number, (name, tensor) in enumerate((weights(fields) if tensors is None else tensors).items()):
        format = gguf.GGMLQuantizationType[formats[number % len(formats)] if tensor.ndim == 2 else "F32"]
        data = gguf.quants.quantize(tensor, format)
        stored[name] = gguf.quants.dequantize(data, format).reshape(tensor.shape)
        writer.add_tensor(gguf_name(name), data, raw_dtype=format)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored
