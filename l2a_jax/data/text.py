"""Files as a stream of documents: lines and records in, pieces of text out, memory flat however large the file.

A reader yields `Fragment`s (some text; does it start a new document?), which is all that is needed to split a file
into documents and to join several records into one. `pieces` turns fragments into what the tokeniser gets.
"""

from __future__ import annotations

import gzip
import io
import re
import shutil
import string
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from l2a_jax.config import END_OF_TEXT
from l2a_jax.data.files import PARQUET, TEXT, check_regular, suffix
from l2a_jax.data.recipes import RECIPES, Domain, Hub
from l2a_jax.errors import UserError, needs
from l2a_jax.files import parse_json

LAYOUTS = ("text", "content", "{question}\n{answer}")
"""What the text of a record may be called, in the order tried on the first record, where no field is given."""

PIECE = 1 << 17
"""Characters after which a long document goes to the tokeniser in several pieces."""

HUB_SECONDS = 15
"""Patience for the hub's first answer: `datasets` itself retries for half a minute where there is no network."""

_HEADING = re.compile(r" = (?!= )(.*\S) = \s*")


class Fragment(NamedTuple):
    """Some text of a document. `identity` (with the first fragment) stands for the document in the held-out split."""

    text: str
    starts: bool
    identity: str | None = None


class Piece(NamedTuple):
    """Text to tokenise; `ends` where the document ends with it. A skipped empty document is `Piece("", True)`."""

    text: str
    ends: bool
    identity: str | None = None


class _Counted(io.FileIO):
    """A file that reports the bytes read from it: progress of compressed files without reading them twice."""

    def __init__(self, path: Path, on_read: Callable[[int], None]):
        super().__init__(path)
        self._on_read = on_read

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self._on_read(count or 0)
        return count


@contextmanager
def _opened(path: Path, on_read: Callable[[int], None], after: Callable[[], str] = str) -> Iterator[io.BufferedIOBase]:
    """A file's bytes, decompressed. What can go wrong while they are read becomes a UserError that names the file;
    `after`: how far it was read."""
    check_regular(path)
    try:
        with io.BufferedReader(_Counted(path, on_read), buffer_size=1 << 20) as raw:
            if path.suffix == ".gz":
                with gzip.GzipFile(fileobj=raw) as file:
                    yield file
            else:
                yield raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be decompressed{after()}: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read{after()}: {error.strerror or error}") from error


def read_lines(path: Path, on_read: Callable[[int], None] = lambda n: None) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its ending, bytes decoded as they are).

    Raises UserError where the file cannot be read or decompressed, and on bytes that are not UTF-8.
    """
    offset = number = 0
    with _opened(path, on_read, lambda: f" after line {number}" * (number > 0)) as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                where = offset + error.start
                raise UserError(
                    f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {where} (line {number})"
                    + (" of the uncompressed text" if path.suffix == ".gz" else "")
                    + "; convert the file to UTF-8"
                ) from None
            yield number, line.removeprefix("\ufeff") if number == 1 else line
            offset += len(raw)


def separated(lines: Iterable[str]) -> Iterator[Fragment]:
    """Documents between `<|endoftext|>` marks; without a mark all lines are one document."""
    starts = True
    for line in lines:
        head, *tails = line.split(END_OF_TEXT)
        if head or not tails:
            yield Fragment(head, starts)
            starts = False
        for tail in tails:
            tail = tail.removeprefix("\r").removeprefix("\n")
            starts = True
            if tail:
                yield Fragment(tail, starts)
                starts = False


def articles(lines: Iterable[str]) -> Iterator[Fragment]:
    """WikiText: a document for each top-level heading, ` = Title = ` alone between blank lines.

    The title is the document's identity: the raw and the tokenised WikiText hold the same articles in two spellings,
    and both must fall on the same side of the split.
    """
    before, line, first = "", None, True
    for after in chain(lines, [""]):
        if line is not None:
            heading = _HEADING.fullmatch(line) if not before.strip() and not after.strip() else None
            yield Fragment(line, first or heading is not None, heading[1] if heading else None)
            before, first = line, False
        line = after


def read_records(
    path: Path,
    on_read: Callable[[int], None] = lambda n: None,
    needed: Callable[[Collection[str]], Collection[str]] = lambda names: names,
) -> Iterator[tuple[str, Mapping]]:
    """(place, record) from .jsonl, .jsonl.gz or .parquet; blank lines are skipped.

    `needed`: of a parquet file's columns, those to read; the others may be damaged, or of a kind that is not read.
    Raises UserError, naming the file and the line or row, on whatever does not read.
    """
    if suffix(path) in PARQUET:
        yield from _parquet_rows(path, on_read, needed)
        return
    for number, line in read_lines(path, on_read):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, parse_json(line, place)


def _parquet_rows(path: Path, on_read: Callable[[int], None], needed: Callable[[Collection[str]], Collection[str]]
                  ) -> Iterator[tuple[str, Mapping]]:
    parquet_files = needs("pyarrow.parquet", "data", f"{path}: reading .parquet files")
    with _opened(path, on_read) as file, tempfile.TemporaryFile() as seekable:
        if path.suffix == ".gz":
            shutil.copyfileobj(file, seekable)
            file = seekable
        with _parsing(path, "its index"):
            parquet = parquet_files.ParquetFile(file, page_checksum_verification=True)
            names = parquet.schema_arrow.names
        columns = list(needed(names))
        if not names or len({*columns}) < len(columns):
            twice = next((name for name in columns if columns.count(name) > 1), None)
            raise UserError(f"{path} has no columns" if twice is None else f"{path} has two columns {twice!r}")
        batches, number = parquet.iter_batches(batch_size=256, columns=columns), 0
        while True:
            with _parsing(path, f"the part after row {number}"):
                rows = next(batches, None)
                records = [] if rows is None else rows.to_pylist()
            if rows is None:
                return
            for record in records:
                number += 1
                yield f"{path}, row {number}", record


@contextmanager
def _parsing(path: Path, what: str) -> Iterator[None]:
    """pyarrow raises a dozen types for a damaged page, by where in it the damage is, some of them plain OSErrors."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not read as parquet: {what} is damaged, or of a kind that is not read "
                        f"({type(error).__name__}: {reason})") from error


