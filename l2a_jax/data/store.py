"""The token store: documents as ids in one memory-mapped file, written once, checked whenever it is opened.

A folder with `tokens.bin` (uint16 or uint32, documents one after the other, each closed by its end token),
`offsets.npy` (int64 [N+1], where documents start), `identities.npy` (uint64 [N], hash of each document's text) and
`meta.json` (how it was made, sizes, checksums). It is written under another name and renamed when whole, so a folder
with the right name is a finished store or a damaged one, never an unfinished one.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from l2a_jax import files, shapes
from l2a_jax.errors import UserError

FORMAT = 1
FILES = ("tokens.bin", "offsets.npy", "identities.npy")
_META = {"sizes": dict.fromkeys(FILES, shapes.at_least(0)), "checksums": {name: [int] for name in FILES},
         "dtype": shapes.one_of("uint16", "uint32"), "documents": shapes.at_least(0), "tokens": shapes.at_least(0),
         "largest_id?": shapes.at_least(0)}
CHUNK = 1 << 24
"""Bytes of tokens.bin under one checksum."""
CHECKED = 256
"""Chunks verified on opening: every one up to 4 GiB, this many spread over a longer file."""


@dataclass(frozen=True)
class TokenStore:
    """N documents. Document i is `tokens[offsets[i]:offsets[i + 1]]`, its end token last."""

    tokens: np.ndarray
    """uint16 or uint32, memory-mapped."""
    offsets: Int64[np.ndarray, " N_plus_1"]
    identities: UInt64[np.ndarray, " N"]
    meta: dict[str, Any]
    folder: Path


def largest_id(store: TokenStore) -> int:
    """The largest token id of a store: what an embedding must have a row for. A store of before this was written down
    is read through once and told it."""
    if "largest_id" not in store.meta:
        at = range(0, store.tokens.size, CHUNK)
        store.meta["largest_id"] = max((int(store.tokens[i : i + CHUNK].max()) for i in at), default=0)
        with contextlib.suppress(UserError):  # a cache that is only read is no mistake
            files.write_json(store.folder / "meta.json", store.meta)
    return store.meta["largest_id"]


def _checksums(path: Path, chunks: np.ndarray | None = None) -> list[int]:
    """CRC-32 of the chunks of a file, all of them or those named. Read, not mapped: a chunk at a time in memory."""
    found = []
    with open(path, "rb") as file:
        for chunk in range(-(-path.stat().st_size // CHUNK)) if chunks is None else chunks.tolist():
            file.seek(chunk * CHUNK)
            found.append(zlib.crc32(file.read(CHUNK)))
    return found


class StoreWriter:
    """Appends documents piece by piece: tokens go to disk, 16 bytes a document stay in memory until the end."""

    def __init__(self, folder: Path, dtype: str):
        self._folder, self.dtype = folder, np.dtype(dtype)
        self._file = open(folder / "tokens.bin", "wb")  # noqa: SIM115 (closed by `finish` or `close`)
        self._offsets, self._identities = array("q", [0]), array("Q")
        self.tokens = self.largest_id = 0

    def append(self, ids: np.ndarray) -> None:
        """More tokens of the current document. UserError on ids that the store's type does not hold."""
        if ids.size:
            least, most = int(ids.min()), int(ids.max())
            if least < 0 or most > np.iinfo(self.dtype).max:
                raise UserError(f"the tokenizer gives id {least if least < 0 else most}; expected 0 to the largest of "
                                "its vocabulary")
            self.largest_id = max(self.largest_id, most)
        self._file.write(ids.astype(self.dtype).tobytes())
        self.tokens += ids.size

    def end(self, identity: int) -> None:
        """The current document is whole."""
        self._offsets.append(self.tokens)
        self._identities.append(identity)

    def finish(self, meta: dict[str, Any]) -> None:
        """Writes the index and meta.json, which vouches for the other files; then everything is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        np.save(self._folder / "offsets.npy", np.asarray(self._offsets, np.int64))
        np.save(self._folder / "identities.npy", np.asarray(self._identities, np.uint64))
        meta |= {
            "format": FORMAT,
            "dtype": self.dtype.name,
            "documents": len(self._identities),
            "tokens": self.tokens,
            "largest_id": self.largest_id,
            "sizes": {name: (self._folder / name).stat().st_size for name in FILES},
            "checksums": {name: _checksums(self._folder / name) for name in FILES},
        }
        with open(self._folder / "meta.json", "w") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Of no effect after `finish`; before it, what could not be written any more is of no use either."""
        with contextlib.suppress(OSError):
            self._file.close()


@contextmanager
def writing(folder: Path, dtype: str) -> Iterator[StoreWriter]:
    """A writer of the store `folder`, which is there once the block has ended well, and nothing of it otherwise.

    If another process has finished the same store meanwhile, that one stays. UserError where the cache cannot be
    written; what reads the text inside the block tells of its own files (see `data.text`).
    """
    begun = False
    try:
        with files.partial_folder(folder) as partial, contextlib.closing(StoreWriter(partial, dtype)) as writer:
            begun = True
            yield writer
    except BrokenPipeError:  # whoever was told of the progress, not the cache
        raise
    except OSError as error:
        if not begun or not (folder / "meta.json").exists():
            raise UserError(f"the token cache {folder.parent} cannot be written ({error.strerror or error}); "
                            "expected a folder to write to, with room: set L2A_CACHE") from error


def open_store(folder: Path, about: dict[str, Any] | None = None) -> TokenStore:
    """Maps a store after checking sizes and checksums. `about`: the shape of what its maker wrote into meta.json.

    Raises UserError that names the damaged file, and what to do.
    """

    def check(good: bool, name: str, what: str) -> None:
        if not good:
            raise UserError(f"{folder / name} is damaged: {what}; delete the folder {folder} and it is built again")

    check((folder / "meta.json").exists(), "meta.json", "it is missing")
    try:
        meta = files.read_json(folder / "meta.json", None)
    except UserError as error:
        check(False, "meta.json", f"it does not read ({error})")
    misfit = shapes.misfit(meta, _META | (about or {}))
    check(misfit is None, "meta.json", f"it does not read ({misfit})")
    for name in FILES:
        path, size, checksums = folder / name, meta["sizes"][name], meta["checksums"][name]
        check(path.exists(), name, "it is missing")
        found = path.stat().st_size
        check(found == size, name, f"it has {found} bytes instead of {size}")
        check(len(checksums) == -(-size // CHUNK), "meta.json", f"it has {len(checksums)} checksums of {name}")
        chunks = np.unique(np.linspace(0, max(len(checksums) - 1, 0), CHECKED).astype(int))[: len(checksums)]
        wrong = [c for c, crc in zip(chunks, _checksums(path, chunks), strict=True) if crc != checksums[c]]
        check(not wrong, name, f"its checksum differs in the {CHUNK >> 20} MiB from byte {wrong and wrong[0] * CHUNK}")
    ids = np.memmap(folder / "tokens.bin", meta["dtype"], "r") if meta["tokens"] else np.zeros(0, meta["dtype"])
    offsets = np.load(folder / "offsets.npy", mmap_mode="r")
    identities = np.load(folder / "identities.npy", mmap_mode="r")
    sizes = (ids.size, offsets.size - 1, identities.size)
    check(sizes == (meta["tokens"], meta["documents"], meta["documents"]), "meta.json",
          "its counts do not match the files")
    # A plain view: slicing np.memmap costs several times the copy of a short document.
    return TokenStore(np.asarray(ids), np.asarray(offsets), np.asarray(identities), meta, folder)
