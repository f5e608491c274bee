"""Every field of a GGUF file that says how to compute: used as llama.cpp uses it, or refused."""

import math
import struct

import numpy as np
import pytest
from tiny_gguf import write_gguf
from tiny_qwen import weights

from l2a_jax.config import RopeScaling
from l2a_jax.errors import UserError
from l2a_jax.sources import load_pretrained, read_config

S = "qwen2.rope.scaling."


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, RopeScaling()),
        ({S + "factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"qwen2.rope.scale_linear": 2.0}, RopeScaling("linear", 2.0)),
        ({"qwen2.rope.scale_linear": 2.0, S + "factor": 4.0}, RopeScaling("linear", 4.0)),
        ({S + "factor": 0.0}, RopeScaling()),
        ({S + "factor": 1.0}, RopeScaling()),
        ({S + "type": "none", S + "factor": 4.0}, RopeScaling()),
        ({S + "type": "linear", S + "factor": 4.0, S + "attn_factor": 1.0}, RopeScaling("linear", 4.0)),
        ({S + "type": "yarn", S + "factor": 4.0, S + "original_context_length": 32}, RopeScaling("yarn", 4.0, 32)),
        ({S + "type": "yarn", S + "factor": 4.0, S + "attn_factor": 0.5, S + "finetuned": True},
         RopeScaling("yarn", 4.0, attention_factor=0.5 * (0.1 * math.log(4.0) + 1))),
        ({S + "type": "yarn", S + "factor": 2.0, S + "yarn_beta_fast": 16.0, S + "yarn_beta_slow": 2.0,
          S + "yarn_ext_factor": 1.0, S + "yarn_attn_factor": 1.0}, RopeScaling("yarn", 2.0, None, 16.0, 2.0)),
    ],
)
def test_rope_scaling_means_what_it_means_in_llama_cpp(tmp_path, metadata, expected):
    write_gguf(tmp_path / "model.gguf", metadata=metadata)
    assert read_config(tmp_path / "model.gguf")[0].rope == expected


NEUTRAL = {
    "general.type": "model", "general.file_type": 7, "general.name": "Qwen2.5 0.5B", "general.sampling.top_k": 20,
    "general.base_model.count": 1, "quantize.imatrix.file": "imatrix.dat", "mradermacher.quantize_version": "2",
    "qwen2.vocab_size": 320, "qwen2.attention.causal": True, "qwen2.expert_count": 0, "qwen2.logit_scale": 0.0,
    "qwen2.attention.scale": 0.0, "qwen2.attention.sliding_window": 128, "qwen2.pooling_type": 0,
    "qwen2.rope.dimension_count": 16, "qwen2.attention.max_alibi_bias": 0.0, "qwen2.final_logit_softcapping": 0.0,
    S + "yarn_log_multiplier": 0.0, "qwen2.use_parallel_residual": False, "qwen2.residual_scale": 1.0,
}


