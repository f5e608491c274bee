"""Folders that hold two answers: what transformers takes, or a refusal that names both; and other spellings of one."""

import errno
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_gguf import write_gguf
from tiny_qwen import BASE, TOKENS, weights, write_folder

from l2a_jax.errors import UserError
from l2a_jax.models.transformer import forward
from l2a_jax.sources import load_pretrained, read_config, source_hash, source_tokenizer


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


@pytest.fixture
def newer():
    return {name: tensor * np.float32(1.5) for name, tensor in weights(BASE).items()}


def test_a_newer_single_file_beside_old_shards(tmp_path, newer, caplog):
    alone = load_pretrained(write_folder(tmp_path / "alone", tensors=newer), "float32")
    both = write_folder(tmp_path / "both", shards=3)
    write_folder(both, tensors=newer)
    with caplog.at_level(logging.WARNING, "l2a_jax"):
        model = load_pretrained(both, "float32")
    assert same(model.params, alone.params) and source_hash(both) == alone.source_hash
    assert "model.safetensors is read" in caplog.text and "model.safetensors.index.json" in caplog.text


@pytest.mark.torch
def test_transformers_takes_the_single_file_too(tmp_path, newer):
    import torch
    from transformers import Qwen2ForCausalLM

    both = write_folder(tmp_path / "both", shards=3)
    write_folder(both, tensors=newer)
    model = load_pretrained(both, "float32")
    with torch.no_grad():
        theirs = Qwen2ForCausalLM.from_pretrained(both, dtype="float32")(torch.from_numpy(TOKENS)).logits.numpy()
    with jax.default_matmul_precision("float32"):
        found = np.asarray(forward(model.params, jnp.asarray(TOKENS), model.config).logits)
    assert np.abs(found - theirs).max() < 1e-3


def test_old_shards_that_are_gone_do_not_matter(tmp_path, newer):
    both = write_folder(tmp_path / "both", shards=3)
    for shard in both.glob("model-*"):
        shard.unlink()
    write_folder(both, tensors=newer)
    (both / "model.safetensors.index.json").write_text("{")
    load_pretrained(both)


@pytest.mark.parametrize("names", [["adapter_config.json", "adapter_model.safetensors"], ["adapter_config.json"],
                                   ["adapter_model.safetensors"], ["adapter_model.bin"]])
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_an_adapter_beside_a_model_or_alone(tmp_path, names, shards):
    if shards:
        write_folder(tmp_path, shards=shards)
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    for read in (load_pretrained, read_config):
        with pytest.raises(UserError) as error:
            read(tmp_path)
        assert names[0] in str(error.value) and "merge" in str(error.value)
        assert ("model.safetensors" in str(error.value).replace("adapter_model.safetensors", "")) == bool(shards)


def test_other_files_beside_the_weights_do_not_count(tmp_path):
    """transformers prefers safetensors to everything else."""
    write_folder(tmp_path)
    write_gguf(tmp_path / "other.gguf")
    for name in ("pytorch_model.bin", "consolidated.00.pth", "optimizer.safetensors",
                 "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_bytes(b"junk")
    load_pretrained(tmp_path)


def test_a_folder_of_gguf_files_names_them(tmp_path):
    for index in range(9):
        (tmp_path / f"q{index}.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"point at its file q0\.gguf, q1\.gguf, q2\.gguf and 6 more instead"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    with pytest.raises(UserError, match=r"has no weights: .*; q0\.gguf, q1\.gguf, q2\.gguf and 6 more cannot stand"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("entry", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors", "", 1])
def test_an_index_that_points_elsewhere(tmp_path, entry):
    write_folder(tmp_path / "model", shards=2)
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights(BASE), entry)}))
    with pytest.raises(UserError, match="has no weight_map from tensors to files"):
        load_pretrained(tmp_path / "model")


