"""The tokenizer from a GGUF file and from a folder, against transformers' Qwen2 (no torch needed)."""

import json
import unicodedata
from pathlib import Path

import pytest
from tiny_gguf import ADDED, MERGES, SPECIAL, vocabulary, write_gguf
from tiny_tokens import TEXTS

from l2a_jax.errors import UserError
from l2a_jax.sources import load_pretrained
from l2a_jax.weights import load_tokenizer
from l2a_jax.weights.gguf_file import GGUFFile
from l2a_jax.weights.gguf_tokenizer import gguf_tokenizer

STORED = json.loads(Path(__file__).with_name("reference_tokens.json").read_text())


@pytest.fixture
def tokenizer(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    return gguf_tokenizer(GGUFFile(tmp_path / "model.gguf"))


@pytest.fixture
def folder(tmp_path):
    """`vocab.json` and `merges.txt`, without a `tokenizer.json`."""
    tokens, _ = vocabulary()
    marks = {str(tokens.index(mark)): {"content": mark, "special": mark in SPECIAL} for mark in SPECIAL + ADDED}
    settings = {"added_tokens_decoder": marks, "eos_token": {"content": "<|im_end|>"}, "bos_token": None}
    path = tmp_path / "folder"
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture
def theirs():
    """transformers' Qwen2 tokenizer with the toy vocabulary."""
    from transformers import Qwen2Tokenizer

    tokens, _ = vocabulary()
    found = Qwen2Tokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in MERGES])
    found.add_special_tokens({"additional_special_tokens": SPECIAL})
    found.add_tokens(ADDED)
    return found


def test_equal_to_stored_tokens_of_transformers(tokenizer, folder):
    """NFC text always; with `vocab.json` and `merges.txt`, which are Qwen2's own files, NFD text too."""
    normal, decomposed = STORED[: len(TEXTS)], STORED[len(TEXTS) :]
    assert [tokenizer.encode(unicodedata.normalize("NFC", text)) for text in TEXTS] == normal
    assert tokenizer.encode_batch([unicodedata.normalize("NFC", text) for text in TEXTS]) == normal
    own = load_tokenizer(folder)
    assert [own.encode(unicodedata.normalize("NFC", text)) for text in TEXTS] == normal
    assert [own.encode(unicodedata.normalize("NFD", text)) for text in TEXTS] == decomposed


def test_text_comes_back(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("<|im_start|>the<|im_end|><tool_call>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<tool_call>"


def test_marks_are_single_tokens(tokenizer):
    tokens, _ = vocabulary()
    assert tokenizer.encode("<|im_start|><tool_call>") == [tokens.index("<|im_start|>"), tokens.index("<tool_call>")]
    assert tokenizer.eos_token_id == tokens.index("<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.bos_token_id == tokens.index("<|endoftext|>")
    assert tokenizer.vocab_size == len(tokens) == 320
    assert tokenizer.token_id("<|im_end|>") == tokenizer.eos_token_id and tokenizer.token_id("nothing") is None
    assert tokenizer.get_vocab()["Ġthe"] == tokens.index("Ġthe")


def test_a_token_before_every_text_if_the_file_asks(tmp_path):
    write_gguf(tmp_path / "model.gguf", metadata={"tokenizer.ggml.add_bos_token": True})
    tokenizer = load_pretrained(tmp_path / "model.gguf").tokenizer
    assert tokenizer.encode("the") == [tokenizer.bos_token_id, *tokenizer.encode("the", add_special_tokens=False)]


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.settings == tokenizer.settings
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.torch
def test_what_transformers_saved(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs(text)["input_ids"], text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert tokenizer.vocab_size == len(theirs)


def test_vocabulary_and_merges_without_tokenizer_json(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id == vocabulary()[0].index("<|im_end|>") and tokenizer.bos_token_id is None
    assert tokenizer.decode(tokenizer.encode("<|im_start|>the<|im_end|>"), skip_special_tokens=True) == "the"


def test_no_tokenizer_or_a_broken_one(tmp_path):
    assert load_tokenizer(tmp_path) is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{")
        with pytest.raises(UserError, match=name):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.torch
def test_equal_to_transformers_on_the_same_file(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS + [unicodedata.normalize("NFD", text) for text in TEXTS]:
        assert tokenizer.encode(text) == theirs(text)["input_ids"], text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
