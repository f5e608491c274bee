"""Every command that writes text stops at the same tokens, and reads a text file without its byte-order mark."""

from __future__ import annotations

import io
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation import collapse, evaluate, needle
from l2a_jax.evaluation.needle_text import Haystack
from l2a_jax.inference import generate as generation
from l2a_jax.inference import stream
from l2a_jax.research.replication.measures import EvaluatedRow
from l2a_jax.sources import TINY, Pretrained, load_pretrained, locate
from tests.evaluation.byte_tokenizer import byte_tokenizer
from tests.models.cases import CONFIG

PROMPT = "keep stone amber . keep tree maple . tell stone"
OPTIONS = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, "backend": "xla", "dtype": "float32"}


def written(source, **given):
    out = io.StringIO()
    stream.run(str(source), **{"prompt": None, "prompt_file": None, **OPTIONS, **given}, out=out)
    return out.getvalue()


def test_generation_stops_at_each_end_that_the_source_names(tmp_path):
    """The stop that transformers' generate makes with the same generation_config.json: before the token itself."""
    model = load_pretrained(TINY, jnp.float32)
    ids = model.tokenizer.encode(PROMPT)
    tokens = [token for piece in stream.stream(model, ids, max_new_tokens=12, backend="xla") for token, _ in piece]
    first = next(index for index in range(2, 12) if tokens[index] not in tokens[:index])
    folder = shutil.copytree(locate(TINY), tmp_path / "model")
    for ends in ([model.tokenizer.eos_token_id, tokens[first]], [tokens[first], 1], tokens[first]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        whole = model.tokenizer.decode(ids + tokens[:first])
        assert written(folder, prompt=PROMPT) == whole + "\n"


def test_an_end_without_a_row_in_the_embedding_stops_nothing():
    """transformers takes it too; an int32 would overflow."""
    model = load_pretrained(TINY, jnp.float32)
    ids, options = model.tokenizer.encode(PROMPT), {"max_new_tokens": 3, "backend": "xla"}
    found = [generation.generate(model.params, model.config, None, [ids], stop_tokens=stops, **options)
             for stops in ((), (2**40, 10**6, -1))]
    assert found[0].tokens.tolist() == found[1].tokens.tolist() and not found[1].stopped.any()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_prompt_file_is_its_text_without_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding=encoding)
    assert written(TINY, prompt_file=tmp_path / "prompt.txt") == written(TINY, prompt=PROMPT)


@pytest.mark.parametrize(("content", "message"), [
    (b"\xff\xfea\x00", "--prompt-file .*prompt.txt is not UTF-8: byte 0xff at offset 0"),
    (None, "--prompt-file .*prompt.txt does not exist")])
def test_a_prompt_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(stream, "load_pretrained", lambda *given: pytest.fail("the weights were read"))
    if content is not None:
        (tmp_path / "prompt.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        written(TINY, prompt_file=tmp_path / "prompt.txt")


def _collapse(model, monkeypatch, seen):
    monkeypatch.setattr(collapse, "collapse", lambda *given, **options: {"stops": seen.append(options["stop_tokens"])})
    setup = evaluate.set_up(evaluate.Options(TINY, ("collapse",)))
    dict(evaluate._steps(setup, model, model, {}, print))["collapse"]()


def _study(model, monkeypatch, seen):
    subject = object.__new__(EvaluatedRow)
    subject.model = model
    seen.append(subject.prompts()[1])


def _needle(model, monkeypatch, seen):
    def answer(*given, stop_tokens, **options):
        seen.append(stop_tokens)
        row = np.array([[7, 8, 257, 0]])
        return SimpleNamespace(tokens=row, lengths=np.array([2]))

    monkeypatch.setattr(generation, "generate", answer)
    prompt = needle.Prompt(8, 0.0, 0, "key", [1, 2], ["a"], [[7, 8, 9, 9]], 0)
    (found,) = needle._generated(model, [prompt], needle.NeedleOptions(generate=1), "auto", None)
    assert found["written"] == model.tokenizer.decode([7, 8]) and not found["exact_match"]


@pytest.mark.parametrize("consumer", [_collapse, _study, _needle])
def test_reports_stop_where_generation_does(consumer, monkeypatch):
    backend = byte_tokenizer()
    tokenizer = type(backend)(backend.backend_tokenizer, backend.settings, ends=(257, 3))
    seen = []
    consumer(Pretrained(CONFIG, None, {}, tokenizer, ""), monkeypatch, seen)
    assert seen == [(257, 3)]


def test_needle_answers_need_a_token(monkeypatch):
    class Silent(needle.CodeForm):
        def answer(self, key, answer):
            return []

    form = Silent(byte_tokenizer(), 5)
    hay = Haystack(np.zeros(3_000, np.int32), np.zeros(3_000, bool), "zeros")
    with pytest.raises(UserError, match=r"leaves the answer '\d+' no token of its own"):
        needle._prompt(form, hay, needle.NeedleOptions(), 2_000, 0.5, 0)
    assert jax.tree.leaves(needle._prompt(needle.CodeForm(byte_tokenizer(), 5), hay, needle.NeedleOptions(), 2_000,
                                          0.5, 0).answer_tokens)
