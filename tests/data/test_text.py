"""From files to documents: what separates them, what joins them, and what is said about files that do not read."""

import gzip
from itertools import pairwise

import pytest

from l2a_jax.data.recipes import resolve
from l2a_jax.data.text import Fragment, articles, fragments, pieces, read_lines, read_records, record_text, separated
from l2a_jax.errors import UserError


def documents(stream):
    """The text of each document, pieces joined; empty ones left out."""
    result, current = [], ""
    for piece in pieces(stream):
        current += piece.text
        if piece.ends:
            result.append(current)
            current = ""
    assert current == ""
    return [text for text in result if text]


def test_a_text_file_is_one_document_with_its_bytes_untouched():
    assert documents(separated(["a\r\n", " \n", "b"])) == ["a\r\n \nb"]


def test_separators_split_a_text_file_wherever_they_stand():
    lines = ["one\n", "<|endoftext|>\n", "two<|endoftext|>three\n", "<|endoftext|><|endoftext|>", "  \n<|endoftext|>\n"]
    assert documents(separated(lines)) == ["one\n", "two", "three\n"]


def test_wikitext_splits_at_top_level_headings_only():
    lines = [
        " \n", " = First = \n", " \n", " text with a = b = c \n", " = = Section = = \n", " \n", " = not a heading = \n",
        " text \n", " \n", " = Second = \n", " \n", " more \n",
    ]  # fmt: skip
    found = list(articles(lines))
    assert "".join(f.text for f in found) == "".join(lines), "every byte is kept"
    assert [f.identity for f in found if f.starts] == [None, "First", "Second"]
    assert [d.split("\n")[0] for d in documents(found)] == [" = First = ", " = Second = "]


def test_long_documents_are_cut_between_lines_and_nothing_is_lost():
    text = "".join(f"line {i}\n" + ("\n  indented\n" if i % 3 == 0 else "") for i in range(200))
    cut = list(pieces([Fragment(text, True), Fragment("second", True)], size=100))
    assert "".join(p.text for p in cut) == text + "second"
    assert [p.ends for p in cut] == [False] * (len(cut) - 2) + [True, True]
    assert len(cut) > 10 and all(p.text[-1] == "\n" and not q.text[0].isspace() for p, q in pairwise(cut[:-1]))


def test_joined_records_are_one_document_in_order():
    records = [("r", {"text": f"{s}{i}", "source": s}) for s in "ab" for i in range(2)] + [("r", {"text": "lone"})] * 2
    assert documents(record_text(records, join="source")) == ["a0\n\na1", "b0\n\nb1", "lone", "lone"]
    assert documents(record_text(records)) == ["a0", "a1", "b0", "b1", "lone", "lone"]


def test_parts_to_join_must_be_neighbours():
    records = [(f"row {i}", {"text": "x", "source": s}) for i, s in enumerate("aba")]
    with pytest.raises(UserError, match=r"row 2: more of source 'a'.*sort the file"):
        list(record_text(records, join="source"))


def test_the_layout_of_records_is_found_or_given():
    assert documents(record_text([("r", {"question": "q", "answer": "a"})])) == ["q\na"]
    assert documents(record_text([("r", {"content": "c", "license": "x"})])) == ["c"]
    assert documents(record_text([("r", {"a": "1", "b": "2"})], "{b}: {a}")) == ["2: 1"]
    assert documents(record_text([("r", {"text": None}), ("r", {"text": "  "}), ("r", {"text": "x"})])) == ["x"]


@pytest.mark.parametrize(
    ("lines", "field", "message"),
    [
        ('{"body": "x"}\n', None, r"a\.jsonl, line 1 has no text field .*its fields are 'body'"),
        ('{"text": "x"}\n\n{"txt": "x"}\n', None, r"a\.jsonl, line 3 has no text field 'text'; its fields are 'txt'"),
        ('{"text": "x"}\n', "body", r"line 1 has no text field 'body'"),
        ('{"text": "x"}\n', "{text", r"the text field '{text' is no template"),
        ('{"text": "x"}\n', "{}", r"line 1 has no text field '{}'"),
        ('{"text": 3}\n', None, r"line 1: field 'text' is int; expected text"),
        ('{"text": "x"}\n{"text": \n', None, r"line 2 is not readable JSON"),
        ('["x"]\n', None, r"line 1 holds a list; expected an object"),
        ('{"text": "\\ud800"}\n', None, r"line 1: the text holds half a surrogate pair"),
    ],
)
def test_records_that_do_not_read_are_named(tmp_path, lines, field, message):
    path = tmp_path / "a.jsonl"
    path.write_text(lines)
    with pytest.raises(UserError, match=message):
        list(record_text(read_records(path), field))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path, name):
    data = "schön\n".encode() + b"caf\xe9 noir\n"
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(UserError, match=rf"{name} is not UTF-8: byte 0xe9 at offset {len(data) - 7} \(line 2\)"):
        list(read_lines(tmp_path / name))


def test_a_damaged_gzip_file_is_named(tmp_path):
    whole = gzip.compress(b"some text\n" * 1000)
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "not.txt.gz").write_bytes(b"plain text")
    for name in ("cut", "not"):
        with pytest.raises(UserError, match=rf"{name}\.txt\.gz cannot be decompressed"):
            list(read_lines(tmp_path / f"{name}.txt.gz"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\n\xef\xbb\xbfkept")
    assert [line for _, line in read_lines(tmp_path / "a.txt")] == ["hello\n", "\ufeffkept"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_parquet(tmp_path, suffix):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), path)
    if suffix:
        (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    (domain,) = resolve(str(path) + suffix)
    assert documents(fragments(domain)) == ["one", "two"]


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match=r"a\.parquet does not read as parquet"):
        list(read_records(tmp_path / "a.parquet"))
