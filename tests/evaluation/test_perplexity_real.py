"""WikiText-2 validation perplexity of real Qwen2.5-Coder-0.5B against transformers, window by window, in float32.

The first L2A_TEST_WINDOWS windows (20 unless set; `all` for the whole text) of L2A_TEST_CONTEXT tokens (1,024), with a
stride of L2A_TEST_STRIDE (the context). The transformers side follows the convention that `evaluation.perplexity`
states and shares no code with it; it runs on a GPU where torch has one.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.evaluation import perplexity, texts
from l2a_jax.sources import load_pretrained

pytestmark = [pytest.mark.weights, pytest.mark.torch]

CONTEXT = int(os.environ.get("L2A_TEST_CONTEXT", 1_024))
STRIDE = int(os.environ.get("L2A_TEST_STRIDE", CONTEXT))
WINDOWS = os.environ.get("L2A_TEST_WINDOWS", "20")


@pytest.fixture(scope="module")
def path():
    return Path(os.environ["L2A_TEST_GGUF"])


def theirs(path: Path, raw: str, limit: int | None) -> tuple[list[float], list[int]]:
    """transformers' sums of nats and counts of scored tokens, per window."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.backends.cuda.matmul.allow_tf32 = False
    rows = [line + "\n" if line.strip() else "" for line in raw.split("\n")[:-1]]
    ids = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)("\n\n".join(rows))["input_ids"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32",
                                                 attn_implementation="sdpa").eval().to(device)
    sums, counts, scored = [], [], 0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, STRIDE):
            if len(sums) == limit or scored == len(ids) - 1:
                break
            inputs = torch.tensor(ids[start : start + CONTEXT], device=device)
            targets = torch.tensor(ids[start + 1 : start + CONTEXT + 1], device=device)
            logits = model(inputs[None, : len(targets)]).logits[0]
            nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().cpu()
            fresh = nll[scored - start :]  # target i of the window is token start + i + 1 of the text
            sums.append(float(fresh.sum()))
            counts.append(len(fresh))
            scored += len(fresh)
    return sums, counts


def test_the_same_perplexity(path):
    limit = None if WINDOWS == "all" else int(WINDOWS)
    file = Path(os.environ["L2A_TEST_DATA"]) / "wikitext2_valid.raw.txt"
    with file.open(encoding="utf-8", newline="") as stream:
        sums, counts = theirs(path, stream.read(), limit)
    model = load_pretrained(path, jnp.float32)
    text = texts.read_text(str(file))
    assert text.rule == "wikitext"
    ids = texts.tokenise(text, model.tokenizer, model.config.vocab_size)
    windows = perplexity.text_windows(ids, CONTEXT, STRIDE, {"name": text.name}, limit)
    with jax.default_matmul_precision("float32"):
        rows = 1 if jax.default_backend() == "cpu" else 8
        ours = perplexity.score_windows(model, windows, batch_tokens=rows * CONTEXT)
    assert ours.tokens.tolist() == counts
    found, expected = (float(np.exp(np.sum(one) / np.sum(counts))) for one in (ours.nll, sums))
    apart = np.abs(ours.nll - sums) / counts
    print(f"\nWikiText-2 validation, {len(counts)} windows, context {CONTEXT}, stride {STRIDE}, {sum(counts):,} tokens "
          f"- ours {found:.5f}, transformers {expected:.5f}, {found / expected - 1:+.2e}; windows apart by at most "
          f"{apart.max():.2e} nats a token")
    assert found == pytest.approx(expected, rel=1e-3)
    assert apart.max() < 2e-3
