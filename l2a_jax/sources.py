"""What a source is: a hub id, a Hugging Face folder, a run folder (or a checkpoint in it), or a GGUF file, as a model.

What a folder written by `save_pretrained` holds is a Hugging Face folder too, so there is no format of our own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.data.recall import EOS, IDS, PAD, SPECIAL
from l2a_jax.errors import UserError, few
from l2a_jax.files import read_json, reading, sha256
from l2a_jax.models.params import Tree, abstract_params, add_routing, map_with_path, param_dtype
from l2a_jax.training.checkpoints import LATEST, Checkpoints
from l2a_jax.training.optimizer import master_dtype_of
from l2a_jax.training.regimes import combine, partition, regime_mask
from l2a_jax.training.run_files import RunConfig, describes_run, read_run
from l2a_jax.weights.assemble import Tensors, assemble, floating
from l2a_jax.weights.export import SHARD_BYTES, check_free, save_pretrained
from l2a_jax.weights.gguf_config import gguf_config
from l2a_jax.weights.gguf_file import GGUFFile
from l2a_jax.weights.gguf_tokenizer import gguf_tokenizer
from l2a_jax.weights.hf_config import parse_config
from l2a_jax.weights.hf_folder import GENERATION, Carried, HFFolder, folder_carried, refuse_adapter, shard_files, tie
from l2a_jax.weights.tokenizer import Tokenizer
from l2a_jax.weights.tokenizer_folder import FILES as TOKENIZER_FILES
from l2a_jax.weights.tokenizer_folder import load_tokenizer

log = logging.getLogger("l2a_jax")
TINY = "qwen2.5-tiny"
"""The source name of the small model that is part of the package."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", GENERATION, "adapter_config.json",
              *TOKENIZER_FILES, "additional_chat_templates/*.jinja"]


class Pretrained(NamedTuple):
    """A loaded model. `l2a_config` is None for a plain one, `tokenizer` where the source has none; `source_hash` is a
    SHA-256 of its weights and configuration; `carried` is what its files say beyond that, for an export."""

    config: ModelConfig
    l2a_config: L2AConfig | None
    params: Tree
    tokenizer: Tokenizer | None
    source_hash: str
    carried: Carried | None = None


def load_pretrained(source: str | Path, dtype: Any = jnp.bfloat16) -> Pretrained:
    """Read a model: `source` is a hub id, a folder, a run folder, or a `.gguf` file.

    The parameters are jax arrays in `dtype` (float32, bfloat16 or float16) on the default device, the router float32.
    Host memory stays near the model plus one leaf of it. Raises UserError on anything wrong with the source.
    """
    floating(dtype)
    with reading(source):
        path = locate(source)
        if (run := run_source(path)) is not None:
            return _load_run(run, dtype)._replace(carried=_carried(path))
        config, l2a_config, tensors = _open(path)
        tokenizer = gguf_tokenizer(tensors) if isinstance(tensors, GGUFFile) else load_tokenizer(path)
        params = assemble(tensors, config, l2a_config, dtype)
        return Pretrained(config, l2a_config, params, tokenizer, source_hash(path), _carried(path))


def read_config(source: str | Path) -> tuple[ModelConfig, L2AConfig | None]:
    """The configurations of a source, from its headers. Raises UserError as `load_pretrained` does."""
    with reading(source):
        path = locate(source)
        if (found := run_source(path)) is not None:
            run = read_run(found.folder)
            return run.model_config, _layer_of(run, found)
        return _open(path)[:2]


def source_tokenizer(source: str | Path) -> Tokenizer | None:
    """The tokenizer of a source alone, without reading its tensors; None where it has none."""
    with reading(source):
        path = locate(source)
        if (run := run_source(path)) is not None:
            source = read_run(run.folder).source  # fresh parameters read the recall corpus
            return recall_tokenizer() if source is None else source_tokenizer(source)
        return gguf_tokenizer(GGUFFile(path)) if path.is_file() else load_tokenizer(path)


def source_hash(source: str | Path) -> str:
    """SHA-256 of the weights and the configuration of a source, in hexadecimal; about a second for each gigabyte.

    It covers the bytes of the files that define the model, not their folder's name nor the tokenizer.
    """
    with reading(source):
        path = locate(source)
        if (run := run_source(path)) is not None:
            return _hash_run(run)
        return _hash([path] if path.is_file() else [path / "config.json", *shard_files(path)])


