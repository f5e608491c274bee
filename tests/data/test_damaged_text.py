"""Files that do not read: one sentence that names the file and how far it was read, for data, texts and haystacks."""

import errno
import gzip
import json
import os

import numpy as np
import pytest

from l2a_jax.data import tokenise
from l2a_jax.data.encoder import make_encoder
from l2a_jax.data.recipes import resolve
from l2a_jax.data.store import FILES
from l2a_jax.data.text import needed_columns, read_lines, read_records, record_text
from l2a_jax.data.tokenise import tokenised
from l2a_jax.errors import UserError
from l2a_jax.evaluation import needle_text, task_files, texts
from tests.evaluation.byte_tokenizer import byte_tokenizer


def read(path, field=None, join=None):
    return [f.text for f in record_text(read_records(path, needed=needed_columns(field, join)), field, join)]


def _table(**columns):
    import pyarrow

    return pyarrow.table({"text": [f"{'a' * 50}{i}" for i in range(2_000)]} | columns)


def _written(path, table, **options):
    from pyarrow import parquet

    parquet.write_table(table, path, **options)
    return bytearray(path.read_bytes())


def _page(path, **options):
    data = _written(path, _table(), **options)
    data[200:260] = b"\xff" * 60
    path.write_bytes(data)


def _flipped(path):
    data = _written(path, _table(), compression="none", use_dictionary=False, write_page_checksum=True)
    data[1_000] ^= 1
    path.write_bytes(data)


def _cut(path):
    path.write_bytes(_written(path, _table())[:1_000])


def _not_utf8(path):
    import pyarrow

    offsets = pyarrow.py_buffer(np.arange(4, dtype=np.int32).tobytes())
    _written(path, pyarrow.table({"text": pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"a\xffb"))}))


def _encrypted(path):
    import base64

    import pyarrow.parquet.encryption as encryption
    from pyarrow import parquet

    class Keys(encryption.KmsClient):
        def __init__(self, _):
            super().__init__()

        def wrap_key(self, key, _):
            return base64.b64encode(key)

    configuration = encryption.EncryptionConfiguration(footer_key="k", column_keys={"c": ["text"]})
    properties = encryption.CryptoFactory(Keys).file_encryption_properties(encryption.KmsConnectionConfig(),
                                                                           configuration)
    with parquet.ParquetWriter(path, _table().schema, encryption_properties=properties) as writer:
        writer.write_table(_table())


