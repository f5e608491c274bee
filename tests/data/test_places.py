"""Which files an entry means: one rule for data, evaluation texts and haystacks."""

import os
import socket

import pytest

from l2a_jax.data.files import find, once
from l2a_jax.data.recipes import resolve
from l2a_jax.errors import UserError
from l2a_jax.evaluation import needle_text, texts


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with hidden names, a link to a folder and to a file, a hard link, and a circle."""
    for name in ("d/a.txt", "d/b.jsonl.gz", "d/Z.parquet", "d/deep/er/c.txt", "d/deep/note.md", "d/.hidden.txt",
                 "d/.git/e.txt", "outside/f.txt", "outside/.g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    (tmp_path / "d/linked").symlink_to(tmp_path / "outside")
    (tmp_path / "d/circle").symlink_to(tmp_path / "d")
    (tmp_path / "d/deep/circle").symlink_to("..")
    (tmp_path / "d/deep/again.txt").symlink_to("../a.txt")
    os.link(tmp_path / "d/a.txt", tmp_path / "d/hard.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("place", "expected"), [
    ("d", ["d/Z.parquet", "d/a.txt", "d/b.jsonl.gz", "d/deep/er/c.txt", "d/linked/f.txt"]),
    ("d/**/*.txt", ["d/a.txt", "d/deep/er/c.txt", "d/linked/f.txt"]),
    ("d/*/*.txt", ["d/circle/a.txt", "d/linked/f.txt"]),
    ("d/[ab]*", ["d/a.txt", "d/b.jsonl.gz"]),
    ("*/deep/*/?.txt", ["d/deep/circle/a.txt", "d/deep/er/c.txt"]),
    ("d/.*.txt", ["d/.hidden.txt"]),
    ("d/.git", ["d/.git/e.txt"]),
    ("d/../d/deep/again.txt", ["d/../d/deep/again.txt"]),
    ("nowhere/*.txt", []), ("nowhere", []), ("d/a.txt/b", []), ("~nobody-of-that-name/x", []),
])
def test_what_an_entry_means(tree, place, expected):
    assert list(map(str, once(find(place, "--x")))) == expected
    if expected:
        assert list(map(str, resolve(place)[0].files)) == expected
    if expected and all(name.endswith(".txt") for name in expected):
        names = [os.path.basename(name) for name in expected]
        assert list(texts.read_text(place).files) == names
        assert [str(path) for path in once(needle_text._files(place))] == expected


def test_a_file_of_several_entries_counts_once_at_its_first_place(tree):
    (domain,) = resolve(["d/deep/*.txt", "d/deep/er", "d/a.txt", "d/../d/hard.txt", "d/*.txt"])
    assert list(map(str, domain.files)) == ["d/deep/again.txt", "d/deep/er/c.txt"], "a.txt by its first name"


def test_several_circles_end(tree):
    for index in range(4):
        (tree / "d/deep" / f"more{index}").symlink_to(tree / "d")
    assert len(once(find("d/**/*[tlz]", "--x"))) == len(once(find("d", "--x"))) == 5


def _pipe(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(("make", "said"), [
    (_pipe, "is a pipe; expected a regular file"),
    (_socket, "is a socket; expected a regular file"),
    (lambda path: path.symlink_to("/dev/zero"), "is a device; expected a regular file"),
    (lambda path: path.symlink_to("nothing"), "is a link to nothing"),
    (lambda path: path.symlink_to(path.name), "symbolic links"),
])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tree, monkeypatch, make, said):
    monkeypatch.chdir(tree)
    make((tree / "d/deep/x.txt").relative_to(tree) if make is _socket else tree / "d/deep/x.txt")
    for place in ("d/deep/x.txt", "d/deep", "d/deep/*.txt"):
        for read in (resolve, texts.read_text, needle_text._files):
            with pytest.raises(UserError, match=rf"{place.replace('*', '.')}.*x\.txt .*{said}"):
                read(place)


def test_what_cannot_be_looked_at_says_so_and_is_not_missing(tree, monkeypatch):
    scandir, listdir = os.scandir, os.listdir

    def refuse(real):
        def look(path):
            if str(path).endswith("deep"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)
        return look

    monkeypatch.setattr(os, "scandir", refuse(scandir))
    monkeypatch.setattr(os, "listdir", refuse(listdir))
    for place in ("d", "d/*/*.txt", "d/**"):
        with pytest.raises(UserError, match="d/deep cannot be read: Permission denied"):
            resolve(place)
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        texts.read_text("x" * 5_000 + ".txt")
    with pytest.raises(UserError, match="is no path"):
        resolve("a\0b.txt")
