"""Real Qwen2.5-Coder-0.5B on PIQA, HellaSwag, ARC-Challenge and GSM8K against lm-eval with transformers, same files.

Needs the GGUF file (L2A_TEST_GGUF), the task files (L2A_TEST_DATA), and the `parity` extra. L2A_TEST_ITEMS is the
number of items of each task (8 unless set; 0: all), L2A_TEST_TORCH_DEVICE where transformers runs (cpu unless set).
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.evaluation.task_files import LOCAL_TASKS, read_task
from l2a_jax.evaluation.tasks import load_tasks
from l2a_jax.sources import load_pretrained

pytestmark = [pytest.mark.weights, pytest.mark.torch]

TOLERANCE = 0.02  # nats a choice


@pytest.fixture(scope="module")
def path():
    return Path(os.environ["L2A_TEST_GGUF"])


@pytest.fixture(scope="module")
def ours(path):
    from l2a_jax.evaluation.harness import HarnessModel

    return HarnessModel(load_pretrained(path, jnp.float32))


@pytest.fixture(scope="module")
def theirs(path):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = os.environ.get("L2A_TEST_TORCH_DEVICE", "cpu")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8 if device == "cpu" else 32)


def run(model, name, file, items):
    from lm_eval.evaluator import evaluate

    results = evaluate(model, {"tasks": load_tasks([name], {name: file}, None, items)}, limit=items)
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return results["results"][name], samples


@pytest.mark.parametrize("name", [name for name in LOCAL_TASKS if name != "gsm8k"])
def test_the_same_log_likelihoods_and_accuracy(name, ours, theirs):
    file = read_task(name, Path(os.environ["L2A_TEST_DATA"]))
    items = int(os.environ.get("L2A_TEST_ITEMS", "8")) or None
    assert ours.prefix_token_id == theirs.prefix_token_id
    with jax.default_matmul_precision("float32"):
        found, samples = run(ours, name, file, items)
    expected, reference = run(theirs, name, file, items)
    assert [one["arguments"] for one in samples] == [one["arguments"] for one in reference]
    differences, same_greedy, choices = [], 0, 0
    for one, other in zip(samples, reference, strict=True):
        for (a, top_a), (b, top_b) in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            differences.append(abs(a - b))
            same_greedy += top_a == top_b
            choices += 1
    same_items = sum(one["acc"] == other["acc"] and one["acc_norm"] == other["acc_norm"]
                     for one, other in zip(samples, reference, strict=True))
    print(f"\n{name}: {len(samples)} items, {choices} choices; largest difference {max(differences):.2e} nats, mean "
          f"{np.mean(differences):.2e}; same greedy {same_greedy}/{choices}, same correctness {same_items}/"
          f"{len(samples)}; acc {found['acc,none']:.4f} against {expected['acc,none']:.4f}, acc_norm "
          f"{found['acc_norm,none']:.4f} against {expected['acc_norm,none']:.4f}")
    assert max(differences) <= TOLERANCE
    assert found["acc,none"] == expected["acc,none"] and found["acc_norm,none"] == expected["acc_norm,none"]


def test_the_same_texts_and_exact_matches(ours, theirs):
    """Where two tokens are as likely but for rounding, a text may go another way: said, and rare in float32."""
    file = read_task("gsm8k", Path(os.environ["L2A_TEST_DATA"]))
    items = int(os.environ.get("L2A_TEST_ITEMS", "8")) or None
    with jax.default_matmul_precision("float32"):
        found, samples = run(ours, "gsm8k", file, items)
    expected, reference = run(theirs, "gsm8k", file, items)
    assert [one["arguments"] for one in samples] == [one["arguments"] for one in reference]
    other = [one["doc_id"] for one, another in zip(samples, reference, strict=True) if one["resps"] != another["resps"]]
    scores = [name for name in found if name.startswith("exact_match,")]
    print(f"\ngsm8k: {len(samples) // len(scores)} items; other texts: {sorted(set(other))}; "
          + ", ".join(f"{name} {found[name]:.4f} against {expected[name]:.4f}" for name in scores))
    assert len(other) <= len(samples) / 10
