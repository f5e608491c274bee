"""What the loader does not use is carried over, and both readers of a folder give the same ids."""

import json
import os
import time
import unicodedata
from types import SimpleNamespace

import pytest
from tiny_gguf import write_gguf
from tiny_qwen import BASE, write_folder
from tiny_tokens import TEXTS

from l2a_jax.config import MODELS, L2AConfig
from l2a_jax.errors import UserError
from l2a_jax.models.params import init_params
from l2a_jax.sources import convert, load_pretrained, read_config
from l2a_jax.weights import load_tokenizer, save_pretrained
from l2a_jax.weights.gguf_file import GGUFFile
from l2a_jax.weights.gguf_tokenizer import gguf_tokenizer

BEYOND = {"bos_token_id": 3, "eos_token_id": [5, 7], "pad_token_id": None, "attention_dropout": 0.1, "use_cache": True,
          "initializer_range": 0.02, "max_window_layers": 28, "sliding_window": None, "transformers_version": "4.43.1",
          "layer_types": ["full_attention"] * 3, "task_specific_params": {"a": [1, {"b": None}]}, "my_note": "kept"}
GENERATION = '{"eos_token_id": [5, 7], "do_sample": true,  "temperature": 0.7, "repetition_penalty": 1.05}\n'


def source(folder, fields=BASE, **more):
    write_folder(folder, {**fields, **BEYOND, **more})
    (folder / "generation_config.json").write_text(GENERATION)
    write_gguf(folder.parent / "t.gguf")
    gguf_tokenizer(GGUFFile(folder.parent / "t.gguf")).save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 77, "note": [1]}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return folder


def test_there_and_back(tmp_path):
    start = source(tmp_path / "a")
    convert(start, tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c")
    for out in (tmp_path / "b", tmp_path / "c"):
        fields = json.loads((out / "config.json").read_text())
        assert {name: fields.get(name, "lost") for name in BEYOND} == BEYOND
        assert (out / "generation_config.json").read_text() == GENERATION
        assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
        assert read_config(out) == read_config(start)
        settings = json.loads((out / "tokenizer_config.json").read_text())
        assert (settings["model_max_length"], settings["note"]) == (77, [1])
        assert load_tokenizer(out).end_ids == (5, 7)


def test_nothing_is_added_that_the_source_did_not_say(tmp_path):
    write_folder(tmp_path / "a")
    write_gguf(tmp_path / "t.gguf")
    gguf_tokenizer(GGUFFile(tmp_path / "t.gguf")).save(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    fields = json.loads((tmp_path / "b" / "config.json").read_text())
    assert not {"bos_token_id", "eos_token_id", "pad_token_id"} & fields.keys()
    assert not (tmp_path / "b" / "generation_config.json").exists()


def test_what_says_how_to_compute_is_ours_and_not_carried(tmp_path):
    """A field that the source spelled otherwise must not stand beside ours."""
    start = source(tmp_path / "a", rope_theta=None, rope_scaling={"type": "linear", "factor": 2.0, "rope_theta": 7e4},
                   torch_dtype="float64", partial_rotary_factor=1.0, use_mrope=False)
    convert(start, tmp_path / "b", "float32")
    fields = json.loads((tmp_path / "b" / "config.json").read_text())
    assert fields["rope_theta"] == 7e4 and fields["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert fields["torch_dtype"] == fields["dtype"] == "float32"
    assert not {"partial_rotary_factor", "use_mrope"} & fields.keys()
    assert read_config(tmp_path / "b") == read_config(start)


@pytest.mark.parametrize("place", [None, "checkpoints/best"])
def test_a_run_carries_what_the_source_that_it_began_from_says(tmp_path, monkeypatch, place):
    start, run = source(tmp_path / "a"), tmp_path / "run"
    (run / "checkpoints" / "best").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    monkeypatch.setattr("l2a_jax.sources.describes_run", lambda fields: fields == {})
    monkeypatch.setattr("l2a_jax.sources._load_run", lambda path, dtype: load_pretrained(start, dtype))
    monkeypatch.setattr("l2a_jax.sources.read_run", lambda folder: SimpleNamespace(source=str(start)))
    convert(run if place is None else run / place, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == GENERATION
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [5, 7]


def test_a_routed_model_carries_too(tmp_path):
    config, layer = MODELS["tiny"], L2AConfig(window=8)
    import jax

    carried = load_pretrained(source(tmp_path / "a")).carried
    save_pretrained(tmp_path / "b", init_params(config, jax.random.key(0), layer), config, layer, carried=carried)
    again = load_pretrained(tmp_path / "b")
    assert again.l2a_config == layer and again.carried.files == carried.files
    assert again.carried.config["my_note"] == "kept" and again.carried.config["model_type"] == "l2a_qwen2"


@pytest.mark.torch
def test_transformers_reads_the_same_ends_and_settings(tmp_path):
    from transformers import AutoConfig, GenerationConfig

    convert(source(tmp_path / "a"), tmp_path / "b")
    before, after = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in "ab")
    ours = {"architectures", "dtype", "head_dim", "transformers_version", "rope_theta", "_name_or_path"}
    assert {k: v for k, v in after.items() if k not in ours} == {k: v for k, v in before.items() if k not in ours}
    assert GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == [5, 7]


def test_a_gguf_file_says_its_roles_in_the_folder_written_from_it(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["pad_token_id"]) == (272, [274, 272], 272)
    assert load_tokenizer(tmp_path / "out").end_ids == load_pretrained(tmp_path / "m.gguf").tokenizer.end_ids


@pytest.mark.torch
@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKD"])
def test_both_readers_of_a_folder_made_from_a_gguf_give_the_same_ids(tmp_path, form):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "again")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    readers = [load_tokenizer(tmp_path / name) for name in ("out", "again")]
    texts = [unicodedata.normalize(form, text) for text in [*TEXTS, "é Å 한국어 ﬁ", "e\u0301<|im_end|>e\u0301"]]
    for text in texts:
        assert [reader.encode(text) for reader in readers] == [theirs(text)["input_ids"]] * 2, text


def test_a_damaged_generation_config_is_refused_before_anything_is_written(tmp_path):
    start = source(tmp_path / "a")
    (start / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json is not readable JSON"):
        convert(start, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_a_killed_conversion_left_goes_with_the_next(tmp_path):
    start = write_folder(tmp_path / "a")
    left = tmp_path / ".out.partial-abc"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"0" * 100)
    os.utime(left, (time.time() - 100_000,) * 2)
    convert(start, tmp_path / "out")
    assert not left.exists() and {file.name for file in tmp_path.iterdir()} == {"a", "out"}


def test_an_output_with_the_longest_name_that_there_is(tmp_path):
    convert(write_folder(tmp_path / "a"), tmp_path / ("家" * 85))
    load_pretrained(tmp_path / ("家" * 85))


@pytest.mark.parametrize("out", ["x" * 300, "deep/" + "y" * 300 + "/out", "z/" * 3_000])
def test_an_output_that_cannot_be_named_is_refused_before_the_model_is_read(tmp_path, monkeypatch, out):
    start = write_folder(tmp_path / "a")
    monkeypatch.setattr("l2a_jax.sources.load_pretrained", lambda *_: pytest.fail("the model was read"))
    with pytest.raises(UserError, match=r"cannot write .*: File name too long"):
        convert(start, tmp_path / out)
