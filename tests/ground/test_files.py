"""Files whole or not at all, locks that end with their process, and one sentence for what cannot be read."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time

import pytest

from l2a_jax import files
from l2a_jax.errors import UserError

UNREADABLE = {
    "missing": (None, r"has no value.json"),
    "empty": (b"", "is not readable JSON"),
    "cut": (b'{"a": [1, 2', "is not readable JSON"),
    "a list": (b"[1, 2]", "holds a list; expected an object"),
    "a number": (b"3", "holds a number; expected an object"),
    "null": (b"null", "holds null; expected an object"),
    "binary": (bytes(range(256)), "is not readable JSON"),
    "too deep": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "too long a number": (b'{"a": ' + b"9" * 10_000 + b"}", "is not readable JSON"),
    "a folder": ("folder", "cannot be read"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_damaged_json_is_one_sentence_that_names_the_file(name, tmp_path):
    content, said = UNREADABLE[name]
    path = tmp_path / "value.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        files.read_json(path)
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone")
    assert files.read_text(tmp_path / "a") == "one"


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"value.json cannot be written: No space left on device"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["value.json"]


def test_a_folder_is_whole_or_not_there(tmp_path):
    with files.partial_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(RuntimeError), files.partial_folder(tmp_path / "other") as partial:
        raise RuntimeError
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_YOUNG", 0.0)
    left = tmp_path / ".out.partial-dead"
    left.mkdir()
    with files.partial_folder(tmp_path / "one") as first:
        assert not left.exists()
        with files.partial_folder(tmp_path / "two"):
            assert first.exists()
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


HOLD = """
import pathlib, sys, time
from l2a_jax.files import claim
with claim(pathlib.Path(sys.argv[1])) as other:
    print(other, flush=True)
    time.sleep(600)
"""


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    path = tmp_path / ".lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "None\n"
    with files.claim(path) as other:
        assert f"process {process.pid}" in other
    with pytest.raises(UserError, match=rf"--resume {tmp_path} is in use by process {process.pid}"), \
            files.owned(tmp_path, "--resume"):
        pass
    process.kill()
    process.communicate()
    with files.owned(tmp_path, "--resume"):
        assert path.exists()
    assert not path.exists()


def test_a_lock_is_waited_for(tmp_path):
    from threading import Timer

    path = tmp_path / ".lock"
    first = files.claim(path)
    assert first.__enter__() is None
    with files.claim(path, wait=0.1) as other:
        assert "process" in other
    timer = Timer(0.2, first.__exit__, (None, None, None))
    timer.start()
    with files.claim(path, wait=30.0) as other:
        assert other is None
    timer.join()


@pytest.mark.parametrize(("place", "said"), [
    ("a/b/c.json", None), ("c.json", None), ("file/c.json", "file is no folder"),
    ("file/below/c.json", "file is no folder"), ("folder", "Is a directory"), ("a/" + "n" * 300, "File name too long"),
    ("n" * 300 + "/c.json", "File name too long")])
def test_a_place_is_tried_before_the_work_and_left_as_it_was(tmp_path, place, said):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    if said is None:
        files.check_file(tmp_path / place, "--out")
    else:
        with pytest.raises(UserError, match=rf"--out .* cannot be written: .*{said}"):
            files.check_file(tmp_path / place, "--out")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and (tmp_path / "file").read_text() == "kept"


def test_a_file_written_in_a_block_is_whole_or_not_there(tmp_path):
    path = tmp_path / "value.bin"
    with files.whole(path) as partial:
        partial.write_bytes(b"1")
        assert not path.exists()
    with pytest.raises(RuntimeError), files.whole(path) as partial:
        partial.write_bytes(b"2")
        raise RuntimeError
    with pytest.raises(UserError, match=r"value.bin cannot be written: No space"), files.whole(path) as partial:
        partial.write_bytes(b"3")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_bytes() == b"1" and os.listdir(tmp_path) == ["value.bin"]


@pytest.mark.parametrize(("age", "kept"), [(3_600, True), (100_000, False)])
def test_without_locks_only_a_day_of_silence_abandons_a_partial_folder(tmp_path, monkeypatch, caplog, age, kept):
    """Its writer may be at work: the folder's own time does not change while a file in it grows."""
    left = tmp_path / ".out.partial-x"
    left.mkdir()
    (left / "tokens.bin").write_bytes(b"half")
    at = time.time() - age
    os.utime(left, (1, 1))
    os.utime(left / "tokens.bin", (at, at))
    os.utime(left, (1, 1))

    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with files.partial_folder(tmp_path / "out") as partial:
        assert partial.exists()
    assert left.exists() == kept and (tmp_path / "out").is_dir()
    with files.owned(tmp_path / "out", "x"):
        assert "cannot lock" in caplog.text


def test_a_number_of_thousands_of_digits_is_told_in_the_user_s_terms():
    with pytest.raises(UserError, match=r"a.json, line 2 is not readable JSON: .*value has 5000 digits$"):
        files.parse_json("[" + "9" * 5_000 + "]", "a.json, line 2", None)
