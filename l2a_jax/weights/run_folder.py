"""A run folder, or one checkpoint in it, as a source of a model: what training wrote, put back together."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.errors import UserError
from l2a_jax.files import read_json
from l2a_jax.models.params import abstract_params, add_routing, map_with_path, param_dtype
from l2a_jax.run_files import describes_run, read_run
from l2a_jax.weights.tokenizer import Tokenizer

if TYPE_CHECKING:
    from l2a_jax.weights.pretrained import Pretrained


class RunSource(NamedTuple):
    """A checkpoint of a run as the source of a model; `step` None: the newest of its kind."""

    folder: Path
    kind: str = "latest"
    step: int | None = None

    @property
    def label(self) -> str:
        """What sets this checkpoint apart from the run's newest, as part of a name; empty for the newest."""
        newest = self.step is None and self.kind == "latest"
        return "" if newest else self.kind if self.step is None else f"{self.kind}-{self.step}"


def run_source(path: Path) -> RunSource | None:
    """The run that `path` means, where it is a run folder or a checkpoint in one (`RUN/checkpoints/best`,
    `RUN/checkpoints/latest/500`); else None."""
    if not path.is_dir():
        return None
    if (path / "config.json").is_file():
        return RunSource(path) if describes_run(read_json(path / "config.json")) else None
    whole = path.absolute()
    step = int(whole.name) if whole.name.isdecimal() else None
    kind = whole if step is None else whole.parent
    folder = kind.parent.parent
    if kind.name in ("latest", "best") and kind.parent.name == "checkpoints" and (folder / "config.json").is_file():
        return RunSource(folder, kind.name, step)
    return None


def is_run_folder(path: Path) -> bool:
    """Whether `path` is what a training run wrote, or a checkpoint in it."""
    return run_source(path) is not None


def _of(path: Path) -> RunSource:
    return run_source(path) or RunSource(path)


def read_run_config(path: Path) -> tuple[ModelConfig, L2AConfig | None]:
    """The configurations that a run trained with. Raises UserError if `config.json` does not hold them."""
    run = read_run(_of(path).folder)
    return run.model_config, run.l2a_config


def run_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of the source that a run began from; fresh parameters read the recall corpus."""
    from l2a_jax.data.recall import make_tokenizer
    from l2a_jax.weights.pretrained import source_tokenizer

    source = read_run(_of(path).folder).source
    return make_tokenizer() if source is None else source_tokenizer(source)


def load_run(path: Path, dtype: Any) -> Pretrained:
    """The model of a run: its source's frozen parameters with the trained ones of a checkpoint.

    Raises UserError if the run has no whole checkpoint, or if its source is gone or no longer the same.
    """
    # Training stands above weights in the house; only this file, which reads what training wrote, looks up.
    from l2a_jax.training.checkpoint import Checkpoints
    from l2a_jax.training.optimizer import master_dtype_of
    from l2a_jax.training.regimes import combine, partition, regime_mask
    from l2a_jax.weights.pretrained import Pretrained, load_pretrained

    where = _of(path)
    run = read_run(where.folder)
    config, l2a_config = run.model_config, run.l2a_config
    abstract = abstract_params(config, l2a_config, dtype)
    mask = regime_mask(abstract, run.settings.regime)
    trained, frozen = partition(abstract, mask)
    if run.source is not None:
        source = load_pretrained(run.source, dtype)
        if source.source_hash != run.source_hash:
            raise UserError(f"{run.source} is no longer the model that the run {where.folder} began from")
        params = source.params
        if l2a_config is not None and source.l2a_config is None:
            params = add_routing(params, config, l2a_config)
        frozen = partition(params, mask)[1]
    if trained:
        masters = jnp.dtype(run.settings.master_dtype)
        like = map_with_path(
            lambda name, leaf: jax.ShapeDtypeStruct(leaf.shape, master_dtype_of(name, masters)), trained)
        _, trained = Checkpoints(where.folder).load_trainable(where.kind, like, where.step)
        trained = map_with_path(lambda name, leaf: leaf.astype(param_dtype(name, dtype)), trained)
    return Pretrained(config, l2a_config, combine(trained, frozen), run_tokenizer(path), hash_run(path))


def hash_run(path: Path) -> str:
    """Content hash of a run's model: of its configuration and of every file of its newest (or this) checkpoint."""
    from l2a_jax.training.checkpoint import Checkpoints

    where = _of(path)
    checkpoints = Checkpoints(where.folder)
    digest = hashlib.sha256((where.folder / "config.json").read_bytes())
    if where.step is not None or checkpoints.steps(where.kind):  # a run that trains nothing has none
        for file in sorted(checkpoints.folder(where.kind, where.step).rglob("*")):
            if file.is_file():
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