def _twice(path):
    import pyarrow

    _written(path, pyarrow.table([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"]))


@pytest.mark.parametrize(("make", "said"), [
    (lambda path: path.write_bytes(b"no parquet at all"), "does not read as parquet: its index is damaged"),
    (lambda path: path.write_bytes(b""), "its index is damaged"),
    (_cut, "its index is damaged"),
    (_page, "the part after row 0 is damaged"),
    (lambda path: _page(path, compression="zstd"), "the part after row 0 is damaged"),
    (_flipped, "the part after row 0 is damaged.*CRC"),
    (_not_utf8, "the part after row 0 is damaged, or of a kind.*utf-8"),
    (_encrypted, "its index is damaged, or of a kind that is not read.*decrypt"),
    (_twice, "has two columns 'text'"),
    (lambda path: _written(path, _table().select([])), "has no columns"),
    (lambda path: _written(path, _table().append_column("n", [[["x"]] * 2_000]).select(["n"])),
     r"row 1 has no text field .*its fields are 'n'"),
    (lambda path: _written(path, _table(text=[["x"]] * 2_000)), "row 1: field 'text' is list; expected text"),
    (lambda path: _written(path, _table(text=[b"x"] * 2_000)), "row 1: field 'text' is bytes; expected text"),
])
def test_a_parquet_file_that_does_not_read_is_one_sentence_for_every_reader(tmp_path, tokenizer, make, said):
    path = tmp_path / "a.parquet"
    make(path)
    (domain,) = resolve(str(path))
    for reader in (lambda: read(path), lambda: texts.read_text(str(path)),
                   lambda: needle_text.text_haystack([str(path)], byte_tokenizer(), 10, None),
                   lambda: tokenised(domain, make_encoder(tokenizer), tmp_path / "cache")):
        with pytest.raises(UserError, match=rf"(?s)^[^\n]*a\.parquet.*{said}[^\n]*$"):
            reader()
    assert not list((tmp_path / "cache").glob("files*"))


def test_only_the_columns_that_are_asked_for_are_read(tmp_path):
    """Others may be damaged, nested, or hold what Python has no value for."""
    import pyarrow

    path = tmp_path / "a.parquet"
    table = _table(source=["s"] * 2_000, when=pyarrow.array([2**62] * 2_000, pyarrow.timestamp("us")))
    data = _written(path, table, compression="none", use_dictionary=False)
    whole = read(path, join="source")
    assert len(whole) == 3_999 and read(path)[:1] == [table["text"][0].as_py()]
    where = data.rindex(table["text"][1_999].as_py().encode())
    for place in range(where + 100, where + 140):  # the column after the text
        data[place] = 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        read(path, join="source")
    assert read(path) == [text.as_py() for text in table["text"]]
    assert read(path, field="{text}") == read(path)
    with pytest.raises(UserError, match=r"is damaged|no text field 'body'"):
        read(path, field="body")
    with pytest.raises(UserError, match=r"^the text field '{text' is no template"):
        read(path, field="{text")


@pytest.mark.parametrize(("line", "said"), [
    ('{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "it is nested too deeply"),
    ('{"a": ' * 5_000 + "1" + "}" * 5_000, "it is nested too deeply"),
    ('{"text": "a", "n": ' + "9" * 5_000 + "}", r"4300 digits\) for integer string conversion: value has 5000 digits$"),
    ('{"text": "a\\udc00"}', "half a surrogate pair at character 1"),
    ('{"\\ud800": "a"}', r"no text field .*its fields are '\\ud800'"),
    ('{"text": "a\x00"}', "Invalid control character"),
    ('{"text": "a"} {"text": "b"}', "Extra data"),
    ("null", "holds null; expected an object"),
    ("3", "holds a number; expected an object"),
])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_line_that_does_not_read_is_named(tmp_path, line, said, packed):
    path = tmp_path / ("a.jsonl" + packed)
    data = f'{{"text": "fine"}}\r\n\n{line}\n'.encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(UserError, match=rf"a\.jsonl{packed}, line 3\b.*{said}"):
        read(path)


@pytest.mark.parametrize(("damage", "said"), [
    (lambda data: data[: len(data) // 2], r"cannot be decompressed after line \d+: .*end-of-stream"),
    (lambda data: data + b"garbage", r"cannot be decompressed after line \d+: Not a gzipped file"),
    (lambda data: data[:-6] + bytes([data[-6] ^ 1]) + data[-5:], r"cannot be decompressed after line \d+: CRC"),
    (lambda data: data[:2_000] + b"\xff" * 400 + data[2_400:], "cannot be decompressed"),
    (lambda data: b"plain", "cannot be decompressed: Not a gzipped"),
])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.parquet.gz"])
def test_damaged_compression(tmp_path, damage, said, name):
    path = tmp_path / name
    rng = np.random.default_rng(0)
    lines = "".join(json.dumps({"text": rng.bytes(20).hex()}) + "\n" for _ in range(4_000))
    path.write_bytes(damage(gzip.compress(lines.encode())))
    said = said.replace(r" after line \d+", "") if "parquet" in name else said
    with pytest.raises(UserError, match=rf"{name} {said}"):
        list(read_lines(path) if "txt" in name else read_records(path))


def test_what_is_sound_still_reads(tmp_path):
    import pyarrow

    _written(tmp_path / "a.parquet", _table(text=pyarrow.array(["x", "y"] * 1_000).dictionary_encode()))
    assert read(tmp_path / "a.parquet") == ["x", "y"] * 1_000
    _written(tmp_path / "b.parquet", _table(text=pyarrow.array([], pyarrow.string())))
    assert read(tmp_path / "b.parquet") == []
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\r\n\r\n') + gzip.compress(b'{"text": "y"}'))
    assert read(tmp_path / "a.jsonl.gz") == ["x", "y"], "members one after the other, and no last line end"


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied", "x"),
                                   OSError(errno.EIO, "Input/output error")])
def test_what_may_not_be_read_says_so(tmp_path, tokenizer, monkeypatch, error):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n')
    (domain,) = resolve(str(path))

    def refuse(*arguments, **options):
        raise error

    for place in ("l2a_jax.data.text._Counted.readinto", "pathlib.Path.open"):
        with monkeypatch.context() as patch:
            patch.setattr(place, refuse)
            for reader in ((lambda: read(path), lambda: texts.read_text(str(path))) if "readinto" in place else
                           (lambda: tokenised(domain, make_encoder(tokenizer), tmp_path / "cache"),)):
                with pytest.raises(UserError, match=rf"a\.jsonl cannot be read: {error.strerror}"):
                    reader()


def test_a_name_that_is_not_utf8_is_a_name(tmp_path, tokenizer):
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.write_text('{"text": "x"}\n')
    (domain,) = resolve(str(path))
    assert tokenised(domain, make_encoder(tokenizer), tmp_path / "cache").meta["documents"] == 1


def _full(path, mode):
    """A full disk under what is written: what it holds back fails when flushed, and again when closed."""
    return open("/dev/full", mode) if "w" in mode else open(path, mode)


def _raise(error):
    def refuse(*arguments, **options):
        raise error

    return refuse


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("name", "refuse", "said"), [
    ("l2a_jax.data.store.open", _full, "No space left"),
    ("l2a_jax.data.store.os.fsync", _raise(FULL), "No space left"),
    ("l2a_jax.data.store.np.save", _raise(OSError("250 requested and 0 written")), "250 requested"),
    ("l2a_jax.data.store.json.dump", _raise(FULL), "No space left"),
    ("l2a_jax.files.tempfile.mkdtemp", _raise(OSError(errno.EDQUOT, "Disk quota exceeded")), "quota"),
    ("l2a_jax.files.Path.rename", _raise(OSError(errno.EROFS, "Read-only file system")), "Read-only"),
])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(write, texts, tokenizer, tmp_path, monkeypatch, name, refuse,
                                                        said):
    path = write("a.jsonl", texts(300))
    monkeypatch.setattr(tokenise, "BATCH", 5_000)
    (domain,) = resolve(str(path))
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(name, refuse, raising=False)
        with pytest.raises(UserError, match=rf"token cache {cache} cannot be written \(.*{said}.*L2A_CACHE"):
            tokenised(domain, make_encoder(tokenizer), cache)
    assert [left.name for left in cache.iterdir() if left.name != "hashes"] == []
    store = tokenised(domain, make_encoder(tokenizer), cache)
    assert store.meta["documents"] == 300

    # The slower of two builders keeps the other one's store, whatever stopped its own once it had begun.
    if "mkdtemp" in name:
        return
    made, exists = store.folder, type(path).exists
    with monkeypatch.context() as patch:
        patch.setattr(name, refuse, raising=False)
        patch.setattr(type(path), "exists", lambda self: self != made and exists(self))
        tokenised(domain, make_encoder(tokenizer), cache)
    assert sorted(os.listdir(made)) == sorted([*FILES, "meta.json"])


@pytest.mark.parametrize(("change", "said"), [
    ({"sizes": [1, 2]}, "sizes is a list; expected an object"),
    ({"sizes": {"tokens.bin": 3}}, "sizes.offsets.npy is missing"),
    ({"checksums": None}, "checksums is null"),
    ({"checksums": {name: [] for name in FILES}}, "0 checksums of tokens.bin"),
    ({"dtype": "float64"}, "expected one of uint16, uint32"),
    ({"tokens": "many"}, "tokens is 'many'; expected a whole number"),
    ({"documents": -1}, "documents is -1; expected"),
    ({"key": 3}, "key is 3; expected an object"),
    ({"files": "a"}, "files is 'a'; expected a list"),
    ({"text_bytes": None}, "text_bytes is null"),
])
def test_a_store_that_says_something_else_of_itself_is_damaged(write, texts, tokenizer, tmp_path, change, said):
    (domain,) = resolve(str(write("a.jsonl", texts(3))))
    meta = tokenised(domain, make_encoder(tokenizer), tmp_path / "cache").folder / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    with pytest.raises(UserError, match=rf"meta\.json is damaged: .*{said}.*delete the folder"):
        tokenised(domain, make_encoder(tokenizer), tmp_path / "cache")


PIQA = {"goal": "g", "sol1": "a", "sol2": "b"}


@pytest.mark.parametrize(("record", "labels", "said"), [
    (PIQA, "\u00b2\n", "the label is '\u00b2'; expected a whole number from 0 to 1"),
    (PIQA, "9" * 5_000 + "\n", "expected a whole number from 0 to 1"),
    (PIQA, "\u0661\n", "expected a whole number"),
    (PIQA | {"goal": "\ud800"}, "0\n", "line 1: the text holds half a surrogate pair"),
    (PIQA | {"sol1": "x\udc00"}, "0\n", "line 1: the text holds half a surrogate pair at character 1"),
    (PIQA, "0\n1\n", "holds 2 labels; piqa.jsonl has 1 items"),
    (PIQA, "", "holds 0 labels"),
])
def test_benchmark_files_that_do_not_fit(tmp_path, record, labels, said):
    (tmp_path / "piqa.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "piqa-labels.lst").write_text(labels)
    with pytest.raises(UserError, match=said):
        task_files.read_task("piqa", tmp_path)


@pytest.mark.parametrize("labels", ["1", "1\n", "1\r\n", "1\n\n \n", "\ufeff1\n"])
def test_labels_end_as_files_end(tmp_path, labels):
    (tmp_path / "piqa.jsonl").write_text(json.dumps(PIQA))
    (tmp_path / "piqa-labels.lst").write_bytes(labels.encode())
    (tmp_path / "piqa_again.jsonl").symlink_to("piqa.jsonl")
    os.link(tmp_path / "piqa-labels.lst", tmp_path / "piqa_again-labels.lst")
    assert task_files.read_task("piqa", tmp_path).documents == [{**PIQA, "label": 1}]
    (tmp_path / "piqa_pipe.jsonl.gz").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "piqa_pipe.jsonl.gz")
    with pytest.raises(UserError, match="is a pipe"):
        task_files.read_task("piqa", tmp_path)