def locate(source: str | Path) -> Path:
    """The file or folder behind a source; a hub id is downloaded into the Hugging Face cache.

    Raises UserError if it does not exist, is neither a folder nor a `.gguf` file, or cannot be downloaded.
    """
    if str(source) == TINY:
        return Path(str(resources.files("l2a_jax") / "assets" / "tiny"))
    expected = "expected a hub id, a folder, or a .gguf file (a hub id is owner/name)"
    path = Path(os.path.expanduser(source))  # `Path.expanduser` raises on `~nobody`
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise UserError(f"{path} is not a model; {expected}")
    if not _HUB_ID.fullmatch(str(source)) or path.suffix in (".gguf", ".safetensors"):
        raise UserError(f"{source} does not exist; {expected}")
    return _download(str(source))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import RepositoryNotFoundError

    try:
        folder = snapshot_download(hub_id, allow_patterns=_HUB_FILES)
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no model {hub_id} (or it needs a login), and there is no such folder") from error
    except Exception as error:  # whatever the client's HTTP library raises, which changes between versions
        raise UserError(f"cannot download {hub_id} from the hub ({type(error).__name__}), and it is neither a folder "
                        "nor in the local cache; point at a folder or a .gguf file instead") from error
    return Path(folder)


def _carried(path: Path) -> Carried | None:
    """What the files of a source say beyond the model; a run's are those of the source that it began from."""
    if path.is_file():
        return None
    run = run_source(path)
    if run is None:
        return folder_carried(path)
    source = read_run(run.folder).source
    return None if source is None else _carried(locate(source))


def _open(path: Path) -> tuple[ModelConfig, L2AConfig | None, Tensors]:
    if path.is_file():
        file = GGUFFile(path)
        return gguf_config(file), None, file
    inside = sorted(file.name for file in path.glob("*.gguf"))
    if inside and not (path / "config.json").exists():
        raise UserError(f"{path} has no config.json; point at its file {few(inside, 3)} instead")
    refuse_adapter(path)
    config, l2a_config = parse_config(read_json(path / "config.json"), str(path / "config.json"))
    folder = HFFolder(path)
    return tie(config, folder), l2a_config, folder


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


def _layer_of(run: RunConfig, where: RunSource) -> L2AConfig | None:
    """The layer of a checkpoint: a run with a target moves the threshold for the last one, and for no other."""
    step = (Checkpoints(where.folder).steps(where.kind) or [None])[-1] if where.step is None else where.step
    return run.l2a_config if step == run.steps else run.trained_layer


def _load_run(where: RunSource, dtype: Any) -> Pretrained:
    """The model of a run: its source's frozen parameters with the trained ones of a checkpoint.

    Raises UserError if the run has no whole checkpoint, or if its source is gone or no longer the same.
    """
    run = read_run(where.folder)
    config, l2a_config = run.model_config, _layer_of(run, where)
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
        step, trained = Checkpoints(where.folder).load_trainable(where.kind, like, where.step)
        trained = map_with_path(lambda name, leaf: leaf.astype(param_dtype(name, dtype)), trained)
        if run.steps is not None and max(Checkpoints(where.folder).steps(LATEST), default=0) < run.steps:
            log.warning("the run %s is not finished: this is its step %d of %d", where.folder, step, run.steps)
    return Pretrained(config, l2a_config, combine(trained, frozen), source_tokenizer(where.folder), _hash_run(where))


def _hash_run(where: RunSource) -> str:
    """Content hash of a run's model: of its configuration and of every file of its newest (or this) checkpoint."""
    checkpoints = Checkpoints(where.folder)
    trained = []
    if where.step is not None or checkpoints.steps(where.kind):  # a run that trains nothing has none
        trained = sorted(checkpoints.folder(where.kind, where.step).rglob("*"))
    return _hash([file for file in trained if file.is_file()], (where.folder / "config.json").read_bytes())


def _hash(files: list[Path], head: bytes = b"") -> str:
    return hashlib.sha256(head + b"".join(bytes.fromhex(sha256(file)) for file in files)).hexdigest()


def convert(source: str | Path, out: str | Path, dtype: Any = "bfloat16", shard_bytes: int = SHARD_BYTES) -> str:
    """Read any source and write it to `out` as a Hugging Face folder in `dtype`: what both commands do.

    Returns one line that says what was written. Raises UserError as `load_pretrained` and `save_pretrained` do.
    """
    check_free(out)
    model = load_pretrained(source, dtype)
    save_pretrained(out, model.params, model.config, model.l2a_config, model.tokenizer, shard_bytes=shard_bytes,
                    carried=model.carried)
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    kind = "plain Qwen2" if model.l2a_config is None else f"{model.l2a_config.topology} L2A"
    return f"wrote {out}: {kind}, {size:,} parameters in {floating(dtype).name}" + (
        "" if model.tokenizer else "; without a tokenizer, because the source has none"
    )


def recall_tokenizer() -> Tokenizer:
    """The recall corpus's vocabulary as a word-level tokenizer: one id a word, words and stops apart by spaces."""
    backend = Backend(models.WordLevel(IDS, unk_token=SPECIAL[PAD]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL[: EOS + 1])
    return Tokenizer(backend, {"eos_token": SPECIAL[EOS], "pad_token": SPECIAL[PAD],
                               "tokenizer_class": "PreTrainedTokenizerFast"})
