"""A run folder as a source of a model: what training wrote, put back together.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from l2a_jax.config import L2AConfig, ModelConfig, l2a_config_from_dict, model_config_from_dict
from l2a_jax.errors import UserError
from l2a_jax.files import read_json
from l2a_jax.models.params import abstract_params, add_routing, map_with_path, param_dtype
from l2a_jax.weights.tokenizer import Tokenizer

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


def run_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of the source that a run began from; fresh parameters read the recall corpus."""
    from l2a_jax.data.recall import make_tokenizer
    from l2a_jax.weights.pretrained import source_tokenizer

    source = read_json(path / "config.json")["model_source"]
    return make_tokenizer() if source is None else source_tokenizer(source)


def load_run(path: Path, dtype: Any) -> Pretrained:
    """The model of a run: its source's frozen parameters with the trained ones of its newest checkpoint.

    Raises UserError if the run has no whole checkpoint, or if its source is gone or no longer the same.
    """
    # Training stands above weights in the house; only this function, which reads what training wrote, looks up.
    from l2a_jax.training.checkpoint import LATEST, Checkpoints
    from l2a_jax.training.optimizer import master_dtype_of
    from l2a_jax.training.regimes import combine, partition, regime_mask
    from l2a_jax.weights.pretrained import Pretrained, load_pretrained

    fields = read_json(path / "config.json")
    config, l2a_config = read_run_config(path)
    abstract = abstract_params(config, l2a_config, dtype)
    mask = regime_mask(abstract, fields["settings"]["regime"])
    trained, frozen = partition(abstract, mask)
    if fields["model_source"] is not None:
        source = load_pretrained(fields["model_source"], dtype)
        if source.source_hash != fields["source_hash"]:
            raise UserError(f"{fields['model_source']} is no longer the model that the run {path} began from")
        params = source.params
        if l2a_config is not None and source.l2a_config is None:
            params = add_routing(params, config, l2a_config)
        frozen = partition(params, mask)[1]
    if trained:
        masters = jnp.dtype(fields["settings"]["master_dtype"])
        like = map_with_path(
            lambda name, leaf: jax.ShapeDtypeStruct(leaf.shape, master_dtype_of(name, masters)), trained)
        _, trained = Checkpoints(path).load_trainable(LATEST, like)
        trained = map_with_path(lambda name, leaf: leaf.astype(param_dtype(name, dtype)), trained)
    return Pretrained(config, l2a_config, combine(trained, frozen), run_tokenizer(path), hash_run(path))


def hash_run(path: Path) -> str:
    """Content hash of a run's model: of its configuration and of every file of its newest checkpoint."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted((path / "checkpoints" / "latest").rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
