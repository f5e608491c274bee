"""Real Qwen2.5-Coder-0.5B on RULER against greedy decoding by transformers, over the very same prompts.

Needs the GGUF file (L2A_TEST_GGUF), the texts (L2A_TEST_DATA, whose WikiText-2 validation text is the prose), and the
`parity` and `eval` extras. L2A_TEST_ITEMS is the number of prompts of each task (2 unless set), L2A_TEST_LENGTH their
length (2,048 unless set), L2A_TEST_TORCH_DEVICE where transformers runs (cpu unless set).
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from l2a_jax.evaluation import ruler, ruler_source
from l2a_jax.evaluation.options import Options
from l2a_jax.evaluation.ruler_text import build
from l2a_jax.sources import load_pretrained

pytestmark = [pytest.mark.weights, pytest.mark.torch]


def test_the_same_answers_and_scores():
    """Where two tokens are as likely but for rounding, a text may go another way: said, and rare in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    path, length = Path(os.environ["L2A_TEST_GGUF"]), int(os.environ.get("L2A_TEST_LENGTH", "2048"))
    count, device = int(os.environ.get("L2A_TEST_ITEMS", "2")), os.environ.get("L2A_TEST_TORCH_DEVICE", "cpu")
    text = str(Path(os.environ["L2A_TEST_DATA"]) / "wikitext2_valid.raw.txt")
    ours = load_pretrained(path, jnp.float32)
    options = Options(source=str(path), tasks=("ruler",), lengths=(length,), ruler_items=count,
                      needle={"haystack": (text,)})
    made = ruler.prepare("ruler", options, ours)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").to(device).eval()
    other, all_scores = [], []
    for task in options.ruler_tasks:
        items = [build(task, length, number, 0, made.made_of, made.units[task, length]) for number in range(count)]
        with jax.default_matmul_precision("float32"):
            mine = ruler.write(ours, items, task, length, options).texts
        for number, (item, text) in enumerate(zip(items, mine, strict=True)):
            prompt = torch.tensor(item.tokens[None].astype("int64"), device=device)
            with torch.no_grad():
                whole = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                        max_new_tokens=ruler_source.settings(task).new_tokens,
                                        eos_token_id=list(ours.tokenizer.end_ids),
                                        pad_token_id=ours.tokenizer.end_ids[0], repetition_penalty=1.0)
            reference = ours.tokenizer.decode(whole[0, prompt.shape[1] :].tolist(), skip_special_tokens=True)
            scores = [ruler_source.score(task, item.answers, one) for one in (text, reference)]
            all_scores.append(scores)
            if text != reference:
                other.append((task, number, *scores))
    mean = [sum(column) / len(all_scores) for column in zip(*all_scores, strict=True)]
    print(f"\nruler at {length}: {len(all_scores)} prompts; mean score {mean[0]:.4f} against {mean[1]:.4f}; "
          f"other texts (task, item, our score, theirs): {other}")
    assert len(other) <= max(1, len(all_scores) / 10)
