"""Ids are those that a folder's files state, wherever they state them; a contradiction is an error."""

import json

import pytest
from tiny_gguf import MERGES, SPECIAL, vocabulary

from l2a_jax.errors import UserError
from l2a_jax.weights import load_tokenizer

FIRST = 272
ORDINARY = {token: index for index, token in enumerate(vocabulary()[0][:FIRST])}
CALL, PAD = "<tool_call>", "<|pad|>"


def mark(content, special):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": special}


LAYOUT = {FIRST: mark(SPECIAL[0], True), FIRST + 1: mark(SPECIAL[1], True), FIRST + 2: mark(SPECIAL[2], True),
          FIRST + 3: mark(CALL, False), FIRST + 4: mark("</tool_call>", False)}
"""Qwen2.5's: special tokens first, then those that are not."""


def write(folder, *, vocab=ORDINARY, decoder=None, **files):
    """The slow files of a tokenizer; `files` are more of them by stem."""
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    if decoder is not None:
        files["tokenizer_config"] = {"added_tokens_decoder": decoder, **files.get("tokenizer_config", {})}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_a_special_token_added_after_ordinary_ones(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, decoder={**LAYOUT, FIRST + 5: mark(PAD, True)},
                                     tokenizer_config={"pad_token": PAD, "eos_token": mark(SPECIAL[2], True)}))
    assert tokenizer.encode(f"{CALL}{PAD}{SPECIAL[2]}") == [FIRST + 3, FIRST + 5, FIRST + 2]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (FIRST + 5, FIRST + 2)
    assert tokenizer.decode([FIRST + 3, FIRST + 5], skip_special_tokens=True) == CALL


@pytest.mark.parametrize("gap", [1, 30])
def test_ids_with_a_gap_before_them(tmp_path, gap):
    tokenizer = load_tokenizer(write(tmp_path, decoder={**LAYOUT, FIRST + 4 + gap: mark("<late>", True)}))
    tokenizer.save(tmp_path)
    (tmp_path / "vocab.json").unlink()
    for one in (tokenizer, load_tokenizer(tmp_path)):
        assert one.encode(f"<late>{SPECIAL[0]}the{CALL}")[::3] == [FIRST + 4 + gap, one.token_id("he")]
        assert one.encode("<late>") == [FIRST + 4 + gap] and one.vocab_size == FIRST + 5 + gap


def test_a_token_added_inside_the_vocabulary(tmp_path):
    vocab = {**ORDINARY, "<|spare|>": FIRST}
    tokenizer = load_tokenizer(write(tmp_path, vocab=vocab, decoder={FIRST: mark("<|spare|>", True)}))
    assert tokenizer.encode("<|spare|>") == [FIRST]


def test_old_saves_with_added_tokens_json_alone(tmp_path):
    added = {SPECIAL[1]: FIRST + 1, SPECIAL[0]: FIRST, SPECIAL[2]: FIRST + 2}
    tokenizer = load_tokenizer(write(tmp_path, added_tokens=added))
    assert tokenizer.encode("".join(SPECIAL)) == [FIRST, FIRST + 1, FIRST + 2]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == FIRST  # transformers' Qwen2 defaults


def test_old_saves_with_roles_in_special_tokens_map(tmp_path):
    added = {token: FIRST + i for i, token in enumerate([*SPECIAL, CALL])}
    tokenizer = load_tokenizer(write(
        tmp_path, added_tokens=added, special_tokens_map={
            "eos_token": mark(SPECIAL[2], True), "pad_token": SPECIAL[0], "additional_special_tokens": [SPECIAL[1]]}))
    assert tokenizer.encode(SPECIAL[1] + CALL) == [FIRST + 1, FIRST + 3]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (FIRST + 2, FIRST)
    assert tokenizer.decode([FIRST, FIRST + 1, FIRST + 2, FIRST + 3], skip_special_tokens=True) == CALL


def test_a_token_that_takes_the_blank_before_it(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, decoder={FIRST: {**mark("<x>", True), "lstrip": True}}))
    assert tokenizer.encode("a <x>") == [tokenizer.token_id("a"), FIRST]


def test_tokens_that_tokenizer_json_does_not_have_yet(tmp_path):
    load_tokenizer(write(tmp_path, decoder=LAYOUT)).save(tmp_path)
    for stated in ({"added_tokens": {PAD: FIRST + 5}},
                   {"tokenizer_config": {"added_tokens_decoder": {**LAYOUT, FIRST + 5: mark(PAD, True)}}}):
        assert load_tokenizer(write(tmp_path, **stated)).encode(PAD + CALL) == [FIRST + 5, FIRST + 3]


@pytest.mark.parametrize("flag", [True, False])
def test_settings_stand_above_what_tokenizer_json_adds(tmp_path, flag):
    """As in transformers 5."""
    roles = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2]}
    load_tokenizer(write(tmp_path, decoder=LAYOUT, tokenizer_config={**roles, "add_bos_token": not flag})
                   ).save(tmp_path)
    write(tmp_path, decoder=LAYOUT, tokenizer_config={**roles, "add_bos_token": flag, "add_eos_token": flag})
    ids = load_tokenizer(tmp_path).encode("t")
    assert ids == ([FIRST, ORDINARY["t"], FIRST + 2] if flag else [ORDINARY["t"]])


