"""A tiny run with a router, and two texts that it can read; a model whose router is random, and windows for it."""

import pathlib

import jax.numpy as jnp
import pytest

from l2a_jax.config import L2AConfig
from l2a_jax.data.recall import RecallCorpus, needs_memory
from l2a_jax.evaluation.perplexity import batch_windows
from l2a_jax.sources import TINY, load_pretrained, recall_tokenizer
from tests.models.cases import with_router

LAYER = L2AConfig(window=12, sinks=2)
RUN = pathlib.Path(__file__).parents[2] / "frozen/folders/router_only"


@pytest.fixture(scope="module")
def model():
    return with_router(load_pretrained(TINY, jnp.float32), LAYER, seed=3)


@pytest.fixture(scope="module")
def windows():
    return batch_windows(list(RecallCorpus(128, 8).held_out(1)), {"name": "recall corpus"}, needs_memory)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    paths = {}
    for name, batch in zip(("text", "calibration"), RecallCorpus(128, 6).held_out(2), strict=False):
        paths[name] = folder / f"{name}.txt"
        paths[name].write_text(" ".join(recall_tokenizer().decode(row.tolist()) for row in batch.tokens))
    return {name: str(path) for name, path in paths.items()}
