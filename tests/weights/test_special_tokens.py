"""Special tokens of a GGUF file: known by their type, whatever they are spelled in; roles as the file states them."""

import json

import pytest
from tiny_gguf import vocabulary, write_gguf

from l2a_jax.errors import UserError
from l2a_jax.sources import convert
from l2a_jax.weights import load_tokenizer
from l2a_jax.weights.gguf_file import GGUFFile
from l2a_jax.weights.gguf_tokenizer import gguf_tokenizer

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, THINK = "<｜User｜>", "<think>"
FIRST = vocabulary()[0].index("<|endoftext|>")


def tokenizer_of(tmp_path, tokens=(), **metadata):
    """The tokenizer of a file whose last tokens are `tokens`: (text, type), from FIRST on."""
    names, types = vocabulary()
    for index, (name, kind) in enumerate(tokens, start=FIRST):
        names[index], types[index] = name, kind
    fields = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    write_gguf(tmp_path / "model.gguf", metadata={
        "tokenizer.ggml.tokens": names, "tokenizer.ggml.token_type": types, **fields})
    return gguf_tokenizer(GGUFFile(tmp_path / "model.gguf"))


DEEPSEEK = {"tokens": [(EOS, 3), (USER, 3), (BOS, 3), (PAD, 3), (THINK, 4)], "pre": "deepseek-r1-qwen",
            "eos_token_id": FIRST, "bos_token_id": FIRST + 2, "padding_token_id": FIRST + 3, "add_bos_token": True}


def test_deepseek_r1_distill_qwen(tmp_path):
    tokenizer = tokenizer_of(tmp_path, **DEEPSEEK)
    assert tokenizer.encode(f"{USER}the{THINK}{EOS}") == [FIRST + 2, FIRST + 1, tokenizer.token_id("t"),
                                                          tokenizer.token_id("he"), FIRST + 4, FIRST]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (FIRST + 2, FIRST, FIRST + 3)
    assert tokenizer.end_ids == (FIRST,)
    assert tokenizer.decode(tokenizer.encode(f"{USER}the{EOS}"), skip_special_tokens=True) == "the"
    assert tokenizer.vocab_size == 320


@pytest.mark.torch
def test_transformers_gives_the_same_ids_in_the_folder_written_from_it(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenizer_of(tmp_path, **DEEPSEEK)
    convert(tmp_path / "model.gguf", tmp_path / "out")
    theirs, again = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    for text in (f"{USER}the{THINK}x{EOS}", f"a{PAD}{BOS} b", "no marks", ""):
        assert theirs(text)["input_ids"] == again.encode(text) == tokenizer.encode(text), text
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(theirs, role) == getattr(again, role) == getattr(tokenizer, role)


@pytest.mark.parametrize(("kind", "one"), [(0, False), (1, False), (2, True), (3, True), (4, True), (5, False),
                                           (6, False)])
@pytest.mark.parametrize("name", ["<|mark|>", "<｜mark｜>", "two words", "→"])
def test_the_type_decides_whether_a_token_is_matched_in_text(tmp_path, kind, one, name):
    """llama.cpp looks for control, user-defined and unknown tokens in the text, and for no others."""
    tokenizer = tokenizer_of(tmp_path, tokens=[(name, kind)], bos_token_id=None, eos_token_id=FIRST + 2,
                             padding_token_id=None)
    assert (tokenizer.encode(f"x{name}") == [tokenizer.token_id("x"), FIRST]) == one
    assert tokenizer.decode([FIRST]) == name
    assert tokenizer.decode([FIRST], skip_special_tokens=True) == ("" if kind in (2, 3) else name)


@pytest.mark.parametrize(("bos", "eos"), [(None, None), (True, False), (False, True), (True, True)])
def test_tokens_around_every_text_as_the_file_says(tmp_path, bos, eos):
    tokenizer = tokenizer_of(tmp_path, add_bos_token=bos, add_eos_token=eos)
    bare = tokenizer.encode("the", add_special_tokens=False)
    around = ([FIRST] if bos else []) + bare + ([FIRST + 2] if eos else [])
    assert tokenizer.encode("the") == around
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("the") == around


def test_every_end_that_the_file_states(tmp_path):
    tokenizer = tokenizer_of(tmp_path, eos_token_id=FIRST + 1, eot_token_id=FIRST + 2, eom_token_id=FIRST + 4)
    assert tokenizer.end_ids == (FIRST + 1, FIRST + 2, FIRST + 4, FIRST)  # the last is <|endoftext|>


@pytest.mark.parametrize("pre", ["qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2", None])
def test_the_names_of_one_splitting_rule(tmp_path, pre):
    tokenizer = tokenizer_of(tmp_path, pre=pre)
    assert tokenizer.encode("12") == [tokenizer.token_id("1"), tokenizer.token_id("2")]  # though there is a merge


def test_a_role_may_be_an_ordinary_token(tmp_path):
    tokenizer = tokenizer_of(tmp_path, tokens=[("→", 1)], padding_token_id=FIRST, eos_token_id=0)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (FIRST, 0)
    assert len(tokenizer.encode("!!")) == 2


def test_empty_tokens_keep_their_ids(tmp_path):
    tokenizer = tokenizer_of(tmp_path, tokens=[("<|endoftext|>", 3), ("", 5), ("<|im_end|>", 3), ("", 5)],
                             eos_token_id=FIRST + 2)
    assert tokenizer.encode("<|im_end|>") == [FIRST + 2] and tokenizer.vocab_size == 320


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [("<a>", 3), ("<a>", 3)]}, f"token '<a>' stands twice, with the ids {FIRST} and {FIRST + 1}"),
        ({"tokens": [("<a>", 7)]}, f"token {FIRST} is of type 7; expected 0 to 6"),
        ({"add_bos_token": True, "bos_token_id": None}, "add_bos_token is true, but there is no bos_token_id"),
        ({"add_eos_token": True, "eos_token_id": None}, "add_eos_token is true, but there is no eos_token_id"),
        ({"bos_token_id": 320}, "bos_token_id is 320, of 320 tokens"),
        ({"unknown_token_id": "x"}, "unknown_token_id is 'x'"),
    ],
)
def test_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        tokenizer_of(tmp_path, **change)


def test_named_templates_are_kept(tmp_path):
    write_gguf(tmp_path / "model.gguf", metadata={
        "tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.chat_templates": ["tool_use"]})
    settings = gguf_tokenizer(GGUFFile(tmp_path / "model.gguf")).settings
    assert settings["chat_template"] == [{"name": "default", "template": "plain"},
                                         {"name": "tool_use", "template": "tools"}]


def test_a_template_beside_the_settings_survives(tmp_path):
    tokenizer_of(tmp_path).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("newer")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "older"}))
    assert load_tokenizer(tmp_path).settings["chat_template"] == "newer"
