"""The GGUF container: metadata, and tensors dequantised in blocks of rows.

Layout (little-endian): magic, version, counts, key/value fields, tensor table, then the data, aligned. The header is
parsed here rather than by `gguf.GGUFReader`, which makes several Python objects for every string of a tokenizer and
maps the whole file; the block formats themselves are `gguf`'s. Rows are read with plain reads, so that a file as big as
the model does not count towards peak memory.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from jaxtyping import Float32

from l2a_jax.errors import UserError, shown
from l2a_jax.files import reading

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


class Entry(NamedTuple):
    """A stored tensor: shape with the slowest dimension first, block format, and its first byte in the file."""

    shape: tuple[int, ...]
    format: gguf.GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.format]
        return self.shape[-1] // block * size

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


class GGUFFile:
    """An opened GGUF file: `fields` (metadata), `shapes`, and `rows`. Raises UserError if damaged."""

    kind = "gguf"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.where = str(path)
        try:
            # An empty file cannot be mapped, and says so with a ValueError.
            with (reading(path), self.path.open("rb") as file,
                  mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data):
                self.fields, self.entries = _parse(data)
        except UserError:
            raise
        except (ValueError, struct.error, OverflowError, MemoryError) as error:
            raise UserError(f"{path} is not a readable GGUF file (truncated or corrupt?): {error}") from error
        self._check_extent()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def rows(self, name: str, start: int, stop: int) -> Float32[np.ndarray, "rows ..."]:
        """Rows [start, stop) of a tensor as float32, with its own trailing dimensions."""
        entry = self.entries[name]
        # A vector is one row of the block format, so it is read whole and cut afterwards.
        vector = len(entry.shape) == 1
        first, last = (0, 1) if vector else (start, stop)
        per_row = entry.row_bytes * math.prod(entry.shape[1:-1])
        with self.path.open("rb") as file:
            file.seek(entry.offset + first * per_row)
            raw = np.frombuffer(file.read((last - first) * per_row), np.uint8)
        if raw.size != (last - first) * per_row:
            raise UserError(f"{self.path} ends inside tensor {name}: truncated")
        # Corrupt scales overflow while being multiplied; the caller looks for what is not finite.
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(raw.reshape(-1, entry.row_bytes), entry.format)
        return values.reshape(-1)[start:stop] if vector else values.reshape(last - first, *entry.shape[1:])

    def _check_extent(self) -> None:
        size = self.path.stat().st_size
        for name, entry in self.entries.items():
            block = gguf.GGML_QUANT_SIZES[entry.format][0]
            if entry.shape[-1] % block:
                raise UserError(f"{self.path}: {name} has rows of {entry.shape[-1]} values, which {entry.format.name} "
                                f"stores in blocks of {block}: corrupt")
            if entry.offset + entry.nbytes > size:
                raise UserError(f"{self.path} is truncated: {name} ends at byte {entry.offset + entry.nbytes}, the "
                                f"file at byte {size}")
            try:
                gguf.quants.dequantize(np.zeros((1, entry.row_bytes), np.uint8), entry.format)
            except NotImplementedError:
                raise UserError(f"{self.path}: {name} is stored as {entry.format.name}, which gguf cannot dequantise"
                                ) from None


class _Cursor:
    """Reads forward through the header; running off its end is an error, not an empty value."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def unpack(self, format: str) -> tuple:
        values = struct.unpack_from("<" + format, self.data, self.at)
        self.at += struct.calcsize("<" + format)
        return values

    def string(self) -> str:
        (length,) = self.unpack("Q")
        end = self.at + length
        if end > len(self.data):
            raise ValueError(f"a string of {length} bytes runs past the end")
        text = self.data[self.at : end].decode("utf-8")
        self.at = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.unpack("IQ")
            if count > len(self.data):
                raise ValueError(f"an array of {count} values runs past the end")
            if inner == _ARRAY:
                raise ValueError("an array of arrays")
            if inner in _SCALARS:
                return list(self.unpack(f"{count}{_SCALARS[inner]}"))
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"unknown field type {kind}")
        return self.unpack(_SCALARS[kind])[0]


def _parse(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, Entry]]:
    cursor = _Cursor(data)
    magic, version = cursor.unpack("4sI")
    if magic != b"GGUF":
        raise ValueError(f"it starts with {magic!r}, not with b'GGUF'")
    if version not in (2, 3):
        raise ValueError(f"version {version}; expected 2 or 3, little-endian")
    tensor_count, field_count = cursor.unpack("QQ")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.string()
        if key in fields:
            raise ValueError(f"field {key} stands twice")
        fields[key] = cursor.value(cursor.unpack("I")[0])

    table: dict[str, Entry] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        (rank,) = cursor.unpack("I")
        if name in table or not 1 <= rank <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} stands twice" if name in table else f"{name} has {rank} dimensions")
        dimensions = cursor.unpack(f"{rank}Q")
        format, offset = cursor.unpack("IQ")
        if not all(dimensions):
            raise ValueError(f"{shown(name)} has dimensions {dimensions}")
        table[name] = Entry(dimensions[::-1], gguf.GGMLQuantizationType(format), offset)

    alignment = fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment is {shown(alignment)}; expected a power of two")
    end = 0
    for name, entry in table.items():
        # As in llama.cpp: each tensor begins where the one before it ends, so damaged shapes and offsets are noticed.
        if entry.offset != end:
            raise ValueError(f"{name} begins at byte {entry.offset} of the data; expected {end}")
        end += -(-entry.nbytes // alignment) * alignment
    start = -(-cursor.at // alignment) * alignment
    return fields, {name: entry._replace(offset=start + entry.offset) for name, entry in table.items()}
