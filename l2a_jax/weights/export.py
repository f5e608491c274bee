"""Write a model as a Hugging Face folder: whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.errors import UserError
from l2a_jax.files import partial_folder, write_json
from l2a_jax.models.params import Tree, by_path, param_shapes
from l2a_jax.progress import gigabytes
from l2a_jax.weights.assemble import floating
from l2a_jax.weights.hf_config import beyond_the_model, config_fields
from l2a_jax.weights.hf_folder import INDEX, SINGLE, Carried
from l2a_jax.weights.names import Place, take, tensor_map
from l2a_jax.weights.tokenizer import Tokenizer

SHARD_BYTES = 5_000_000_000
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class Stored(NamedTuple):
    """A tensor to be written: what is known of it beforehand, and how to get it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save_pretrained(
    out: str | Path,
    params: Tree,
    config: ModelConfig,
    l2a_config: L2AConfig | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    carried: Carried | None = None,
) -> Path:
    """Write a Hugging Face folder that `load_pretrained` reads back bit for bit; a plain model loads in transformers.

    Every leaf keeps its dtype. A model with the L2A layer has its local set under the plain names, the second set under
    `*_global`, and its L2AConfig in `config.json`. `carried` is what the source said beyond the model, and is written
    again; without it the tokenizer says which tokens open, end and fill a text. Files hold at most `shard_bytes` each;
    a larger tensor stands alone. Nothing is left behind on failure.
    Raises UserError if `out` exists and is not empty, or cannot be written.
    """
    tensors = _stored(params, config, l2a_config)
    fields = config_fields(config, l2a_config, dtype=params["embed"]["embedding"].dtype.name)
    if carried is not None:
        fields |= beyond_the_model(carried.config)
    elif tokenizer is not None:
        ends = tokenizer.end_ids
        roles = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
                 "pad_token_id": tokenizer.pad_token_id}
        fields |= {role: value for role, value in roles.items() if value not in (None, [])}
    check_free(out)
    try:
        with partial_folder(Path(out)) as folder:
            write_json(folder / "config.json", fields)
            if carried is not None:
                for name, content in carried.files.items():
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_bytes(content)
            if tokenizer is not None:
                tokenizer.save(folder)
            with gigabytes(f"writing {out}", sum(tensor.nbytes for tensor in tensors.values())) as written:
                _write_shards(folder, {name: _told(tensor, written) for name, tensor in tensors.items()}, shard_bytes)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    return Path(out)


def check_free(out: str | Path) -> None:
    """Raise UserError unless `out` does not exist or is an empty folder, in a place that can be written."""
    out = Path(out)
    try:
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} is not empty; choose a new folder")
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} exists and is not a folder")
        parent = next(folder for folder in out.absolute().parents if folder.exists())
        if any(len(os.fsencode(part)) > os.pathconf(parent, "PC_NAME_MAX") for part in out.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {out}: {parent} is {'read-only' if parent.is_dir() else 'not a folder'}")


def _stored(params: Tree, config: ModelConfig, l2a_config: L2AConfig | None) -> dict[str, Stored]:
    leaves, expected = by_path(params), by_path(param_shapes(config, l2a_config))
    places = tensor_map(config, l2a_config)
    unknown = expected.keys() ^ leaves.keys()
    if unknown:
        raise ValueError(f"the parameters do not fit the configuration: {', '.join(sorted(unknown))}")
    for path, shape in expected.items():
        if leaves[path].shape != shape:
            raise ValueError(f"{path} is {leaves[path].shape}; expected {shape}")

    def stored(place: Place) -> Stored:
        leaf = leaves[place.path]
        return Stored(place.shape, floating(leaf.dtype),
                      lambda: take(leaf if place.layer is None else leaf[place.layer], place.transform))

    return {name: stored(place) for name, place in places.items()}


def _told(tensor: Stored, written: Callable[[int], None]) -> Stored:
    def read():
        written(tensor.nbytes)
        return tensor.read()

    return tensor._replace(read=read)


def _write_shards(folder: Path, tensors: dict[str, Stored], shard_bytes: int) -> None:
    shards: list[dict[str, Stored]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, tensors)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write `tensors` in their order, each read when its turn comes: the library's own writer wants them all at once,
    a second model in memory. Raises OSError if the disk refuses.

    The format: the header's length (8 bytes), a JSON header padded with spaces to 8 bytes, the raw bytes.
    """
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
