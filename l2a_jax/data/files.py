"""Which files an entry means, for `--data`, evaluation texts and haystacks alike.

A file means itself. A folder means every file of a known format at any depth below it, folders behind links included.
A pattern (`*`, `?`, `[...]`, `**` for any depth) means the files that it matches, folders not. Hidden files and folders
count only where the entry itself names them. Files are sorted by path; of several names of one file the first counts.
"""

from __future__ import annotations

import glob
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from l2a_jax.errors import UserError

TEXT, LINES, PARQUET = (".txt", ".raw", ".tokens"), (".jsonl",), (".parquet",)
SUFFIXES = TEXT + LINES + PARQUET
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
          stat.S_IFBLK: "a device"}


def suffix(path: Path) -> str:
    """The suffix that tells the format: `.jsonl` for `a.jsonl` and `a.jsonl.gz`."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def find(place: str, label: str) -> list[Path]:
    """The files that `place` means, sorted by path; none where nothing has that name. See `once`.

    Raises UserError, beginning with `label` (the flag and its value), on a file of another format, on what is no
    regular file, and on what cannot be looked at.
    """
    if not place.strip():  # an unset variable, which `Path` takes for the current folder
        raise UserError(f"{label}: an empty name; expected a file, a folder or a pattern (. is the current folder)")
    path = Path(os.path.expanduser(place))  # `Path.expanduser` raises on `~nobody`
    try:
        if path.is_dir():
            found = [file for file in _matches(path, ["**"]) if suffix(file) in SUFFIXES]
        elif _exists(path):
            found = [path]
        else:
            at = next((i for i, part in enumerate(path.parts) if glob.has_magic(part)), len(path.parts))
            found = list(_matches(Path(*path.parts[:at]), path.parts[at:])) if at < len(path.parts) else []
            found = [file for file in found if not file.is_dir()]
    except OSError as error:
        raise UserError(f"{label}: {error.filename} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a null character
        raise UserError(f"{label}: {place!r} is no path: {error}") from None
    for file in found:
        if suffix(file) not in SUFFIXES:
            raise UserError(f"{label}: {file} is no {', '.join(SUFFIXES)} file (also .gz)")
        check_regular(file, f"{label}: ")
    return sorted(found)


def once(files: Iterable[Path]) -> tuple[Path, ...]:
    """The files in their order, each at the first of its names: links, hard ones too, make no second file."""
    known: dict[tuple[int, int], Path] = {}
    for file in files:
        known.setdefault(_identity(file), file)
    return tuple(known.values())


def check_regular(file: Path, label: str = "") -> None:
    """UserError unless reading `file` ends: a pipe would wait for ever, a device need not end."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{label}{file} is a link to nothing" if file.is_symlink() else
                        f"{label}{file} does not exist") from None
    except OSError as error:
        raise UserError(f"{label}{file} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{label}{file} is {_KINDS.get(stat.S_IFMT(mode), 'something else')}; expected a regular file")


def _matches(base: Path, parts: Sequence[str]) -> Iterator[Path]:
    """What a pattern's `parts` match below `base`. Like `glob.glob`, except that a folder that cannot be read is an
    error instead of an empty one, and that links in a circle end."""
    if not parts:
        yield base
        return
    part, *rest = parts
    if part == "**":
        for folder in _folders(base):
            yield from _matches(folder, rest or ["*"])
    elif not glob.has_magic(part):
        if _exists(base / part):
            yield from _matches(base / part, rest)
    elif base.is_dir():
        for name in os.listdir(base):
            if fnmatch(name, part) and (part.startswith(".") or not name.startswith(".")):
                yield from _matches(base / name, rest)


def _folders(base: Path) -> Iterator[Path]:
    """`base` and the folders below it, each once: by its own name rather than by a link's."""
    seen, waiting = set(), deque([base] if base.is_dir() else [])
    while waiting:
        folder = waiting.popleft()
        if _identity(folder) in seen:
            continue
        seen.add(_identity(folder))
        yield folder
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                if entry.is_dir() and not entry.name.startswith("."):
                    (waiting.append if entry.is_symlink() else waiting.appendleft)(folder / entry.name)


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _exists(path: Path) -> bool:
    """Whether the name is there, be it a link to nothing. Raises OSError where that cannot be known."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
