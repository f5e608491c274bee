"""The token store: built once, never half, checked when opened."""

import json
import os
import time

import numpy as np
import pytest

from l2a_jax.data import tokenise
from l2a_jax.data.encoder import make_encoder
from l2a_jax.data.recipes import resolve
from l2a_jax.data.store import CHUNK, largest_id, open_store, writing
from l2a_jax.data.tokenise import cache_folder, tokenised
from l2a_jax.errors import UserError


@pytest.fixture
def build(tokenizer, tmp_path):
    def build(path, **options):
        (domain,) = resolve(str(path))
        return tokenised(domain, make_encoder(tokenizer, **options), tmp_path / "cache")

    return build


def read(store, tokenizer):
    return [tokenizer.decode(store.tokens[a:b].tolist(), skip_special_tokens=False)
            for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]  # fmt: skip


def test_documents_come_back_as_they_were_each_with_its_end(build, write, texts, tokenizer):
    found = [*texts(50), "ünï cödé 😀\n\n  spaces \t", "", "last"]
    store = build(write("a.jsonl.gz", found))
    assert read(store, tokenizer) == [text + "<|endoftext|>" for text in found if text]
    assert store.meta["empty_documents"] == 1 and store.meta["documents"] == 52
    assert store.tokens.dtype == np.uint16, "the smallest type that holds the vocabulary"
    assert store.meta["text_bytes"] == sum(len(text.encode()) for text in found)


def test_long_documents_and_many_batches(build, write, texts, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenise, "BATCH", 1000)
    found = ["\n".join(texts(40, seed=s)) for s in range(5)]
    assert read(build(write("a.jsonl", found)), tokenizer) == [text + "<|endoftext|>" for text in found]


def test_a_second_opening_builds_nothing_and_a_change_builds_anew(build, write, texts, tmp_path, monkeypatch):
    path = write("a.jsonl", texts(5))
    first = build(path)
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(path.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "_build", lambda *a: pytest.fail("built again"))
        assert build(path).folder == build(moved).folder == first.folder, "known by its text, wherever it is"
    write("a.jsonl", texts(5, seed=1))
    assert build(path).folder != first.folder, "other text of the same name"
    assert build(path, end_id=0).folder != build(path).folder, "another tokenizer or end"


def test_hashes_of_old_files_are_remembered_but_not_of_fresh_ones(write, texts, tmp_path, monkeypatch):
    path = write("a.txt", texts(1))
    fresh = tokenise._file_hash(path, tmp_path)
    path.write_bytes(path.read_bytes()[::-1])
    assert tokenise._file_hash(path, tmp_path) != fresh
    later = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: later)
    old = tokenise._file_hash(path, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "sha256", lambda *a: pytest.fail("read again"))
        assert tokenise._file_hash(path, tmp_path) == old
    write("a.txt", ["other"])
    assert tokenise._file_hash(path, tmp_path) != old


def _rewritten(path, data):
    path.write_bytes(data)


def _replaced(path, data):
    other = path.with_name("other")
    other.write_bytes(data)
    other.replace(path)


def _patched(path, data):
    with path.open("r+b") as file:
        file.seek(len(data) - 1)
        file.write(data[-1:])


def _behind_a_link(path, data):
    path.rename(path.with_name("one"))
    path.with_name("two").write_bytes(data)
    path.symlink_to("two")


