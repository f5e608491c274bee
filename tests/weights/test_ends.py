"""Which ids end a text, from every place that says so."""

import json

import pytest
from tiny_gguf import write_gguf

from l2a_jax.errors import UserError
from l2a_jax.weights import load_tokenizer
from l2a_jax.weights.gguf_file import GGUFFile
from l2a_jax.weights.gguf_tokenizer import gguf_tokenizer


@pytest.fixture
def folder(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    gguf_tokenizer(GGUFFile(tmp_path / "model.gguf")).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, [274, 272]),  # <|im_end|>, the tokenizer's, and <|endoftext|>
        ({}, {}, [274, 272]),
        ({"eos_token_id": 7}, None, [7]),
        ({"eos_token_id": [7, 9]}, {"do_sample": True}, [7, 9]),
        ({"eos_token_id": 7}, {"eos_token_id": [274, 272]}, [274, 272]),
        ({"eos_token_id": [9, 9]}, {"eos_token_id": None}, [9]),
        ({"eos_token_id": 7}, {"eos_token_id": 0}, [0]),
    ],
)
def test_generation_config_then_config_then_the_tokenizer(folder, config, generation, expected):
    for name, fields in (("config.json", config), ("generation_config.json", generation)):
        if fields is not None:
            (folder / name).write_text(json.dumps(fields))
    assert load_tokenizer(folder).end_ids == tuple(expected)


@pytest.mark.parametrize("value", ["<|im_end|>", [1, "2"], -1, True, 1.5, {"a": 1}])
def test_an_end_that_is_no_id_is_named(folder, value):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is .*; expected a token id"):
        load_tokenizer(folder)
