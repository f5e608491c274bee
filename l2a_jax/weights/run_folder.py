"""A run folder as a source of a model: what training wrote, put back together.

The layout of `checkpoints/` belongs to training, which fills in `load_run` and `hash_run`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2a_jax.config import L2AConfig, ModelConfig, l2a_config_from_dict, model_config_from_dict
from l2a_jax.errors import UserError
from l2a_jax.weights.hf_config import read_json

if TYPE_CHECKING:
    from l2a_jax.weights.pretrained import Pretrained


def is_run_folder(path: Path) -> bool:
    """Whether `path` is a folder that a training run wrote: its `config.json` names a `model_source`."""
    return path.is_dir() and (path / "config.json").is_file() and "model_source" in read_json(path / "config.json")


def read_run_config(path: Path) -> tuple[ModelConfig, L2AConfig | None]:
    """The configurations that a run trained with. Raises UserError if `config.json` does not hold them."""
    fields = read_json(path / "config.json")
    try:
        return model_config_from_dict(fields["model_config"]), l2a_config_from_dict(fields.get("l2a_config"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / 'config.json'} does not describe a model: {error}") from error


def load_run(path: Path, dtype: Any) -> Pretrained:
    """The model of a run: its source's frozen parameters with the trained ones of its checkpoint."""
    raise UserError(f"{path} is a run folder, which cannot be read as a model yet")


def hash_run(path: Path) -> str:
    """Content hash of a run's model."""
    raise UserError(f"{path} is a run folder, which cannot be read as a model yet")
