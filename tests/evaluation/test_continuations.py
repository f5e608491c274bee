"""Greedy texts of many prompts at once against one token at a time, each prompt alone."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.errors import UserError
from l2a_jax.evaluation.continuations import Prompt, continuations
from l2a_jax.models.params import add_routing, init_params, map_with_path
from l2a_jax.models.transformer import forward
from l2a_jax.sources import Pretrained, load_pretrained
from l2a_jax.weights.tokenizer import Tokenizer
from tests.evaluation.byte_tokenizer import byte_tokenizer

CONFIG = ModelConfig(260, 16, 24, 2, 2, 1, 8, max_positions=512)
LAYERS = {"plain": None, "two sets, in sequence": L2AConfig(window=16, topology="sequential", share_attention=False),
          "one set, a pruned layer": L2AConfig(window=16, sinks=2, pruned_layers=(1,))}
WIDTH = 384


def made(layer=None):
    params = jax.tree.map(lambda x: x * 3, init_params(CONFIG, jax.random.key(0)))
    if layer is not None:
        router = jax.random.normal(jax.random.key(1), (CONFIG.num_layers, CONFIG.hidden_size))
        params = map_with_path(lambda path, leaf: router if path == "layers/router/kernel" else leaf,
                               add_routing(params, CONFIG, layer))
    return Pretrained(CONFIG, layer, params, byte_tokenizer(), "")


def prompts(count, seed=0, longest=300, most=40, until=()):
    rng = np.random.default_rng(seed)
    return [Prompt(rng.integers(0, 256, int(length)).tolist(), int(new), until)
            for length, new in zip(rng.integers(1, longest, count), rng.integers(1, most, count), strict=True)]


@functools.partial(jax.jit, static_argnums=2)
def likeliest(params, tokens, layer, last):
    return jnp.argmax(forward(params, tokens, CONFIG, layer).logits[0, last])


def literally(model, prompt):
    """(text, tokens): feed everything, take the likeliest, look whether the text so far has ended; and again."""
    tokens, written = list(prompt.tokens), []
    while True:
        padded = np.zeros((1, WIDTH), np.int32)
        padded[0, : len(tokens)] = tokens
        chosen = int(likeliest(model.params, padded, model.l2a_config, len(tokens) - 1))
        if chosen in model.tokenizer.end_ids:
            return model.tokenizer.decode(written), len(written) + 1
        tokens, written = [*tokens, chosen], [*written, chosen]
        text = model.tokenizer.decode(written)
        if any(stop in text for stop in prompt.until):
            for stop in prompt.until:
                text = text.partition(stop)[0]
            return text, len(written)
        if len(written) == prompt.max_new_tokens:
            return text, len(written)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_batch_writes_what_each_prompt_alone_does(layer):
    """Nineteen prompts through four rows, refilled as texts end: by a stop, by their limit, by the end of text."""
    model = made(LAYERS[layer])
    # A byte of which there are many in what this model writes, two in a row, and one that never comes.
    asked = [*prompts(11, until=("E", "\x13B", "never")), *prompts(8, seed=1)]
    found = continuations(model, asked, batch_tokens=4 * 512)
    expected = [literally(model, prompt) for prompt in asked]
    assert list(zip(found.texts, found.counts.tolist(), strict=True)) == expected
    assert len({count for _, count in expected}) > 4 and not found.truncated.any()
    assert any(count < prompt.max_new_tokens for (_, count), prompt in zip(expected, asked, strict=True))


@pytest.mark.parametrize("rows", [1, 3])
def test_the_size_of_the_batch_changes_no_text(rows):
    model, asked = made(), prompts(7, seed=2)
    assert continuations(model, asked, batch_tokens=rows * 512).texts == continuations(model, asked).texts


def ends_at_once(model, prompt):
    """The model and the prompt with two names exchanged: what it writes first is `<|endoftext|>` now."""
    first = int(jnp.argmax(forward(model.params, jnp.asarray([prompt.tokens]), CONFIG, None).logits[0, -1]))
    names = np.arange(CONFIG.vocab_size)
    names[[first, 256]] = 256, first
    params = map_with_path(lambda path, leaf: leaf[names] if path == "embed/embedding" else leaf, model.params)
    return model._replace(params=params), prompt._replace(tokens=names[np.asarray(prompt.tokens)].tolist())


def test_special_tokens_end_a_row_and_are_not_written():
    """The tokenizer's own end, and one that only the stops name."""
    model, prompt = ends_at_once(made(), prompts(1, seed=3, most=40)[0])
    found = continuations(model, [prompt])
    assert found.texts == [""] and found.counts.tolist() == [1]
    bare = model._replace(tokenizer=Tokenizer(model.tokenizer.backend_tokenizer, {}, ends=(0,)))
    assert continuations(bare, [prompt]).counts.tolist() != [1]
    found = continuations(bare, [prompt._replace(until=("<|endoftext|>",))])
    assert found.texts == [""] and found.counts.tolist() == [1]


def test_long_prompts_are_cut_from_the_left_and_counted():
    model = made()
    long = np.random.default_rng(5).integers(0, 256, 600).tolist()
    found = continuations(model, [Prompt(long, 30), Prompt(long[-482:], 30), Prompt(long[:5], 4)])
    assert found.texts[0] == found.texts[1] and found.truncated.tolist() == [True, False, False]


@pytest.mark.parametrize(("asked", "message"), [
    ([], "no prompt to continue"), ([Prompt([], 4)], "prompt 0 is empty"),
    ([Prompt([1], 4), Prompt([1, 300], 4)], "prompt 1: token id 300 is outside the vocabulary of 260"),
    ([Prompt([1], 512)], "asks for 512 new tokens; the model has 512 positions"), ([Prompt([1], 0)], "0 new tokens")])
def test_bad_prompts_are_named(asked, message):
    with pytest.raises(UserError, match=message):
        continuations(made(), asked, label="gsm8k")


def test_numbers_that_are_none_are_said():
    model = made()
    broken = map_with_path(lambda path, leaf: leaf.at[0].set(jnp.nan) if path == "layers/mlp/down/kernel" else leaf,
                           model.params)
    with pytest.raises(UserError, match="the logits after prompt 0 are not finite"):
        continuations(model._replace(params=broken), prompts(1))


@pytest.mark.torch
def test_texts_are_those_of_lm_evals_own_model(tmp_path):
    """The same weights through transformers: stops in the middle, limits, prompts that are too long."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from l2a_jax.evaluation.harness import HarnessModel

    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=256)).float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(6)
    theirs.save_pretrained(tmp_path)
    byte_tokenizer().save(tmp_path)
    ours = HarnessModel(load_pretrained(str(tmp_path), jnp.float32))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer,
                                        eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    rng = np.random.default_rng(0)
    prompts = ["".join(rng.choice(list("the sum of 3 and 4 is"), int(size))) for size in rng.integers(5, 260, 9)]
    settings = {"do_sample": False, "temperature": 0.0, "max_gen_toks": 40}
    free = ours.generate_until([SimpleNamespace(args=(prompt, {**settings, "until": []})) for prompt in prompts])
    stops = [[text[len(text) // 2 :][:2], "never"] for text in free]
    requests = [SimpleNamespace(args=(prompt, {**settings, "until": stop}))
                for prompt, stop in zip(prompts, stops, strict=True)]
    found = ours.generate_until(requests)
    assert found == HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=1).generate_until(requests)
    assert ours.truncated and all(text and len(text) < len(whole) for text, whole in zip(found, free, strict=True))
