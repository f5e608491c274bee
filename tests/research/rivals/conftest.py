"""A tiny run with a router, and two texts that it can read."""

import pathlib

import pytest

from l2a_jax.data.recall import RecallCorpus
from l2a_jax.sources import recall_tokenizer

RUN = pathlib.Path(__file__).parents[2] / "frozen/folders/router_only"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    paths = {}
    for name, batch in zip(("text", "calibration"), RecallCorpus(128, 6).held_out(2), strict=False):
        paths[name] = folder / f"{name}.txt"
        paths[name].write_text(" ".join(recall_tokenizer().decode(row.tolist()) for row in batch.tokens))
    return {name: str(path) for name, path in paths.items()}