@pytest.mark.torch
@pytest.mark.parametrize(
    "files",
    [
        {"decoder": {**LAYOUT, FIRST + 5: mark(PAD, True)}, "tokenizer_config": {"pad_token": PAD}},
        {"added_tokens": {token: FIRST + i for i, token in enumerate(SPECIAL)}},
        {"added_tokens": {token: FIRST + i for i, token in enumerate([*SPECIAL, CALL])},
         "special_tokens_map": {"eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}},
        {"decoder": LAYOUT, "tokenizer_config": {"bos_token": SPECIAL[0], "add_bos_token": True}},
    ],
)
def test_equal_to_transformers(tmp_path, files):
    from transformers import AutoTokenizer

    write(tmp_path, **files)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("".join(SPECIAL), f"a{PAD} {CALL} the", "cafe\u0301 12"):
        assert ours.encode(text) == theirs(text)["input_ids"], text
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"decoder": {FIRST - 1: mark("<x>", True)}}, r"id 271 is '<x>' in .* and .* in .*vocab\.json"),
        ({"decoder": {FIRST: mark("t", True)}}, r"'t' has the id 272 in .* and 83 in .*vocab\.json"),
        ({"decoder": LAYOUT, "added_tokens": {CALL: FIRST + 4}}, "id 276 is '</tool_call>' in tokenizer_config.json"),
        ({"decoder": LAYOUT, "added_tokens": {CALL: FIRST + 9}}, "'<tool_call>' has the id 275 .* and 281 in added"),
        ({"added_tokens": {"<x>": FIRST, "<y>": FIRST}}, "id 272 is '<x>' in added_tokens.json and '<y>'"),
        ({"added_tokens": {"<x>": "272a"}}, r"added_tokens\.json gives '<x>' the id '272a'"),
        ({"decoder": {"x": mark("<x>", True)}}, r"tokenizer_config\.json gives '<x>' the id 'x'"),
        ({"decoder": {FIRST: 7}}, "added_tokens_decoder is not readable"),
        ({"tokenizer_config": {"eos_token": "a"}, "special_tokens_map": {"eos_token": "b"}},
         r"eos_token is 'a' in tokenizer_config\.json and 'b' in special_tokens_map\.json"),
        ({"tokenizer_config": {"pad_token": []}}, r"tokenizer_config\.json: pad_token is \[\]; expected a token"),
        ({"tokenizer_config": {"eos_token": "\ud800"}}, "eos_token is .*; expected a token"),
        ({"tokenizer_config": {"additional_special_tokens": 3}}, "additional_special_tokens is 3; expected a list"),
        ({"special_tokens_map": {"additional_special_tokens": [["a"]]}}, "expected a list of tokens"),
        ({"tokenizer_config": {"add_bos_token": "false"}}, "add_bos_token is 'false'; expected true or false"),
        ({"added_tokens": {"<x>": 2**40}}, "the id 1099511627776; expected a whole number below"),
        ({"vocab": {**ORDINARY, "x1": 1}}, r"vocab\.json gives one id to two tokens"),
        ({"vocab": {**ORDINARY, "x1": "1"}}, r"vocab\.json gives 'x1' the id '1'"),
        ({"vocab": [1, 2]}, r"vocab\.json holds a list"),
    ],
)
def test_contradictions_are_refused(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(write(tmp_path, **files))


@pytest.mark.parametrize("late", [FIRST + 6, FIRST + 40])
def test_ids_with_a_gap_in_tokenizer_json(tmp_path, late):
    load_tokenizer(write(tmp_path, decoder=LAYOUT)).save(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["added_tokens"][-1]["id"] = late
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).encode(f"</tool_call>{CALL}") == [late, FIRST + 3]
    whole["added_tokens"][-1]["id"] = 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"id 5 is '&' in the vocabulary of .* and '</tool_call>' in its added_tokens"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_on_which_its_library_panics(tmp_path):
    load_tokenizer(write(tmp_path, decoder=LAYOUT)).save(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["model"]["continuing_subword_prefix"] = "272"
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"tokenizer\.json is not a readable tokenizer: .") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("gone", "left"), [("merges.txt", "vocab.json"), ("vocab.json", "merges.txt")])
def test_half_a_tokenizer_is_not_none(tmp_path, gone, left):
    (write(tmp_path) / gone).unlink()
    with pytest.raises(UserError, match=f"has {left}, but neither tokenizer.json nor {gone}"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_beside_another_vocabulary(tmp_path):
    load_tokenizer(write(tmp_path, decoder=LAYOUT)).save(tmp_path)
    swapped = {**ORDINARY, "a": ORDINARY["b"], "b": ORDINARY["a"]}
    with pytest.raises(UserError, match=r"'a' has the id 64 in .*tokenizer\.json and 65 in .*vocab\.json"):
        load_tokenizer(write(tmp_path, vocab=swapped))
    with pytest.raises(UserError, match=r"'<tool_call>' has the id 275 in .*tokenizer\.json and 276 in .* or added"):
        load_tokenizer(write(tmp_path, tokenizer_config={}, added_tokens={CALL: FIRST + 4}))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json",
                                  "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
                                  "generation_config.json"])
def test_files_that_are_not_utf8(tmp_path, name):
    load_tokenizer(write(tmp_path, decoder=LAYOUT)).save(tmp_path)
    if name == "merges.txt":
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(UserError, match=f"{name} is not") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json"])
def test_json_that_is_nested_too_deeply(tmp_path, name):
    load_tokenizer(write(tmp_path, decoder=LAYOUT)).save(tmp_path)
    (tmp_path / name).write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(UserError, match=f"{name} is not a? ?readable") as error:
        load_tokenizer(tmp_path)
    assert len(str(error.value)) < 300
