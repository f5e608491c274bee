"""Write a safetensors file one tensor at a time.

The `safetensors` writer wants every tensor of a file in memory at once; this one needs one, so that exporting costs no
second model. The format: the header's length (8 bytes), a JSON header padded with spaces to 8 bytes, the raw bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class Stored(NamedTuple):
    """A tensor to be written: what is known of it beforehand, and how to get it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write `tensors` in their order; each is read when its turn comes. Raises OSError if the disk refuses."""
    # transformers refuses a file that does not say which framework wrote it; "pt" is how every Hugging Face model says.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            array = np.ascontiguousarray(tensor.read(), tensor.dtype)
            file.write(array.view(np.uint8).reshape(-1).data)
