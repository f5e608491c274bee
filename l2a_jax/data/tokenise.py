"""Text to token store, once: the store's name is a hash of the text, the tokenizer and how the text is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np

from l2a_jax.data.counts import format_count
from l2a_jax.data.encoder import Encoder
from l2a_jax.data.files import check_regular
from l2a_jax.data.recipes import Domain
from l2a_jax.data.store import FORMAT, TokenStore, open_store, writing
from l2a_jax.data.text import PIECE, Piece, fragments, leading, pieces
from l2a_jax.errors import UserError
from l2a_jax.files import sha256, write_text
from l2a_jax.progress import progress

BATCH = 1 << 21
"""Characters handed to the tokenizer at once: enough pieces for all cores, some tens of megabytes of tokens."""

_ABOUT = {"key": {"source": list, "tokenizer": str}, "files": [str], "text_bytes": int, "empty_documents": int}


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """Where stores live: `cache_dir`, else `$L2A_CACHE`, else `l2a_jax/tokens` in the user's cache folder.

    Raises UserError where that is in the home folder of a user who has none.
    """
    base = "~/Library/Caches" if sys.platform == "darwin" else os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    own = os.environ.get("L2A_CACHE") or Path(base) / "l2a_jax" / "tokens"
    place = Path(own if cache_dir is None else cache_dir)
    try:
        return place.expanduser()
    except RuntimeError:  # a container's user without an entry and without HOME
        raise UserError(f"there is no home folder for the token cache {place}; set L2A_CACHE") from None


def tokenised(domain: Domain, encoder: Encoder, cache_dir: str | os.PathLike | None = None) -> TokenStore:
    """The domain's store: opened if it is there, built if not. It needs a network only when built from the hub, and
    stays as it was built: the hub's name, not its present text, is what such a store is known by.

    Raises UserError on unreadable text (see `l2a_jax.data.text`), a domain without any text, or a damaged store.
    """
    cache = cache_folder(cache_dir)
    source = (
        [[domain.hub.path, domain.hub.config, domain.hub.split, domain.hub.characters]]
        if domain.hub
        else [_file_hash(path, cache) for path in domain.files]
    )
    reading = {"text_field": domain.text_field, "join": domain.join, "by_heading": domain.by_heading, "piece": PIECE}
    key = {"format": FORMAT, "source": source, "reading": reading, "tokenizer": encoder.fingerprint}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache / f"{domain.name}-{name}"
    if not folder.exists():
        _build(domain, encoder, folder, {"key": key})
    return open_store(folder, _ABOUT)


def _file_hash(path: Path, cache: Path) -> str:
    """Hash of a file's bytes, remembered so that a terabyte is not read at every start.

    Size and modification time say nothing sure: `cp -p`, `rsync -t` and `tar` set the time. What no program sets is the
    time of the last change of the file's inode, and another file in its place is another inode: with these a file of
    the same state holds the same bytes. Moving or touching a file costs one more reading.
    """
    check_regular(path)
    before = _state(path)
    known = cache / "hashes" / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    with contextlib.suppress(OSError, ValueError):
        remembered, state = known.read_text().split("\n")
        if state == before:
            return remembered
    found, after = sha256(path), path.stat()
    # A file written within the clock's grain, or while it was read, could change once more under the same times.
    if _state(path) == before and time.time() - max(after.st_mtime, after.st_ctime) > 2:
        with contextlib.suppress(OSError, UserError):  # only a memory; an unwritable cache is told where it matters
            known.parent.mkdir(parents=True, exist_ok=True)
            write_text(known, f"{found}\n{before}")
    return found


def _state(path: Path) -> str:
    found = path.stat()
    return f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _batches(stream: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in stream:
        batch.append(piece)
        size += len(piece.text) + 64  # many tiny documents are a batch too
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(batches: Iterable[list[Piece]], encoder: Encoder) -> Iterator[tuple[list[Piece], list[np.ndarray]]]:
    """Batches with their ids, in order; two are always under way, so that no core waits for reading or writing."""
    under_way: deque[tuple[list[Piece], Future]] = deque()
    with ThreadPoolExecutor(2) as pool:
        for batch in batches:
            under_way.append((batch, pool.submit(encoder.encode, [piece.text for piece in batch])))
            if len(under_way) > 2:
                batch, ids = under_way.popleft()
                yield batch, ids.result()
        for batch, ids in under_way:
            yield batch, ids.result()


def _build(domain: Domain, encoder: Encoder, folder: Path, meta: dict) -> None:
    done = characters = skipped = 0
    total = domain.hub.characters if domain.hub else sum(path.stat().st_size for path in domain.files)

    def on_read(count: int) -> None:
        nonlocal done
        done += count

    stream = pieces(leading(fragments(domain, on_read), domain.hub.characters if domain.hub else None))
    first = next(stream, None)  # an error in the first file or on the way to the hub comes before any folder
    stream = chain([] if first is None else [first], stream)
    started = time.monotonic()
    end = np.array([encoder.end_id])
    with (
        writing(folder, "uint16" if encoder.vocabulary <= 1 << 16 else "uint32") as writer,
        progress(f"tokenising {domain.name}", total) as report,
    ):
        documents, text_bytes, hasher, identity = 0, 0, hashlib.blake2b(digest_size=8), None
        for batch, encoded in _encoded(_batches(stream), encoder):
            for piece, ids in zip(batch, encoded, strict=True):
                characters += len(piece.text)
                if not piece.text:
                    skipped += 1
                    continue
                data = piece.text.encode()
                text_bytes += len(data)
                hasher.update(data)
                identity = piece.identity if piece.identity is not None else identity
                writer.append(ids)
                if piece.ends:
                    writer.append(end)
                    chosen = hashlib.blake2b(identity.encode(), digest_size=8) if identity is not None else hasher
                    writer.end(int.from_bytes(chosen.digest(), "little"))
                    documents, hasher, identity = documents + 1, hashlib.blake2b(digest_size=8), None
            speed = text_bytes / 1e6 / max(time.monotonic() - started, 1e-9)
            report(characters if domain.hub else done,
                   f"{documents} documents, {format_count(writer.tokens)} tokens, {speed:.1f} MB/s")
        if not documents:
            places = ", ".join(map(str, domain.files)) or domain.hub.path
            raise UserError(f"no text for the domain {domain.name!r}: {places} holds no document that is not empty")
        writer.finish(meta | {
            "domain": domain.name, "text_bytes": text_bytes, "empty_documents": skipped, "end_id": encoder.end_id,
            "files": [path.name for path in domain.files] or [domain.hub.path],
            "seconds": round(time.monotonic() - started, 2),
        })
