"""Live comparison with transformers and torch (`parity` extra): every shape, both directions, and tied heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_qwen import BASE, FAMILIES, TOKENS, bfloat16, weights, write_folder

from l2a_jax.models.transformer import forward
from l2a_jax.sources import convert, load_pretrained
from l2a_jax.weights import save_pretrained

torch = pytest.importorskip("torch", reason="the live comparison needs the parity extra")
pytestmark = pytest.mark.torch


def theirs(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model, model(torch.from_numpy(TOKENS)).logits.numpy()


def ours(folder):
    model = load_pretrained(folder, jnp.float32)
    with jax.default_matmul_precision("float32"):
        return model, np.asarray(forward(model.params, jnp.asarray(TOKENS), model.config).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_model_of_every_shape(tmp_path, family):
    """A model that transformers itself draws and saves, in several shards."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**FAMILIES[family], "initializer_range": 0.2})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # transformers starts them at exactly 0 and 1
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    np.testing.assert_allclose(ours(tmp_path)[1], theirs(tmp_path)[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_loads_in_transformers(tmp_path, family):
    model, logits = ours(write_folder(tmp_path / "source", FAMILIES[family]))
    save_pretrained(tmp_path / "out", model.params, model.config)
    np.testing.assert_allclose(theirs(tmp_path / "out")[1], logits, atol=1e-4, rtol=0)


def test_bfloat16_export_holds_the_same_bits(tmp_path):
    source = bfloat16(weights({**BASE, "tie_word_embeddings": False}))
    convert(write_folder(tmp_path / "in", {**BASE, "tie_word_embeddings": False}, source), tmp_path / "out")
    model, _ = theirs(tmp_path / "out")
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), source[name].astype(np.float32))


@pytest.mark.parametrize("output", ["absent", "equal", "different"])
def test_a_stored_output_matrix_unties_when_it_differs(tmp_path, output):
    tensors = weights(BASE)
    if output != "absent":
        factor = np.float32(1 if output == "equal" else 0.5)
        tensors["lm_head.weight"] = factor * tensors["model.embed_tokens.weight"]
    write_folder(tmp_path, BASE, tensors)
    model, logits = ours(tmp_path)
    reference, expected = theirs(tmp_path)
    tied = reference.lm_head.weight is reference.model.embed_tokens.weight
    assert model.config.tie_embeddings == ("unembed" not in model.params) == tied == (output != "different")
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
