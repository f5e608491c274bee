"""Text files that a user gives an evaluation: the byte-order mark is no text, and what is damaged is named."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation import texts
from l2a_jax.evaluation.needle_text import text_haystack
from l2a_jax.evaluation.task_files import read_task
from tests.evaluation.byte_tokenizer import byte_tokenizer
from tests.evaluation.test_tasks import PIQA, write

BOM = b"\xef\xbb\xbf"
TEXT = "The rain fell on the roof. A dog barked twice. " * 8


def haystack(path):
    hay = text_haystack((str(path),), byte_tokenizer(), 64, None)
    return hay.tokens.tolist(), hay.ends.tolist()


def windows(path):
    found = texts.read_text(str(path))
    return texts.tokenise(found, byte_tokenizer(), 260).tolist()


CONTENT = {".txt": TEXT.encode(), ".jsonl": json.dumps({"text": TEXT}).encode() + b"\n"}


@pytest.mark.parametrize("suffix", CONTENT)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("read", [haystack, windows])
def test_text_with_a_byte_order_mark_is_the_same_text(read, packed, suffix, tmp_path):
    files = []
    for name, mark in (("plain", b""), ("marked", BOM)):
        files.append(tmp_path / f"{name}{suffix}{'.gz' if packed else ''}")
        files[-1].write_bytes(gzip.compress(mark + CONTENT[suffix]) if packed else mark + CONTENT[suffix])
    assert read(files[0]) == read(files[1])


def test_task_data_with_byte_order_marks_are_the_same_items(tmp_path):
    plain = read_task("piqa", write(tmp_path)).documents
    for name in ("piqa_valid.jsonl", "piqa_valid-labels.lst"):
        (tmp_path / name).write_bytes(BOM + (tmp_path / name).read_bytes())
    assert read_task("piqa", tmp_path).documents == plain and len(plain) == len(PIQA)


DAMAGED = {
    "a cut parquet": ("a.parquet", b"PAR1" + b"\0" * 64), "an empty parquet": ("a.parquet", b""),
    "a cut gz": ("a.txt.gz", gzip.compress(np.random.default_rng(0).bytes(4_000))[:-1_000]),
    "no UTF-8": ("a.txt", b"caf\xe9 " * 40), "UTF-16": ("a.txt", TEXT.encode("utf-16")),
    "records that are a list": ("a.jsonl", b"[1, 2]\n"), "nested too deeply": ("a.jsonl", b"[" * 100_000 + b"\n"),
    "a folder": ("a.txt", None),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("read", [haystack, windows])
def test_a_damaged_text_is_named(read, case, tmp_path):
    name, content = DAMAGED[case]
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(("name", "content", "said"), [
    ("piqa_valid.jsonl", b"\xff\xfe{\0", "piqa_valid.jsonl"), ("piqa_valid.jsonl", b"3\n", "line 1 holds"),
    ("piqa_valid.jsonl", b"[" * 100_000, "line 1"), ("piqa_valid-labels.lst", b"0\n\xff\n1\n", "piqa_valid-labels.lst"),
    ("piqa_valid-labels.lst", b"", "holds 0 labels"), ("piqa_valid-labels.lst", "0\n\u0661\n0\n".encode(), "labels")])
def test_damaged_task_data_are_named(name, content, said, tmp_path):
    write(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_task("piqa", tmp_path)
