"""A Hugging Face folder: its tensors (one safetensors file, or many with an index), and what it says beyond these."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (lets numpy name bfloat16, which safetensors asks for)
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from l2a_jax.config import ModelConfig
from l2a_jax.errors import UserError, few
from l2a_jax.files import read_json, reading
from l2a_jax.weights.assemble import blocks

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
PREFIX = "model."
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
log = logging.getLogger("l2a_jax")
_FLOATING = ("BF16", "F16", "F32")


class _Entry(NamedTuple):
    """A stored tensor: its file, its name there, and its shape."""

    shard: Path
    name: str
    shape: tuple[int, ...]


class HFFolder:
    """The stored tensors of a folder by Hugging Face name. Raises UserError if a shard is missing or damaged."""

    kind = "hf"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.where = str(path)
        self.entries: dict[str, _Entry] = {}
        for shard in shard_files(self.path):
            self._read_header(shard)
        if (self.path / SINGLE).exists():
            if (self.path / INDEX).exists():
                log.warning("%s: %s is read, as in transformers; %s and its shards beside it are not", self.path,
                            SINGLE, INDEX)
        else:
            held = {(name, entry.shard) for name, entry in self.entries.items()}
            absent = [name for name, shard in _weight_map(self.path).items() if (name, self.path / shard) not in held]
            if absent:
                raise UserError(f"{self.path}: the index promises tensors that its shards do not hold: {few(absent)}")
        if not any(name.startswith(PREFIX) for name in self.entries):
            # Saved without its output matrix (transformers' Qwen2Model), a model has no prefix.
            for name in [name for name in self.entries if name.startswith(("embed_tokens.", "layers.", "norm."))]:
                self.rename(name, PREFIX + name)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def rows(self, name: str, start: int, stop: int) -> Float[np.ndarray, "rows ..."]:
        """Rows [start, stop) of a tensor in its stored dtype."""
        # Opened for each block: the map of a file that stays open would keep all that was read of it in memory.
        shard, stored, _ = self.entries[name]
        try:
            with safe_open(shard, framework="numpy") as file:
                return file.get_slice(stored)[start:stop]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{shard}: cannot read {stored}: {error}") from error

    def drop(self, name: str) -> None:
        """Leave a tensor out, because another says the same."""
        del self.entries[name]

    def rename(self, name: str, new: str) -> None:
        """Let a tensor be known by the name that it has in the table."""
        self.entries[new] = self.entries.pop(name)

    def _read_header(self, shard: Path) -> None:
        with reading(shard), shard.open("rb") as file:
            file.read(8)
        try:
            with safe_open(shard, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118  (no dict: it cannot be iterated)
                    tensor = file.get_slice(name)
                    if name in self.entries:
                        raise UserError(f"{self.path}: {name} is stored in {self.entries[name].shard.name} and in "
                                        f"{shard.name}")
                    self.entries[name] = _Entry(shard, name, tuple(tensor.get_shape()))
                    if tensor.get_dtype() not in _FLOATING:
                        raise UserError(f"{shard}: {name} is stored as {tensor.get_dtype()}; expected one of "
                                        f"{', '.join(_FLOATING)}")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{shard} is not a readable safetensors file (truncated or corrupt?): {error}") from error


class Carried(NamedTuple):
    """What a folder says beyond the model, for an export to write again: the fields of its `config.json`, and whole
    files by their path in it. What they mean is another reader's business."""

    config: dict[str, Any]
    files: dict[str, bytes]


def folder_carried(folder: Path) -> Carried:
    """What to carry over from a folder. Raises UserError or OSError where a file cannot be read."""
    files = [folder / GENERATION, *sorted(folder.glob("additional_chat_templates/*.jinja"))]
    return Carried(read_json(folder / "config.json"),
                   {str(file.relative_to(folder)): file.read_bytes() for file in files if file.exists()})


def shard_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, in name order: as in transformers the single file, else those of the index.

    Raises UserError if there are none, or not those indexed, or an adapter whose model is another.
    """
    refuse_adapter(path)
    names = [SINGLE] if (path / SINGLE).exists() else sorted(set(_weight_map(path).values()))
    if not names:
        names = sorted(file.name for file in path.glob("*.safetensors"))
        if len(names) != 1:
            others = [*path.glob("*.bin"), *path.glob("*.pth"), *path.glob("*.gguf")]
            told = f"; {few(sorted(file.name for file in others), 3)} cannot stand for them" if others else ""
            raise UserError(f"{path} has no weights: expected {SINGLE}, or {INDEX} with its shards"
                            + (" (PyTorch .bin files are not read)" if list(path.glob("*.bin")) else told))
    absent = [name for name in names if not (path / name).exists()]
    if absent:
        raise UserError(f"{path}: missing {'shard' if len(absent) == 1 else 'shards'} {few(absent)}")
    return [path / name for name in names]


def refuse_adapter(path: Path) -> None:
    """Raise UserError if a folder holds an adapter (LoRA), alone or beside a model: transformers would add it."""
    adapter = [name for name in ADAPTER if (path / name).exists()]
    model = [name for name in (SINGLE, INDEX) if (path / name).exists()]
    if adapter and model:
        raise UserError(f"{path} holds a model ({model[0]}) and an adapter for one ({few(adapter)}); merge the adapter "
                        "into its model, or remove it")
    if adapter:
        raise UserError(f"{path} holds an adapter ({few(adapter)}), not a model; merge it into its model first")


def _weight_map(path: Path) -> dict[str, str]:
    if not (path / INDEX).exists():
        return {}
    weights = read_json(path / INDEX).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(_inside(name) for name in weights.values()):
        raise UserError(f"{path / INDEX} has no weight_map from tensors to files")
    return weights


def _inside(name: object) -> bool:
    """Whether a name is that of a file in the folder, and not of one elsewhere."""
    return isinstance(name, str) and name != "" and not Path(name).is_absolute() and ".." not in Path(name).parts


def tie(config: ModelConfig, folder: HFFolder) -> ModelConfig:
    """Tied or not, as transformers 5 decides: a stored output matrix that differs from the embedding unties a model
    whose configuration ties it; one that is the same is dropped; one that stands alone is both."""
    embedding, output = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_embeddings and output in folder.shapes and embedding not in folder.shapes:
        folder.rename(output, embedding)
    if not config.tie_embeddings or output not in folder.shapes:
        return config
    shape = folder.shapes[output]
    if folder.shapes.get(embedding) == shape and all(
            np.array_equal(folder.rows(embedding, *block), folder.rows(output, *block)) for block in blocks(shape)):
        folder.drop(output)
        return config
    return dataclasses.replace(config, tie_embeddings=False)
