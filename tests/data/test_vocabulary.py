"""Token ids without a row in the embedding: refused wherever text is opened, by one rule (`data.encoder.check_ids`)."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from l2a_jax.config import MODELS
from l2a_jax.data.encoder import check_ids
from l2a_jax.errors import UserError
from l2a_jax.evaluation.loglikelihood import Request, log_likelihoods
from l2a_jax.evaluation.perplexity import score_windows, text_windows
from l2a_jax.research.absorption import l2a_audit
from l2a_jax.research.absorption.corpora import text_corpus
from l2a_jax.research.replication.row import Row
from l2a_jax.research.replication.session import Session
from l2a_jax.runs.plan import make_plan
from l2a_jax.sources import TINY, Pretrained, load_pretrained
from l2a_jax.training.settings import Settings

SAID = r"gives id 256 for the domain 'files' of --data, but the model's vocabulary has 200 rows"


@pytest.fixture
def path(write, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("L2A_CACHE", str(tmp_path / "cache"))
    return str(write("a.jsonl", texts(40)))


@pytest.fixture
def small(tokenizer):
    """A model of 200 rows beside a tokenizer of 257 ids, of which text and the end mark use all kinds."""
    return dataclasses.replace(MODELS["qwen2.5-tiny"], vocab_size=200), None, tokenizer


def test_training_resuming_and_dry_runs_make_one_plan_which_refuses(path, small):
    settings = Settings(regime="pretrain", model="some", data=(path,), seq_len=64, batch_size=2, steps=1)
    with pytest.raises(UserError, match=SAID):
        make_plan(settings, read=lambda source: small)
    enough = (dataclasses.replace(small[0], vocab_size=257), *small[1:])
    assert make_plan(settings, read=lambda source: enough).data.tokens_per_batch > 0


def test_the_study_refuses(path, small, monkeypatch):
    monkeypatch.setattr("l2a_jax.research.replication.session.read_source", lambda source: small)
    row = Row("r", "test", "does it fit?", "0.5b", "pretrain", (("seq_len", 64), ("batch_size", 2), ("steps", 1)),
              (path,))
    with pytest.raises(UserError, match=SAID):
        Session({"0.5b": "some"}, ".").plan(row)


def test_the_audit_of_absorption_refuses(path, small, monkeypatch):
    model = Pretrained(small[0], object(), {}, small[2], "")
    monkeypatch.setattr(l2a_audit, "load_pretrained", lambda *a: model)
    with pytest.raises(UserError, match=SAID):
        l2a_audit.open_audited("qwen2.5-tiny", [path], 1, 64, 2)


def test_the_suite_counts_ids_and_not_tokens(path, tmp_path):
    """With ids left out the largest lies beyond the number of tokens: the model is as wide as it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    sparse = Tokenizer(models.BPE(vocab={c: 2 * i for i, c in enumerate(alphabet)}, merges=[]))
    sparse.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    sparse.add_special_tokens(["<|endoftext|>"])
    largest = max(sparse.get_vocab().values())
    assert largest > len(sparse.get_vocab())
    corpus = text_corpus([path], sparse, 16, 0.2, tmp_path / "cache")
    assert corpus.vocabulary == largest + 1 > corpus.train.stream.max() > len(sparse.get_vocab())


def test_benchmarks_and_windows_refuse():
    tiny = load_pretrained(TINY, jnp.float32)
    rows = tiny.config.vocab_size
    for context, continuation in (([1, rows], [2]), ([1], [2, rows]), ([-1], [2])):
        with pytest.raises(UserError, match="vocabulary"):
            log_likelihoods(tiny, [Request(context, continuation)])
    for ids in ([1, rows, 2, 3], [1, 2, 3, 4, rows]):  # the last one is a target alone
        with pytest.raises(UserError, match="vocabulary"):
            score_windows(tiny, text_windows(np.asarray(ids, np.int32), 2, 2, {}))


@pytest.mark.parametrize("ids", [[0, 9, 10], [-1, 3], [2**40]])
def test_the_rule(ids):
    check_ids([], 10, "x")
    check_ids([0, 9], 10, "x")
    with pytest.raises(UserError, match="for x, but the model's vocabulary has 10 rows"):
        check_ids(ids, 10, "x")
