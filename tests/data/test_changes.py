"""What a refused `--resume` says of its data: the file or domain that changed."""

import json

import pytest

from l2a_jax.data.changes import difference


@pytest.fixture
def folder(write, texts, tmp_path):
    for seed, name in enumerate("abc"):
        write(f"d/{name}.jsonl", texts(30, seed=seed))
    return tmp_path / "d"


def kept(data):
    """As it comes back from config.json."""
    return json.loads(json.dumps(data.describe()))


def _change(folder):
    path = folder / "b.jsonl"
    path.write_text(path.read_text().replace("1.3 ", "1.x "))


def _swap(folder):
    """The same hashes in another order: other rows, though every count is the same."""
    (folder / "a.jsonl").rename(folder / "x")
    (folder / "c.jsonl").rename(folder / "a.jsonl")
    (folder / "x").rename(folder / "c.jsonl")


@pytest.mark.parametrize(("change", "said"), [
    (_change, ["d/b.jsonl of 'files' has changed"]),
    (lambda folder: (folder / "c.jsonl").unlink(), ["d/c.jsonl is no longer in 'files'"]),
    (lambda folder: (folder / "b2.jsonl").write_text('{"text": "one more"}\n'), ["d/b2.jsonl in 'files' is new"]),
    (_swap, ["a.jsonl of 'files' has changed", "c.jsonl of 'files' has changed"]),
    (lambda folder: (folder / "b.jsonl").rename(folder / "z.jsonl"), ["files of 'files' come in another order"]),
    (lambda folder: [(folder / f"{i}.txt").write_text(f"text {i}") for i in range(9)], ["and 5 more"]),
])
def test_the_file_that_changed_is_named_and_the_others_are_not(opened, folder, change, said):
    before = opened(folder)
    change(folder)
    after = opened(folder)
    assert before.fingerprint != after.fingerprint
    found = difference(kept(before), kept(after))
    assert all(one in found for one in said), found
    assert ("d/a.jsonl" in found) == (change is _swap)


def test_domains_settings_and_tokenizers_are_named(opened, folder):
    a, b = f"one={folder / 'a.jsonl'}", f"two={folder / 'b.jsonl'}"
    old = kept(opened([a]))
    assert difference(old, kept(opened([a, b]))) == "the domain 'two' was not there before"
    assert difference(kept(opened([a, b])), old) == "the domain 'two' is gone"
    assert difference(old, kept(opened([a], seed=1))) == "seed is 1, not 0"
    assert difference(old, kept(opened([a], end_id=7))) == "the tokenizer is another one"
    assert difference(old, kept(opened([a], batch_size=2, packing="concat"))) == \
        "packing is concat, not best_fit, batch_size is 2, not 4"
    assert "its order or its shares" in difference(old, old)


def test_files_elsewhere_with_the_same_text_are_the_same_data(opened, folder, tmp_path):
    before = opened(folder)
    folder.rename(tmp_path / "elsewhere")
    after = opened(tmp_path / "elsewhere")
    assert before.fingerprint == after.fingerprint
    assert "its order or its shares" in difference(kept(before), kept(after))


def test_runs_of_before_the_hashes_name_the_domain(opened, folder):
    def stripped(data):
        said = kept(data)
        del said["tokenizer"]
        for domain in said["domains"].values():
            del domain["sources"]
        return said

    before = stripped(opened(folder))
    _change(folder)
    longer = folder / "c.jsonl"
    longer.write_text(longer.read_text() + '{"text": "one more"}\n')
    assert difference(before, kept(opened(folder))) == "documents of 'files': 90, not 89"
    longer.unlink()
    assert "'files': ['a.jsonl', 'b.jsonl'], not ['a.jsonl', 'b.jsonl', 'c.jsonl']" in difference(
        before, kept(opened(folder)))


@pytest.mark.parametrize("old", [{}, {"domains": None}, {"domains": []}, {"domains": {"files": 1.0}},
                                 {"domains": {"files": {"sources": ["a"]}}},
                                 {"name": "synthetic recall corpus", "domains": {"recall": 1.0}}])
def test_a_record_that_says_little_is_no_failure(opened, folder, old):
    assert difference(old, kept(opened(folder)))
    assert difference(kept(opened(folder)), old)
