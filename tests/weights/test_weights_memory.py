"""Peak memory of converting, measured by the kernel in a process of its own: below 1.5 x the model plus one tensor."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_gguf import gguf_name
from tiny_qwen import BASE, shapes

FIELDS = {**BASE, "vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 2_048, "num_hidden_layers": 24,
          "num_attention_heads": 8, "num_key_value_heads": 2}

CODE = """
import sys
import jax, jax.numpy as jnp
import gguf, safetensors.numpy
from l2a_jax import sources
def peak():  # not ru_maxrss, which a child inherits from the process that started it
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
jax.block_until_ready(jnp.zeros(1_000_000, jnp.bfloat16) + 1)  # what JAX itself takes at first use
before = peak()
sources.convert(*sys.argv[1:])  # reads and writes, so that it bounds load_pretrained too
print(peak() - before)
"""


@pytest.fixture(scope="module")
def sizes():
    """Bytes in bfloat16 of the whole model, and of its largest stored tensor."""
    elements = [int(np.prod(shape)) for shape in shapes(FIELDS).values()]
    return 2 * sum(elements), 2 * max(elements)


@pytest.fixture(scope="module", params=["safetensors", "gguf"])
def source(request, tmp_path_factory):
    """A model of 223 MB in bfloat16, stored as bfloat16 or as Q8_0."""
    folder = tmp_path_factory.mktemp("model")
    if request.param == "safetensors":
        tensors = {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes(FIELDS).items()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(FIELDS))
        return folder
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen2")
    for key, field in (("block_count", "num_hidden_layers"), ("context_length", "max_position_embeddings"),
                       ("embedding_length", "hidden_size"), ("feed_forward_length", "intermediate_size"),
                       ("attention.head_count", "num_attention_heads"),
                       ("attention.head_count_kv", "num_key_value_heads")):
        writer.add_uint32(f"qwen2.{key}", FIELDS[field])
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
    for name, shape in shapes(FIELDS).items():
        format = gguf.GGMLQuantizationType["Q8_0" if len(shape) == 2 else "F32"]
        row = gguf.quants.quantize(np.ones((1, shape[-1]), np.float32), format)
        data = np.repeat(row, shape[0], 0) if len(shape) == 2 else np.ones(shape, np.float32)
        writer.add_tensor(gguf_name(name), data, raw_dtype=format)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_peak(source, sizes, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", CODE, source, tmp_path / "out", "bfloat16"], capture_output=True, text=True, timeout=300,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0, run.stderr
    model, tensor = sizes
    peak = int(run.stdout)
    print(f"{source.name}: converting took {peak / 1e6:.0f} MB for a model of {model / 1e6:.0f} MB")
    assert 0.5 * model < peak < 1.5 * model + tensor