def test_fields_that_change_nothing(tmp_path):
    write_gguf(tmp_path / "plain.gguf")
    write_gguf(tmp_path / "more.gguf", metadata=NEUTRAL)
    assert read_config(tmp_path / "more.gguf") == read_config(tmp_path / "plain.gguf")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"qwen2.attention.sliding_window": 64}, "sliding_window is 64, which"),
        ({"qwen2.attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, which this library does not compute"),
        ({"qwen2.final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"qwen2.logit_scale": 0.0625}, "logit_scale is 0.0625"),
        ({"qwen2.embedding_scale": 12.0}, "embedding_scale is 12.0"),
        ({"qwen2.attention.scale": 0.1}, r"attention\.scale is"),
        ({"qwen2.attention.clamp_kqv": 8.0}, "clamp_kqv is 8.0"),
        ({"qwen2.attention.causal": False}, "causal is False"),
        ({"qwen2.expert_count": 60}, "expert_count is 60"),
        ({"qwen2.rope.dimension_sections": [8, 8, 0, 0]}, "the field qwen2.rope.dimension_sections .* does not know"),
        ({"qwen2.rope.freq_bese": 1e6}, "the field qwen2.rope.freq_bese"),
        ({"qwen2.attention.new_trick": "x" * 500}, "the field qwen2.attention.new_trick"),
        ({"qwen3.rope.freq_base": 1e6}, "qwen3.rope.freq_base, which is no field of a qwen2 model"),
        ({"adapter.lora.alpha": 16.0}, "adapter.lora.alpha, which is no field"),
        ({"general.type": "adapter"}, "holds 'adapter'"),
        ({"qwen2.vocab_size": 400}, "vocab_size is 400, token_embd.weight has 320 rows"),
        ({S + "type": "yarn", S + "factor": 4.0, S + "yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5; expected 1"),
        ({S + "attn_factor": 1.2}, "scales cos and sin by 1.2"),
        ({S + "factor": "4"}, "scaling.factor is '4'; expected a number"),
        ({S + "factor": 1e9}, "rope factor is 1000000000.0"),
        ({S + "alpha": 1000.0}, "scaling.alpha is 1000.0"),
        ({S + "type": "longrope", S + "factor": 4.0}, "'longrope'"),
        ({"qwen2.context_length": 0}, "max_positions is 0"),
        ({"qwen2.block_count": True}, "block_count is True; expected a whole number"),
    ],
)
def test_refused(tmp_path, metadata, message):
    write_gguf(tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(UserError, match=message) as error:
        read_config(tmp_path / "model.gguf")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_damaged_shapes_offsets_and_types_of_tensors_are_noticed(tmp_path):
    """Each tensor begins where the one before it ends, as llama.cpp demands: one flipped bit in the table shows."""
    whole, broken = tmp_path / "whole.gguf", tmp_path / "broken.gguf"
    write_gguf(whole, tensors=weights({**FIELDS_UNTIED}), fields=FIELDS_UNTIED, tokenizer=False)
    data = bytearray(whole.read_bytes())
    name = b"blk.1.attn_k.weight"
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    assert struct.unpack_from("<I", data, at)[0] == 2
    for place, bit in ((at + 4, 1), (at + 12, 4), (at + 20, 0), (at + 24, 5), (at + 24, 6), (at + 31, 7)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        broken.write_bytes(flipped)
        with pytest.raises(UserError, match=r"broken\.gguf"):
            load_pretrained(broken)


FIELDS_UNTIED = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
                 "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False}


@pytest.mark.parametrize("value", [0, 3, 48, 33])
def test_alignment_is_a_power_of_two(tmp_path, value):
    write_gguf(tmp_path / "a.gguf", tokenizer=False)
    data = (tmp_path / "a.gguf").read_bytes()
    count = struct.unpack_from("<Q", data, 16)[0]
    key = b"general.alignment"
    field = struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, value)
    (tmp_path / "b.gguf").write_bytes(data[:16] + struct.pack("<Q", count + 1) + field + data[24:])
    with pytest.raises(UserError, match=f"alignment is {value}"):
        load_pretrained(tmp_path / "b.gguf")


def test_arrays_of_arrays_end_in_one_sentence(tmp_path):
    key = b"general.tags"
    nested = struct.pack("<IQ", 9, 1) * 30_000 + struct.pack("<IQ", 4, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + struct.pack("<I", 9)
    (tmp_path / "deep.gguf").write_bytes(head + nested)
    with pytest.raises(UserError, match=r"not a readable GGUF file .*an array of arrays"):
        load_pretrained(tmp_path / "deep.gguf")


def test_many_missing_tensors_are_counted(tmp_path):
    tensors = {name: tensor for name, tensor in weights(FIELDS_UNTIED).items() if ".layers." not in name}
    tensors |= {f"strange.{i}": np.ones(1, np.float32) for i in range(40)}
    write_gguf(tmp_path / "a.gguf", fields=FIELDS_UNTIED, tensors=tensors)
    with pytest.raises(UserError, match=r"missing: blk\.0\..* and 12 more; left over: strange\.0, .* and 28 more$"):
        load_pretrained(tmp_path / "a.gguf")
