"""Files and folders as this package reads and writes them: whole or not at all, and one sentence when it cannot be.

A lock here is the system's (`flock`), so it goes with the process that holds it, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from l2a_jax.errors import UserError

log = logging.getLogger("l2a_jax")
KINDS = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false",
          type(None): "null"}
EXPECTED = {**KINDS, int: "a whole number", Path: "a path"}
_PARTIAL = ".partial-"
_POLL = 0.05
"""Seconds between two looks at a lock that somebody else holds."""
_ABANDONED = 86_400.0
"""Seconds without a change after which a partial folder that cannot be locked is nobody's."""
_YOUNG = 60.0
"""Seconds for which a partial folder is left alone even if nobody holds it: its maker may be about to."""


def read_text(path: Path, what: str = "") -> str:
    """The text of a UTF-8 file, without a byte-order mark. `what` (a flag) begins the message.

    Raises UserError where there is no such file, or it cannot be read, or is not UTF-8.
    """
    name = f"{what} {path}".strip()
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{name} is not UTF-8: byte 0x{byte:02x} at offset {error.start}") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from error


def parse_json(text: str | bytes, where: str, expect: type | None = dict) -> Any:
    """The value that `text` spells; `where` names it in messages. UserError unless it is JSON, and an `expect`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{where} is not readable JSON: it is nested too deeply") from None
    except ValueError as error:  # also bytes that are no text, and numbers of thousands of digits
        raise UserError(f"{where} is not readable JSON: {str(error).split(';')[0]}") from error
    if expect is not None and not isinstance(value, expect):
        raise UserError(f"{where} holds {KINDS[type(value)]}; expected {KINDS[expect]}")
    return value


def read_json(path: Path, expect: type | None = dict) -> Any:
    """The value in a JSON file. UserError where the file is missing, unreadable, no JSON, or not an `expect`."""
    if not path.exists() and os.access(path.parent, os.X_OK):
        raise UserError(f"{path.parent} has no {path.name}")
    with reading(path):
        return parse_json(path.read_bytes(), str(path), expect)


@contextlib.contextmanager
def reading(what: object) -> Iterator[None]:
    """Whatever the system refuses in the block becomes a UserError that says so, and never that something is missing
    which is there; `what` is named where the system names no file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or what} cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def writing(what: object) -> Iterator[None]:
    """Whatever the system refuses in the block becomes a UserError: `what` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror or error}") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. UserError where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def native(value: Any) -> Any:
    """Arrays and numpy scalars as Python's numbers and lists, all else as it is."""
    return _changed(value, lambda leaf: leaf)


def plain(value: Any) -> Any:
    """`native`, for JSON: a number that is not finite becomes a text, never 0. Compute and print before this."""
    return _changed(value, lambda leaf: str(leaf) if isinstance(leaf, float) and not math.isfinite(leaf) else leaf)


def from_plain(value: Any) -> Any:
    """The inverse of `plain`: texts that spell a number which is not finite are numbers again."""
    return _changed(value, lambda leaf: float(leaf) if leaf in ("nan", "inf", "-inf") else leaf)


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """A nested value of dictionaries and lists, with `change` made to everything that is neither."""
    if hasattr(value, "__array__"):
        import numpy as np

        value = np.asarray(value).tolist()
    if isinstance(value, dict):
        return {name: _changed(entry, change) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_changed(entry, change) for entry in value]
    return change(value)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its name once the block has ended well, and is removed otherwise.

    UserError where the system refuses.
    """
    temporary = path.with_name(f".{path.name[:50]}{_PARTIAL}{os.getpid()}")
    with writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all. UserError where the system refuses."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all. UserError where the system refuses."""
    write_text(path, json.dumps(plain(value), indent=2) + "\n")


def check_writable(folder: Path, what: str) -> None:
    """Make `folder` and prove that a file can be written in it. UserError, beginning with `what`, where not."""
    with writing(f"{what} {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        _probe(folder)


def _probe(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"0" * 4096)
        probe.flush()


def check_file(path: Path, what: str) -> None:
    """Prove that the file `path` can be written, with the folders above it, and leave nothing of that behind.

    UserError, beginning with `what`, where it cannot.
    """
    made: list[Path] = []
    try:
        with writing(f"{what} {path}"):
            for folder in reversed([path.parent, *path.parent.parents]):
                if not folder.is_dir():
                    if folder.exists():
                        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is no folder")
                    folder.mkdir(exist_ok=True)
                    made.append(folder)
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISDIR(path.stat().st_mode):  # where the name is too long, this says so
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            _probe(path.parent)
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name once the block has ended well, and disappears otherwise.

    What killed processes left beside it is removed. Raises OSError where the system refuses: what that means, the
    caller knows. If `out` has appeared meanwhile and is not empty, the error is that of renaming onto it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name[:50]}{_PARTIAL}", dir=out.parent))
    held = os.open(partial, os.O_RDONLY)
    try:
        _try_lock(held)
        partial.chmod(0o777 & ~_umask())
        yield partial
        # rename(2) replaces an empty folder and nothing else, so nothing that appeared meanwhile is lost.
        partial.rename(out)
    finally:
        os.close(held)
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove the partial folders that nobody holds any more."""
    for left in parent.glob(f".*{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            if not left.is_dir() or time.time() - left.stat().st_mtime < _YOUNG:
                continue
            held = os.open(left, os.O_RDONLY)
            try:
                lock = _try_lock(held)
                # Where nothing can be locked, only age tells a killed writer from one at work.
                if lock or (lock is None and time.time() - max(f.stat().st_mtime for f in (left, *left.rglob("*")))
                            > _ABANDONED):
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(held)


@contextlib.contextmanager
def claim(path: Path, wait: float = 0.0) -> Iterator[str | None]:
    """Hold the lock file `path` for the block: yields None, or, where another process holds it, who that is.

    `wait`: seconds to wait for it first. The file says who holds it; it goes when the block ends, and binds nobody once
    its process has ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + wait
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _try_lock(held) is False:
                if time.monotonic() < until:
                    time.sleep(_POLL)
                    continue
                yield os.read(held, 4096).decode(errors="replace").strip() or "another process"
                return
            # Whoever had it before may have removed the file that we opened: then somebody else can lock a new one.
            if not _same_file(held, path):
                continue
            os.ftruncate(held, 0)
            os.write(held, f"process {os.getpid()} ({Path(sys.argv[0]).name}), since "
                           f"{time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
            try:
                yield None
            finally:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
            return
        finally:
            os.close(held)


@contextlib.contextmanager
def owned(folder: Path, what: str) -> Iterator[None]:
    """Be the only process that writes in `folder` for the block. UserError, beginning with `what`, names the other."""
    with claim(folder / ".lock") as other:
        if other is not None:
            raise UserError(f"{what} {folder} is in use by {other}; wait for it, or stop it")
        yield


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None, with a warning, on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        log.warning("this file system cannot lock (%s): two processes in one folder will not notice each other",
                    error.strerror)
        return None
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