@pytest.mark.parametrize("change", [_rewritten, _replaced, _patched, _behind_a_link])
def test_a_file_of_the_same_size_and_time_is_read_anew(build, write, opened, monkeypatch, change):
    """As `cp -p`, `rsync -t` and archives leave it."""
    path = write("a.txt", ["once upon a time"])
    os.utime(path, ns=(10**18, 10**18))
    later = time.time() + 60  # old enough to be remembered
    monkeypatch.setattr(time, "time", lambda: later)
    first, data = build(path), opened(path, held_out=0.0, seq_len=8)
    time.sleep(0.02)  # the clock's grain
    change(path, b"once upon a timE")
    os.utime(path, ns=(10**18, 10**18))
    assert path.stat().st_size == 16 and path.stat().st_mtime_ns == 10**18
    assert build(path).tokens.tolist() != first.tokens.tolist()
    assert opened(path, held_out=0.0, seq_len=8).fingerprint != data.fingerprint, "what --resume compares"


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "identities.npy"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_store_is_one_error_that_names_the_file_and_the_cure(build, write, texts, name, damage):
    path = write("a.jsonl", texts(20))
    folder = build(path).folder
    file = folder / name
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data if damage == "flip" else data[:-4])
    if damage == "remove":
        file.unlink()
    what = {"flip": "its checksum differs", "cut": "bytes instead of", "remove": "it is missing"}[damage]
    with pytest.raises(UserError, match=rf"{name} is damaged: .*{what}.*delete the folder .* built again"):
        build(path)
    for left in folder.iterdir():
        left.unlink()
    folder.rmdir()
    assert build(path).meta["documents"] == 20


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"sizes": 1}', None])
def test_a_store_without_a_readable_meta_is_damaged(build, write, texts, content):
    path = write("a.jsonl", texts(3))
    meta = build(path).folder / "meta.json"
    meta.unlink()
    if content is not None:
        meta.write_text(content)
    with pytest.raises(UserError, match=r"meta\.json is damaged: it (is missing|does not read)"):
        build(path)


def test_counts_in_meta_must_match_the_files(build, write, texts):
    folder = build(write("a.jsonl", texts(3))).folder
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"documents": 4}))
    with pytest.raises(UserError, match=r"its counts do not match"):
        open_store(folder)