def hub_records(hub: Hub, instead: str) -> Iterator[tuple[str, Mapping]]:
    """(place, record) of a data set of the Hugging Face hub, streamed in its order, at its present revision.

    Raises UserError where `datasets` is missing, or the hub cannot be reached; `instead` says what else to give.
    """
    datasets = needs("datasets", "data", f"{hub.path}: reading from the Hugging Face hub",
                     f". Or give local files: {instead}")
    import huggingface_hub

    try:
        revision = huggingface_hub.HfApi().dataset_info(hub.path, timeout=HUB_SECONDS).sha
        rows = datasets.load_dataset(hub.path, hub.config, split=hub.split, streaming=True, revision=revision)
        for number, record in enumerate(rows):
            yield f"{hub.path}, row {number}", record
    except Exception as error:  # a network fails in more ways than any list: each HTTP library has its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{hub.path} cannot be read from the Hugging Face hub ({type(error).__name__}: {reason}). "
                        f"Without a network give local files: {instead}") from error


def record_text(
    records: Iterable[tuple[str, Mapping[str, Any]]],
    field: str | None = None,
    join: str | None = None,
    seen: set[str] | None = None,
) -> Iterator[Fragment]:
    """Records, as (place, record), as documents.

    `field` holds the text, or is a template such as `"{question}\\n{answer}"`; None finds it in `LAYOUTS` by the first
    record. Neighbouring records with the same value in the field `join` are one document, a blank line between them;
    records that lack it stand alone. `seen`: values of `join` already met, shared by the files of a domain.

    Raises UserError on a record without the field, on text that is no string, and where the records of a document are
    not neighbours: they could end up on both sides of the held-out split.
    """
    seen = set() if seen is None else seen
    layout = current = None
    for place, record in records:
        if layout is None:
            layout = _layout(field, record)
        if layout is None:
            wanted = "text field " + repr(field) if field else "text field (" + ", ".join(map(repr, LAYOUTS)) + ")"
            raise UserError(f"{place} has no {wanted}; its fields are {', '.join(map(repr, record)) or 'none'}")
        text = _format(layout, place, record)
        source = str(record[join]) if join and record.get(join) is not None else None
        if source is not None and source == current:
            yield Fragment("\n\n", False)
            yield Fragment(text, False)
            continue
        if source is not None:
            if source in seen:
                raise UserError(
                    f"{place}: more of {join} {source!r} after records of another one; parts of a document to join "
                    "must be neighbours: sort the file, or do not join"
                )
            seen.add(source)
        current = source
        yield Fragment(text, True)


