"""The tensors of a Hugging Face folder: one safetensors file, or many with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (lets numpy name bfloat16, which safetensors asks for)
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from l2a_jax.errors import UserError
from l2a_jax.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATING = ("BF16", "F16", "F32")


class HFFolder:
    """The stored tensors of a folder by Hugging Face name. Raises UserError if a shard is missing or damaged."""

    kind = "hf"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.where = str(path)
        self._shard_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for shard in shard_files(self.path):
            self._read_header(shard)
        indexed = _weight_map(self.path)
        absent = [name for name, shard in indexed.items() if self._shard_of.get(name) != self.path / shard]
        if absent:
            raise UserError(f"{self.path}: the index promises tensors that its shards do not hold: {', '.join(absent)}")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def rows(self, name: str, start: int, stop: int) -> Float[np.ndarray, "rows ..."]:
        """Rows [start, stop) of a tensor in its stored dtype."""
        # Opened for each block: the map of a file that stays open would keep all that was read of it in memory.
        try:
            with safe_open(self._shard_of[name], framework="numpy") as file:
                return file.get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._shard_of[name]}: cannot read {name}: {error}") from error

    def drop(self, name: str) -> None:
        """Leave a tensor out, because another says the same."""
        del self._shapes[name]

    def _read_header(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118  (no dict: it cannot be iterated)
                    tensor = file.get_slice(name)
                    if name in self._shapes:
                        raise UserError(f"{self.path}: {name} is stored in {self._shard_of[name].name} and in "
                                        f"{shard.name}")
                    self._shard_of[name] = shard
                    self._shapes[name] = tuple(tensor.get_shape())
                    if tensor.get_dtype() not in _FLOATING:
                        raise UserError(f"{shard}: {name} is stored as {tensor.get_dtype()}; expected one of "
                                        f"{', '.join(_FLOATING)}")
        except FileNotFoundError:
            raise UserError(f"{self.path}: shard {shard.name} is missing") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{shard} is not a readable safetensors file (truncated or corrupt?): {error}") from error


def shard_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, in name order. Raises UserError if there are none, or not those indexed."""
    names = sorted(set(_weight_map(path).values())) or ([SINGLE] if (path / SINGLE).exists() else [])
    if not names:
        names = sorted(file.name for file in path.glob("*.safetensors"))
        if len(names) != 1:
            raise UserError(f"{path} has no weights: expected {SINGLE}, or {INDEX} with its shards"
                            + (" (PyTorch .bin files are not read)" if list(path.glob("*.bin")) else ""))
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise UserError(f"{path}: missing {'shard' if len(absent) == 1 else 'shards'} {', '.join(absent)}")
    return [path / name for name in names]


def _weight_map(path: Path) -> dict[str, str]:
    if not (path / INDEX).exists():
        return {}
    weights = read_json(path / INDEX).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
        raise UserError(f"{path / INDEX} has no weight_map from tensors to files")
    return weights