def test_a_checksum_covers_every_chunk(tmp_path):
    ids = np.arange(CHUNK // 2 * 3 + 10)
    with writing(tmp_path / "s", "uint32") as writer:
        writer.append(ids)
        writer.end(1)
        writer.finish({})
    assert len(open_store(tmp_path / "s").meta["checksums"]["tokens.bin"]) == 7
    for place in (0, 3 * CHUNK + 5, ids.size * 4 - 1):
        with open(tmp_path / "s" / "tokens.bin", "r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 255]))
        with pytest.raises(UserError, match=f"from byte {place // CHUNK * CHUNK};"):
            open_store(tmp_path / "s")
        with open(tmp_path / "s" / "tokens.bin", "r+b") as file:
            file.seek(place)
            file.write(byte)
    open_store(tmp_path / "s")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_leaves_nothing(build, write, texts, tmp_path, monkeypatch, error):
    path = write("a.jsonl", texts(50))
    monkeypatch.setattr(tokenise, "BATCH", 500)

    def interrupted(self, identity, calls=[]):  # noqa: B006
        calls.append(identity)
        if len(calls) == 20:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr("l2a_jax.data.store.StoreWriter.end", interrupted)
        with pytest.raises(error):
            build(path)
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.name != "hashes"] == []
    assert build(path).meta["documents"] == 50


def test_what_a_killed_build_left_is_no_store_and_is_swept_after_a_day(build, write, texts, tmp_path):
    left = tmp_path / "cache" / ".files-0.partial-x"
    left.mkdir(parents=True)
    (left / "tokens.bin").write_bytes(b"half")
    path = write("a.jsonl", texts(3))
    build(path)
    assert left.exists(), "another process may be at work on it"
    for place in (left / "tokens.bin", left):
        os.utime(place, (1, 1))
    build(write("b.jsonl", texts(3, seed=2)))
    assert not left.exists()


def test_two_processes_may_build_the_same_store(build, write, texts, tmp_path):
    store = build(write("a.jsonl", texts(3)))
    with writing(store.folder, "uint16") as writer:  # the slower one
        writer.append(np.arange(3))
        writer.end(0)
        writer.finish({})
    assert open_store(store.folder).meta["documents"] == 3


@pytest.mark.parametrize("documents", [[], [""], ["  \n"]])
def test_no_text_at_all_is_an_error_that_names_the_files(build, write, documents):
    path = write("a.jsonl", documents)
    with pytest.raises(UserError, match=r"no text for the domain 'files': .*a\.jsonl holds no document"):
        build(path)


def test_empty_files_among_others_are_fine(build, write, texts, tmp_path, tokenizer):
    write("d/a.jsonl", [])
    write("d/b.txt", [])
    write("d/c.jsonl", ["text"])
    assert read(build(tmp_path / "d"), tokenizer) == ["text<|endoftext|>"]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("L2A_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path and cache_folder("x").name == "x"
    monkeypatch.delenv("L2A_CACHE")
    assert cache_folder().parts[-2:] == ("l2a_jax", "tokens")
    with pytest.raises(UserError, match="no home folder for the token cache ~nobody-of-that-name/x; set L2A_CACHE"):
        cache_folder("~nobody-of-that-name/x")


def test_a_cache_that_cannot_be_written_is_an_error(write, texts, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    (domain,) = resolve(str(write("a.jsonl", texts(3))))
    with pytest.raises(UserError, match=r"cannot be written .*L2A_CACHE"):
        tokenised(domain, make_encoder(tokenizer), tmp_path / "file" / "cache")


def test_any_tokenizer_that_encodes_will_do(write, texts, tokenizer, tmp_path):
    class Plain:
        eos_token_id, vocab_size = 0, 257

        def encode(self, text, add_special_tokens):
            return [1 + b for b in text.encode()]

        def __repr__(self):
            return "Plain()"

    (domain,) = resolve(str(write("a.jsonl", ["ab", "c"])))
    assert tokenised(domain, make_encoder(Plain()), tmp_path / "c").tokens.tolist() == [98, 99, 0, 100, 0]
    with pytest.raises(UserError, match=r"expected one with encode"):
        make_encoder(object())
    tokenizer_without_end = type("T", (), {"encode": lambda self, text, add_special_tokens: []})()
    with pytest.raises(UserError, match=r"neither .* nor eos_token_id"):
        make_encoder(tokenizer_without_end)


def test_truncation_and_padding_left_on_do_not_cut_documents(tokenizer):
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.enable_truncation(3)
    copy.enable_padding()
    assert [len(ids) for ids in make_encoder(copy).encode(["abcdef", "a"])] == [6, 1]


@pytest.mark.torch
def test_a_transformers_tokenizer(tokenizer):
    import transformers

    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="z")
    encoder, plain = make_encoder(wrapped), make_encoder(tokenizer)
    assert encoder.end_id == plain.end_id == 256, "documents end with <|endoftext|>, not with a turn's end"
    assert encoder.encode(["abc"])[0].tolist() == plain.encode(["abc"])[0].tolist()


def test_the_largest_id_is_kept_and_found_for_stores_that_do_not_say_it(build, write, tmp_path, monkeypatch):
    path = write("a.txt", ["az"])
    store = build(path)
    assert store.meta["largest_id"] == largest_id(store) == 256 == store.tokens.max()
    meta = store.folder / "meta.json"
    old = {name: value for name, value in store.meta.items() if name != "largest_id"}
    meta.write_text(json.dumps(old))
    with monkeypatch.context() as patch:
        patch.setattr("l2a_jax.files.write_json", lambda *a: (_ for _ in ()).throw(UserError("read only")))
        assert largest_id(build(path)) == 256 and json.loads(meta.read_text()) == old
    assert largest_id(build(path)) == 256 and json.loads(meta.read_text()) == {**old, "largest_id": 256}
    assert build(path).meta["checksums"] == store.meta["checksums"]


@pytest.mark.parametrize("ids", [[1, 70_000, 2], [3, -1], [2**40]])
def test_ids_that_the_store_does_not_hold_are_refused_and_not_wrapped(write, tmp_path, ids):
    class Odd:
        eos_token_id, vocab_size = 0, 257

        def encode(self, text, add_special_tokens):
            return ids

    (domain,) = resolve(str(write("a.jsonl", ["x"])))
    with pytest.raises(UserError, match=rf"gives id {max(ids, key=abs) if min(ids) >= 0 else -1};"):
        tokenised(domain, make_encoder(Odd()), tmp_path / "c")
