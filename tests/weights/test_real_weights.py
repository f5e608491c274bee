"""Real Qwen2.5-Coder-0.5B against transformers on the same GGUF file: tokens, logits, and the way through safetensors.

Needs the file (L2A_TEST_GGUF), WikiText-2 test (L2A_TEST_DATA), and the `parity` extra.
"""

import os
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_tokens import TEXTS

from l2a_jax.models.transformer import forward
from l2a_jax.sources import load_pretrained

pytestmark = [pytest.mark.weights, pytest.mark.torch]

TOKENS = 512


@pytest.fixture(scope="module")
def path():
    import torch

    torch.manual_seed(0)
    return Path(os.environ["L2A_TEST_GGUF"])


@pytest.fixture(scope="module")
def text():
    with (Path(os.environ["L2A_TEST_DATA"]) / "wikitext2_test.raw.txt").open(encoding="utf-8", newline="") as file:
        return file.read(200_000)


@pytest.fixture(scope="module")
def ours(path):
    return load_pretrained(path, jnp.float32)


@pytest.fixture(scope="module")
def theirs(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32", attn_implementation="eager"
    ).eval()


def test_the_same_tokens(path, ours, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    pieces = [text[start : start + 1_500] for start in range(0, len(text), 1_500)]
    for piece in [*TEXTS, *(unicodedata.normalize("NFD", one) for one in TEXTS), *pieces]:
        ids = tokenizer(piece)["input_ids"]
        assert ours.tokenizer.encode(piece) == ids
        assert ours.tokenizer.decode(ids) == tokenizer.decode(ids)
    assert ours.tokenizer.get_vocab() == tokenizer.get_vocab()
    for role in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert getattr(ours.tokenizer, role) == getattr(tokenizer, role)


def kl_divergence(logits_p, logits_q):
    """KL(p || q) of one row in nats, in float64: in float32 its rounding is as large as its bound."""
    shifted = (np.float64(row) - row.max() for row in (logits_p, logits_q))
    log_p, log_q = (row - np.log(np.sum(np.exp(row))) for row in shifted)
    return float(np.sum(np.exp(log_p) * (log_p - log_q)))


def test_the_same_logits(ours, theirs, text):
    import torch

    tokens = np.asarray(ours.tokenizer.encode(text)[:TOKENS])[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits[0].numpy()
    with jax.default_matmul_precision("float32"):
        found = np.asarray(forward(ours.params, jnp.asarray(tokens), ours.config).logits[0])
    assert found.shape == (TOKENS, ours.config.vocab_size)
    divergence = max(kl_divergence(*rows) for rows in zip(expected, found, strict=True))
    difference = float(np.abs(found - expected).max())
    print(f"largest logit difference {difference:.2e}, largest KL {divergence:.2e}")
    assert difference <= 2e-3
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    assert divergence <= 1e-6


def test_the_same_tree_through_safetensors(path, ours, theirs, tmp_path):
    """The same file, saved by transformers as ordinary safetensors in several shards, and read back."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # transformers will not save a model that it read from GGUF, so its weights move into one that it did not.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    model.load_state_dict(theirs.state_dict())
    model.save_pretrained(tmp_path, max_shard_size="500MB")
    del model
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = load_pretrained(tmp_path, jnp.float32)
    assert again.config == ours.config
    assert jax.tree.structure(again.params) == jax.tree.structure(ours.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
