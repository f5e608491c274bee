"""A folder of texts that the packaged tiny model can read (sentences of the recall corpus), and a session over it."""

import json

import pytest

from l2a_jax.data.recall import RecallCorpus
from l2a_jax.research.replication.row import Measures, Row
from l2a_jax.research.replication.session import Session
from l2a_jax.sources import TINY, source_tokenizer

QUICK = Measures(tasks=("perplexity", "audit", "needle"), text="{data}/eval/text.txt", context=128, windows=6,
                 audit_windows=4, audit_seeds=1, needle_lengths=(64,), needle_depths=2, needle_seeds=2,
                 haystack="recall", controls=True)
LAYER = {"steps": 6, "seq_len": 128, "batch_size": 2, "window": 12, "remat": "none", "eval_every": 3,
         "eval_batches": 1}


def make_row(name, regime="router_only", measures=QUICK, baseline="plain", **given):
    flags = {"seq_len": 128} if regime == "baseline" else {**LAYER, "seed": 0, **given}
    return Row(name, "test", "does it run?", "0.5b", regime, tuple(flags.items()), ("notes={data}/train",), measures,
               None if regime == "baseline" else baseline)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"))


def write_texts(folder):
    """A text to train on and one to score, in `folder`."""
    tokenizer = source_tokenizer(TINY)
    corpus = RecallCorpus(128, 4, 0, distance=24)
    rows = [tokenizer.decode(row.tolist()) for index in range(12) for row in corpus.batch(index).tokens]
    (folder / "train").mkdir()
    (folder / "eval").mkdir()
    (folder / "train" / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows[:40]))
    (folder / "eval" / "text.txt").write_text(" ".join(rows[40:]))
    return folder


@pytest.fixture(scope="session")
def session(data_dir, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("L2A_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield Session({"0.5b": TINY}, data_dir)
    patch.undo()
