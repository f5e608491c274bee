"""Bad sources: each is one clear UserError that names the file, key or tensor."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_qwen import BASE, bfloat16, weights, write_folder

from l2a_jax import sources
from l2a_jax.config import MODELS, L2AConfig
from l2a_jax.errors import UserError
from l2a_jax.sources import convert, load_pretrained, read_config, source_hash
from l2a_jax.weights import export as exporting
from l2a_jax.weights import save_pretrained


def refused(source, message, dtype="bfloat16"):
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(source, dtype)
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(tmp_path, **tensors):
    """A folder with some tensors replaced (None: left out); `__` in a keyword stands for a dot."""
    stored = weights(BASE)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        stored.pop(name, None)
        if tensor is not None:
            stored[name] = tensor
    return write_folder(tmp_path / "model", tensors=stored)


def test_everything_missing_and_left_over_in_one_error(tmp_path):
    folder = changed(tmp_path, model__norm__weight=None, model__layers__1__mlp__up_proj__weight=None,
                     model__extra=np.ones(2, np.float32), model__layers__0__self_attn__q_norm__weight=np.ones(2, "f4"))
    message = refused(folder, "does not fit its configuration")
    missing, left_over = message.split("; ")[1:]
    assert missing.startswith("missing: ") and left_over.startswith("left over: ")
    assert "model.norm.weight" in missing and "model.layers.1.mlp.up_proj.weight" in missing
    assert "model.extra" in left_over and "model.layers.0.self_attn.q_norm.weight" in left_over


def test_wrong_shape(tmp_path):
    folder = changed(tmp_path, model__norm__weight=np.ones(47, np.float32))
    refused(folder, r"wrong shape: model.norm.weight is \[47\], expected \[48\]")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["float32", ml_dtypes.bfloat16])
def test_not_finite(tmp_path, value, kind):
    tensor = weights(BASE)["model.layers.2.self_attn.o_proj.weight"]
    tensor[3, 4] = value
    tensors = {name: array.astype(kind) for name, array in weights(BASE).items()}
    tensors["model.layers.2.self_attn.o_proj.weight"] = tensor.astype(kind)
    folder = write_folder(tmp_path, tensors=tensors)
    refused(folder, "NaN or an infinity in model.layers.2.self_attn.o_proj.weight")


def test_too_large_for_half_precision(tmp_path):
    folder = changed(tmp_path, model__norm__weight=np.full(48, 1e6, np.float32))
    refused(folder, "values beyond float16 in model.norm.weight", "float16")
    load_pretrained(folder, "bfloat16")


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.float64, ml_dtypes.float8_e4m3fn])
def test_stored_in_another_dtype(tmp_path, kind):
    refused(changed(tmp_path, model__norm__weight=np.ones(48, kind)), "model.norm.weight is stored as .*; expected one")


@pytest.mark.parametrize("dtype", ["int8", "float64", "bf16", 3, None])
def test_asked_for_in_another_dtype(tmp_path, dtype):
    refused(write_folder(tmp_path), "expected float32, bfloat16 or float16", dtype)


def test_truncated_and_corrupt_safetensors(tmp_path):
    folder = write_folder(tmp_path)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for broken in (b"", data[:5], data[:500], data[: len(data) // 2], data[:-1], b"x" * 1_000, data + b"x"):
        file.write_bytes(broken)
        refused(folder, "model.safetensors is not a readable safetensors file")


def test_missing_shard(tmp_path):
    folder = write_folder(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "missing shard model-00002-of-00003.safetensors")
    with pytest.raises(UserError, match="missing shard"):
        source_hash(folder)


def test_a_shard_without_what_the_index_promises(tmp_path):
    folder = write_folder(tmp_path, shards=3)
    save_file({"model.norm.weight": np.ones(48, np.float32)}, folder / "model-00002-of-00003.safetensors")
    refused(folder, "the index promises tensors that its shards do not hold|is stored in")


def test_a_tensor_in_two_shards(tmp_path):
    folder = write_folder(tmp_path, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file(weights(BASE), folder / "model-00001-of-00002.safetensors")
    assert index["weight_map"]
    refused(folder, "is stored in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_broken_index(tmp_path, text):
    folder = write_folder(tmp_path, shards=2)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "model.safetensors.index.json")


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    refused(tmp_path, "has no weights: expected model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "PyTorch .bin files are not read")


def test_config_missing_or_broken(tmp_path):
    folder = write_folder(tmp_path)
    for text in ("", "{", "[1]", "\x00"):
        (folder / "config.json").write_text(text)
        refused(folder, "config.json")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    refused(folder, "config.json is not readable JSON")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_config(folder)


def test_wrong_architecture(tmp_path):
    refused(write_folder(tmp_path, {**BASE, "model_type": "llama"}, weights(BASE)), "model of type 'llama'")


def test_the_configuration_of_another_size(tmp_path):
    folder = write_folder(tmp_path, {**BASE, "intermediate_size": 96}, weights(BASE))
    assert refused(folder, "wrong shape").count("expected [") == 9


def test_an_untied_model_needs_its_output_matrix(tmp_path):
    refused(write_folder(tmp_path, {**BASE, "tie_word_embeddings": False}, weights(BASE)), "missing: lm_head.weight")


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder/x", "/no/such/folder", "a/b.gguf", "x.gguf", ""])
def test_no_such_source(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused(name, "does not exist; expected a hub id|has no config.json")


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.txt").write_text("hello")
    refused(tmp_path / "model.txt", "is not a model; expected a hub id, a folder, or a .gguf file")
    (tmp_path / "model.gguf").write_text("hello, I am not a model")
    refused(tmp_path / "model.gguf", "not a readable GGUF file")


def test_the_folder_of_a_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    refused(tmp_path, "has no config.json; point at its file model.gguf instead")


@pytest.mark.parametrize("raised", ["offline", "connection", "timeout", "absent"])
def test_hub_id_without_network(monkeypatch, raised):
    import huggingface_hub as hub
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    class TransportError(Exception):
        """Stands for what the HTTP library raises, which is no OSError."""

    errors = {
        "offline": OfflineModeIsEnabled("offline"),
        "connection": TransportError("no route"),
        "timeout": TimeoutError("slow"),
        "absent": LocalEntryNotFoundError("not cached"),
    }

    def fail(*args, **kwargs):
        raise errors[raised]

    monkeypatch.setattr(hub, "snapshot_download", fail)
    refused("Qwen/Qwen2.5-0.5B", "cannot download Qwen/Qwen2.5-0.5B from the hub .*point at a folder or a .gguf file")


def test_hub_id_in_offline_mode(tmp_path):
    """The real client, told to stay offline with an empty cache."""
    code = ("from l2a_jax.sources import load_pretrained\nfrom l2a_jax.errors import UserError\n"
            "try: load_pretrained('Qwen/Qwen2.5-0.5B')\nexcept UserError as error: print('refused:', error)")
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "JAX_PLATFORMS": "cpu",
             "PYTHONPATH": str(Path(sources.__file__).parents[1])},
    )
    assert run.stdout.startswith("refused: cannot download Qwen/Qwen2.5-0.5B"), run.stderr


def test_hub_id_is_downloaded_once_and_read_as_a_folder(tmp_path, monkeypatch):
    import huggingface_hub as hub

    folder = write_folder(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda hub_id, allow_patterns: str(folder))
    assert load_pretrained("owner/name").source_hash == source_hash(folder)


def test_output_is_not_overwritten(tmp_path):
    source = write_folder(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(UserError, match="out is not empty"):
        convert(source, tmp_path / "out")
    with pytest.raises(UserError, match="exists and is not a folder"):
        convert(source, tmp_path / "in" / "config.json")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]


def test_unwritable_output(tmp_path):
    source = write_folder(tmp_path / "in")
    for out in (source / "config.json" / "out", "/proc/out"):
        with pytest.raises(UserError, match="cannot write"):
            convert(source, out)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written(tmp_path, monkeypatch, error):
    """The disk fills up, or Ctrl-C comes, in the middle of the weights."""
    write = exporting.write_safetensors

    def fails(path, tensors):
        write(path, dict(list(tensors.items())[:5]))
        raise error

    monkeypatch.setattr(exporting, "write_safetensors", fails)
    source = write_folder(tmp_path / "in")
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        convert(source, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_a_bad_source_leaves_no_output(tmp_path):
    tensors = bfloat16(weights(BASE))
    tensors["model.norm.weight"][0] = np.nan
    with pytest.raises(UserError, match="NaN"):
        convert(write_folder(tmp_path / "in", tensors=tensors), tmp_path / "deep" / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_an_empty_folder_may_be_the_output(tmp_path):
    (tmp_path / "out").mkdir()
    convert(write_folder(tmp_path / "in"), tmp_path / "out")
    load_pretrained(tmp_path / "out")


def test_parameters_of_another_layout_are_not_written(tmp_path):
    model = load_pretrained(write_folder(tmp_path / "in"))
    with pytest.raises(ValueError, match="layers/router/kernel"):
        save_pretrained(tmp_path / "out", model.params, model.config, L2AConfig())
    with pytest.raises(ValueError, match=r"\(96, 48\); expected \(151936, 896\)"):
        save_pretrained(tmp_path / "out", model.params, MODELS["qwen2.5-0.5b"])
    assert not (tmp_path / "out").exists()
