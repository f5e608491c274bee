"""The two commands as a user runs them: exit status, one line of error, and nothing half-written."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model_type": "qwen2", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "tie_word_embeddings": True,
}


@pytest.fixture
def model(tmp_path):
    """A folder of random float16 weights."""
    draw = np.random.RandomState(0).standard_normal
    tensors = {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,)}
    for layer in range(2):
        for name, shape in {
            "input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,),
            "self_attn.q_proj.weight": (16, 16), "self_attn.q_proj.bias": (16,),
            "self_attn.k_proj.weight": (8, 16), "self_attn.k_proj.bias": (8,),
            "self_attn.v_proj.weight": (8, 16), "self_attn.v_proj.bias": (8,),
            "self_attn.o_proj.weight": (16, 16),
            "mlp.gate_proj.weight": (24, 16), "mlp.up_proj.weight": (24, 16), "mlp.down_proj.weight": (16, 24),
        }.items():
            tensors[f"model.layers.{layer}.{name}"] = shape
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({name: draw(shape).astype(np.float16) for name, shape in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def call(capsys):
    """Run a command in this process: (status, stdout, stderr)."""

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"command_{name[:-3]}", ROOT / "convert" / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        status = module.main(list(map(str, arguments)))
        return status, *capsys.readouterr()

    return run


def command(name, *arguments):
    """Run a command as a user does."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, ROOT / "convert" / name, *map(str, arguments)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
    )


def test_there_and_back(model, tmp_path):
    into = command("from_hf.py", model, tmp_path / "converted", "--dtype", "float16")
    assert into.returncode == 0, into.stderr
    assert into.stdout.startswith(f"wrote {tmp_path / 'converted'}: plain Qwen2, ") and "float16" in into.stdout
    back = command("to_hf.py", tmp_path / "converted", tmp_path / "back", "--dtype", "float16")
    assert back.returncode == 0, back.stderr
    source, result = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "back"))
    assert source.keys() == result.keys()
    assert all(source[name].tobytes() == result[name].tobytes() for name in source)


def test_an_error_as_a_user_sees_it(model, tmp_path):
    run = command("to_hf.py", "owner/name", tmp_path / "out")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: cannot download owner/name") and run.stderr.count("\n") == 1


def test_bfloat16_is_the_default(model, tmp_path, call):
    status, said, _ = call("from_hf.py", model, tmp_path / "converted")
    assert status == 0 and "without a tokenizer" in said
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["from_hf.py", "to_hf.py"])
@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("nowhere", "out", "does not exist"),
        ("model", "model", "is not empty"),
        ("model", "model/config.json/out", "cannot write"),
        ("truncated.gguf", "out", "not a readable GGUF file"),
        ("x" * 300, "out", "cannot be read: File name too long"),
        ("model", "y" * 300, "File name too long"),
        ("~nobody-of-this-name/model", "out", "does not exist"),
    ],
)
def test_one_line_of_error_and_status_2(model, tmp_path, monkeypatch, call, name, source, out, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "truncated.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    before = sorted(tmp_path.rglob("*"))
    status, said, complaint = call(name, source, out)
    assert (status, said) == (2, "")
    assert message in complaint and complaint.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_dtype(model, tmp_path, call):
    status, _, complaint = call("from_hf.py", model, tmp_path / "out", "--dtype", "int4")
    assert status == 2 and "expected float32, bfloat16 or float16" in complaint
    assert not (tmp_path / "out").exists()