def needed_columns(field: str | None, join: str | None) -> Callable[[Collection[str]], Collection[str]]:
    """For `read_records`: the columns that `record_text` will ask for; all of them where it will find none."""

    def needed(names: Collection[str]) -> Collection[str]:
        layout = _layout(field, names)
        return names if layout is None else [name for name in names if name in {join, *(part[1] for part in layout)}]

    return needed


def _layout(field: str | None, names: Collection[str]) -> list[tuple[str, str | None]] | None:
    """The first layout whose fields are all among `names`, as pairs of plain text and the field that follows it."""
    for layout in LAYOUTS if field is None else (field,):
        template = layout if "{" in layout else "{" + layout + "}"
        try:
            parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(template)]
        except ValueError as error:
            raise UserError(f"the text field {template!r} is no template: {error}") from None
        fields = [name for _, name in parts if name is not None]
        if fields and all(name in names for name in fields):
            return parts
    return None


def _format(layout: list[tuple[str, str | None]], place: str, record: Mapping) -> str:
    parts = []
    for literal, name in layout:
        parts.append(literal)
        if name is not None:
            if name not in record:
                raise UserError(f"{place} has no text field {name!r}; its fields are {', '.join(map(repr, record))}")
            value = record[name]
            if not isinstance(value, str | None):
                raise UserError(f"{place}: field {name!r} is {type(value).__name__}; expected text")
            parts.append(value or "")
    text = "".join(parts)
    check_text(text, place)
    return text


def check_text(text: str, place: str) -> None:
    """UserError where a text from JSON has no UTF-8 form, which a tokenizer needs: JSON can spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: the text holds half a surrogate pair at character {error.start}") from None


def fragments(domain: Domain, on_read: Callable[[int], None] = lambda n: None) -> Iterator[Fragment]:
    """All text of a domain, file after file."""
    seen: set[str] = set()
    if domain.hub:
        patterns = ", ".join(d.pattern for d in RECIPES[domain.entry])
        instead = f"--data {domain.entry}=DIR, a folder of .txt, .jsonl or .parquet files named {patterns}"
        records = hub_records(domain.hub, instead)
        if domain.by_heading:  # WikiText's rows are the lines of the file, its blank lines emptied
            yield from articles(fragment.text or " \n" for fragment in record_text(records, domain.text_field))
        else:
            yield from record_text(records, domain.text_field, domain.join, seen)
    for path in domain.files:
        if suffix(path) in TEXT:
            lines = (line for _, line in read_lines(path, on_read))
            yield from articles(lines) if domain.by_heading else separated(lines)
        else:
            records = read_records(path, on_read, needed_columns(domain.text_field, domain.join))
            yield from record_text(records, domain.text_field, domain.join, seen)


def leading(fragments: Iterable[Fragment], characters: int | None) -> Iterator[Fragment]:
    """Whole documents until there are so many characters."""
    total = 0
    for fragment in fragments:
        if characters is not None and fragment.starts and total >= characters:
            return
        total += len(fragment.text)
        yield fragment


def pieces(fragments: Iterable[Fragment], size: int = PIECE) -> Iterator[Piece]:
    """Fragments as pieces of about `size` characters, none across documents.

    A long document is cut only between a line and the next line's first visible character: no token of Qwen2.5
    reaches over that place, so the ids are those of the whole text.
    """
    held: list[str] = []
    length, started, identity = 0, False, None

    def take(ends: bool) -> Iterator[Piece]:
        nonlocal held, length, started
        text, held, length = "".join(held), [], 0
        if started or text.strip():
            yield Piece(text, ends, identity)
            started = not ends
        elif ends:
            yield Piece("", True)

    for fragment in fragments:
        if fragment.starts:
            if held or started:
                yield from take(ends=True)
            identity = fragment.identity
        # By line ends alone: `splitlines` knows a dozen more.
        lines = re.findall(r"[^\n]*\n|[^\n]+", fragment.text) if len(fragment.text) > size else [fragment.text]
        for line in lines:
            if length >= size and held[-1].endswith("\n") and line and not line[0].isspace():
                yield from take(ends=False)
            if line or fragment.starts:
                held.append(line)
                length += len(line)
    if held or started:
        yield from take(ends=True)
