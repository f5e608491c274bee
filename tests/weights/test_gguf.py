"""GGUF files: every block format, the model's fields, and what is refused."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_gguf import FIELDS, FORMATS, write_gguf
from tiny_qwen import weights, write_folder

from l2a_jax.config import RopeScaling
from l2a_jax.errors import UserError
from l2a_jax.sources import load_pretrained, read_config, source_hash
from l2a_jax.weights import assemble as assembling
from l2a_jax.weights.gguf_file import GGUFFile


def dequantisable():
    found = []
    for format, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), format)
            found.append(format)
        except NotImplementedError:
            pass
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("formats", [("F32",), FORMATS])
def test_the_tree_is_that_of_the_same_tensors_as_safetensors(tmp_path, monkeypatch, tied, formats):
    monkeypatch.setattr(assembling, "BLOCK_ELEMENTS", 1_000)  # so that every tensor takes several blocks
    fields = {**FIELDS, "tie_word_embeddings": tied}
    stored = write_gguf(tmp_path / "model.gguf", fields, formats=formats)
    ours = load_pretrained(tmp_path / "model.gguf", jnp.float32)
    theirs = load_pretrained(write_folder(tmp_path / "hf", fields, stored), jnp.float32)
    assert ours.config == theirs.config and ours.config.tie_embeddings == tied
    assert jax.tree.structure(ours.params) == jax.tree.structure(theirs.params)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


@pytest.mark.parametrize("format", dequantisable(), ids=lambda format: format.name)
def test_every_format_in_blocks_of_rows(tmp_path, format):
    block, size = gguf.GGML_QUANT_SIZES[format]
    width = max(block, 256)
    # Bytes below 0x3c keep every half-precision scale finite and small.
    raw = np.random.RandomState(0).randint(0, 0x3C, (10, width // block * size)).astype(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.add_tensor("before", np.ones(3, np.float32))
    writer.add_tensor("matrix", raw, raw_dtype=format)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "model.gguf")
    assert file.shapes == {"before": (3,), "matrix": (10, width)}
    whole = gguf.quants.dequantize(raw, format)
    np.testing.assert_array_equal(file.rows("matrix", 0, 10), whole)
    np.testing.assert_array_equal(np.concatenate([file.rows("matrix", 0, 3), file.rows("matrix", 3, 10)]), whole)
    np.testing.assert_array_equal(file.rows("before", 1, 3), np.ones(2, np.float32))


def test_the_formats_under_test_include_the_usual_ones():
    assert {"Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS", "BF16"} <= {format.name for format in dequantisable()}


def test_configuration(tmp_path):
    write_gguf(tmp_path / "a.gguf", metadata={
        "qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 64, "qwen2.attention.key_length": 16,
    })
    config, l2a_config = read_config(tmp_path / "a.gguf")
    assert l2a_config is None
    assert config.rope == RopeScaling("yarn", 4.0, 64)
    assert (config.rms_norm_eps, config.rope_theta, config.vocab_size) == (1e-6, 10_000.0, 320)
    write_gguf(tmp_path / "b.gguf", metadata={"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 2.0})
    assert read_config(tmp_path / "b.gguf")[0] == dataclasses.replace(config, rope=RopeScaling("linear", 2.0))


def test_a_file_without_a_tokenizer(tmp_path):
    write_gguf(tmp_path / "a.gguf", tokenizer=False)
    assert load_pretrained(tmp_path / "a.gguf").tokenizer is None


def test_the_hash_is_of_the_content(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf")
    write_gguf(tmp_path / "c.gguf", formats=("F16",))
    assert source_hash(tmp_path / "a.gguf") == source_hash(tmp_path / "b.gguf") != source_hash(tmp_path / "c.gguf")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "llama"}, "architecture 'llama'; expected 'qwen2'"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"qwen2.embedding_length": None}, "misses the field qwen2.embedding_length"),
        ({"qwen2.attention.layer_norm_rms_epsilon": None}, "misses the field .*rms_epsilon"),
        ({"qwen2.embedding_length": "64"}, "embedding_length is '64'; expected a whole number"),
        ({"qwen2.block_count": 2.0}, "block_count is 2.0"),
        ({"qwen2.rope.freq_base": "wide"}, "unusable configuration"),
        ({"qwen2.embedding_length": 32}, "wrong shape: token_embd.weight is .320, 64., expected .320, 32."),
        ({"qwen2.block_count": 3}, "missing: blk.2.attn_k.bias, .*blk.2.attn_norm.weight"),
        ({"qwen2.block_count": 1}, "left over: blk.1.attn_norm.weight"),
        ({"qwen2.block_count": 2**31 - 1}, "2147483647 layers"),
        ({"qwen2.attention.head_count": 0}, "unusable configuration"),
        ({"qwen2.rope.dimension_count": 8}, "rope.dimension_count is 8"),
        ({"qwen2.rope.scaling.type": "longrope"}, "scales RoPE by 'longrope'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer of model 'llama'"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"tokenizer.ggml.merges": None}, "one of merges"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "a list of tokens"),
        ({"tokenizer.ggml.tokens": 3, "tokenizer.ggml.token_type": None}, "a list of tokens"),
        ({"tokenizer.ggml.merges": ["qq zz"]}, "merges do not fit"),
        ({"tokenizer.ggml.eos_token_id": 9_999}, "eos_token_id is 9999"),
    ],
)
def test_refused(tmp_path, metadata, message):
    write_gguf(tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path / "model.gguf")


def test_missing_and_left_over_tensors_are_all_listed(tmp_path):
    tensors = weights(FIELDS)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.extra"] = np.ones(3, np.float32)
    write_gguf(tmp_path / "model.gguf", tensors=tensors)
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path / "model.gguf")
    assert all(name in str(error.value) for name in ("output_norm.weight", "blk.1.ffn_up.weight", "blk.0.ffn_extra"))


def test_a_nan_is_named(tmp_path):
    tensors = weights(FIELDS)
    tensors["model.layers.1.mlp.down_proj.weight"][5, 7] = np.nan
    write_gguf(tmp_path / "model.gguf", tensors=tensors)
    with pytest.raises(UserError, match=r"NaN or an infinity in blk\.1\.ffn_down\.weight"):
        load_pretrained(tmp_path / "model.gguf")


def test_every_truncation_is_one_clear_error(tmp_path):
    whole = tmp_path / "whole.gguf"
    write_gguf(whole)
    data = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 10, 24, 100, 1_000, 5_000, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            load_pretrained(cut)


def test_corrupt_headers_never_escape_as_another_error(tmp_path):
    whole = tmp_path / "whole.gguf"
    write_gguf(whole)
    data = np.frombuffer(whole.read_bytes(), np.uint8)
    random = np.random.RandomState(0)
    refused = 0
    for _ in range(60):
        broken = data.copy()
        broken[random.randint(0, 12_000, 12)] = random.randint(0, 256, 12)
        (tmp_path / "broken.gguf").write_bytes(broken.tobytes())
        try:
            load_pretrained(tmp_path / "broken.gguf")
        except UserError:
            refused += 1
    assert refused > 20
