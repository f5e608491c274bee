"""Load a model from wherever it is: a hub id, a Hugging Face folder, a run folder, or a GGUF file.

What a folder written by `save_pretrained` holds is a Hugging Face folder too, so there is no format of our own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.errors import UserError, few
from l2a_jax.files import read_json, reading
from l2a_jax.models.params import Tree
from l2a_jax.run_files import read_run
from l2a_jax.weights import run_folder
from l2a_jax.weights.assemble import Tensors, assemble, block_rows, floating
from l2a_jax.weights.carried import Carried, folder_carried
from l2a_jax.weights.ends import GENERATION
from l2a_jax.weights.gguf_file import GGUFFile
from l2a_jax.weights.gguf_model import gguf_config, gguf_tokenizer
from l2a_jax.weights.hf_config import parse_config
from l2a_jax.weights.hf_folder import HFFolder, refuse_adapter, shard_files
from l2a_jax.weights.tokenizer import Tokenizer
from l2a_jax.weights.tokenizer_folder import FILES as TOKENIZER_FILES
from l2a_jax.weights.tokenizer_folder import load_tokenizer

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
        if run_folder.is_run_folder(path):
            return run_folder.load_run(path, dtype)._replace(carried=_carried(path))
        config, l2a_config, tensors = _open(path)
        tokenizer = gguf_tokenizer(tensors) if isinstance(tensors, GGUFFile) else load_tokenizer(path)
        params = assemble(tensors, config, l2a_config, dtype)
        return Pretrained(config, l2a_config, params, tokenizer, source_hash(path), _carried(path))


def read_config(source: str | Path) -> tuple[ModelConfig, L2AConfig | None]:
    """The configurations of a source, from its headers. Raises UserError as `load_pretrained` does."""
    with reading(source):
        path = locate(source)
        return run_folder.read_run_config(path) if run_folder.is_run_folder(path) else _open(path)[:2]


def source_tokenizer(source: str | Path) -> Tokenizer | None:
    """The tokenizer of a source alone, without reading its tensors; None where it has none."""
    with reading(source):
        path = locate(source)
        if run_folder.is_run_folder(path):
            return run_folder.run_tokenizer(path)
        return gguf_tokenizer(GGUFFile(path)) if path.is_file() else load_tokenizer(path)


def source_hash(source: str | Path) -> str:
    """SHA-256 of the weights and the configuration of a source, in hexadecimal; about a second for each gigabyte.

    It covers the bytes of the files that define the model, not their folder's name nor the tokenizer.
    """
    with reading(source):
        path = locate(source)
        if run_folder.is_run_folder(path):
            return run_folder.hash_run(path)
        files = [path] if path.is_file() else [path / "config.json", *shard_files(path)]
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def locate(source: str | Path) -> Path:
    """The file or folder behind a source; a hub id is downloaded into the Hugging Face cache.

    Raises UserError if it does not exist, is neither a folder nor a `.gguf` file, or cannot be downloaded.
    """
    if str(source) == TINY:
        return Path(str(resources.files("l2a_jax") / "assets" / "tiny"))
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # ~name of nobody
        raise UserError(f"{source} does not exist; expected a hub id (owner/name), a folder, or a .gguf file") from None
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise UserError(f"{path} is not a model; expected a hub id, a folder, or a .gguf file")
    if not _HUB_ID.fullmatch(str(source)) or path.suffix in (".gguf", ".safetensors"):
        raise UserError(f"{source} does not exist; expected a hub id (owner/name), a folder, or a .gguf file")
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
    run = run_folder.run_source(path)
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
    return _tie(config, folder), l2a_config, folder


def _tie(config: ModelConfig, folder: HFFolder) -> ModelConfig:
    """Tied or not, as transformers 5 decides: a stored output matrix that differs from the embedding unties a model
    whose configuration ties it; one that is the same is dropped; one that stands alone is both."""
    embedding, output = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_embeddings and output in folder.shapes and embedding not in folder.shapes:
        folder.rename(output, embedding)
    if not config.tie_embeddings or output not in folder.shapes:
        return config
    shape = folder.shapes[output]
    same = folder.shapes.get(embedding) == shape
    step = block_rows(shape)
    for start in range(0, shape[0] if same else 0, step):
        blocks = (folder.rows(name, start, min(start + step, shape[0])) for name in (embedding, output))
        if not np.array_equal(*blocks):
            same = False
            break
    if same:
        folder.drop(output)
        return config
    return dataclasses.replace(config, tie_embeddings=False)
