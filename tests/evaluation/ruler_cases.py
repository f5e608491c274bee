"""Prose and a small byte-pair tokenizer that cuts text as Qwen2's does, for prompts of RULER."""

import random

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from l2a_jax.evaluation.ruler_source import definitions
from l2a_jax.weights.tokenizer import QWEN2_SPLIT, Tokenizer


def prose(count, seed=0):
    """So many words in sentences, some quoted, of about a thousand different ones."""
    draws = random.Random(seed)
    words = ["".join(draws.choice(("ka", "lo", "mi", "ren", "tus", "vel")) for _ in range(draws.randint(2, 4)))
             for _ in range(1_200)]
    out = []
    while len(out) < count:
        sentence = draws.choices(words, k=draws.randint(4, 14))
        sentence[0] = sentence[0].capitalize()
        out += f'"{" ".join(sentence)}."'.split() if draws.random() < 0.2 else f"{' '.join(sentence)}.".split()
    lines = (" ".join(out[at : at + 12]) for at in range(0, count, 12))
    return "\n".join(lines)


def small_tokenizer():
    """Trained on that prose and on what lm-eval's prompts of needles say; what it has no pair for is bytes."""
    said = [definitions("niah_utils", ("TEMPLATE",))["TEMPLATE"], *definitions("prepare_niah", ("NEEDLE",)).values(),
            definitions("prepare_niah", ("get_haystack",))["get_haystack"]("repeat")]
    texts = [prose(4_000), *20 * [text for text in said if isinstance(text, str)]]
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return Tokenizer(backend, {"eos_token": "<|endoftext|>"})