def test_a_tied_model_stored_as_its_output_matrix(tmp_path):
    expected = load_pretrained(write_folder(tmp_path / "a"), "float32")
    tensors = weights(BASE)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    model = load_pretrained(write_folder(tmp_path / "b", tensors=tensors), "float32")
    assert model.config == expected.config and same(model.params, expected.params)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_names_without_their_prefix(tmp_path, untied, shards):
    fields = {**BASE, "tie_word_embeddings": not untied}
    expected = load_pretrained(write_folder(tmp_path / "a", fields), "float32")
    tensors = {name.removeprefix("model."): tensor for name, tensor in weights(fields).items()}
    model = load_pretrained(write_folder(tmp_path / "b", fields, tensors, shards), "float32")
    assert model.config == expected.config and same(model.params, expected.params)


def test_names_with_another_prefix_end_in_a_short_message(tmp_path):
    tensors = {f"module.{name}": tensor for name, tensor in weights(BASE).items()}
    with pytest.raises(UserError, match=r"missing: .* and 26 more; left over: module\..* and 26 more") as error:
        load_pretrained(write_folder(tmp_path, tensors=tensors))
    assert len(str(error.value)) < 1_500


def test_an_index_of_many_missing_shards_or_tensors(tmp_path):
    write_folder(tmp_path, shards=30)
    for shard in sorted(tmp_path.glob("model-*"))[1:]:
        shard.unlink()
    with pytest.raises(UserError, match=r"missing shards .* and 17 more$"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json",
                                  "model-00002-of-00003.safetensors"])
def test_what_is_there_but_cannot_be_read_is_not_missing(tmp_path, monkeypatch, name):
    """Permissions, simulated: root may read everything."""
    write_folder(tmp_path, shards=3 if "-of-" in name else 1)
    write_gguf(tmp_path / "t.gguf")
    source_tokenizer(tmp_path / "t.gguf").save(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    real = Path.open

    def refusing(self, *args, **kwargs):
        if self.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refusing)
    monkeypatch.setattr("builtins.open", lambda file, *a, _open=open, **k: _open(file, *a, **k))
    with pytest.raises(UserError, match=rf"{name} cannot be read: Permission denied") as error:
        load_pretrained(tmp_path)
    assert "missing" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json",
                                  "special_tokens_map.json"])
def test_json_that_is_nested_too_deeply(tmp_path, name):
    write_folder(tmp_path, shards=2)
    write_gguf(tmp_path / "t.gguf")
    source_tokenizer(tmp_path / "t.gguf").save(tmp_path)
    (tmp_path / name).write_text('{"a": ' * 50_000 + "1" + "}" * 50_000)
    with pytest.raises(UserError, match=f"{name} is not readable JSON: it is nested too deeply"):
        load_pretrained(tmp_path)


def test_single_flipped_bits_in_a_header_are_refused_or_change_nothing(tmp_path):
    write_folder(tmp_path)
    expected, file = load_pretrained(tmp_path, "float32").params, tmp_path / "model.safetensors"
    data, random = file.read_bytes(), np.random.RandomState(0)
    refused = 0
    for _ in range(60):
        flipped = bytearray(data)
        flipped[random.randint(8 + int.from_bytes(data[:8], "little"))] ^= 1 << random.randint(8)
        file.write_bytes(flipped)
        try:
            assert same(load_pretrained(tmp_path, "float32").params, expected)
        except UserError:
            refused += 1
    assert refused > 50


def test_a_gguf_file_that_cannot_be_read(tmp_path, monkeypatch):
    write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (_ for _ in ()).throw(
        PermissionError(errno.EACCES, "Permission denied", str(self))))
    with pytest.raises(UserError, match=r"model\.gguf cannot be read: Permission denied"):
        load_pretrained(tmp_path / "model.gguf")


def test_a_folder_in_place_of_a_file(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read: Is a directory"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["x" * 300, "a/" + "y" * 5_000, "~nobody-of-this-name/x"])
def test_sources_that_cannot_be_named(source):
    for read in (load_pretrained, read_config, source_hash):
        with pytest.raises(UserError, match=r"does not exist|cannot be read: File name too long"):
            read(source)
