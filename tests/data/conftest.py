"""A tokenizer without a download (one token a byte, so that ids can be read back as text) and files of made-up text."""

import gzip
import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from l2a_jax.data.dataset import open_data

END = "<|endoftext|>"


@pytest.fixture(scope="session")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens([END])
    return bytes_only


def sentence(rng: random.Random, length: int) -> str:
    return "".join(rng.choice("abcdefghij klmno") for _ in range(length))


@pytest.fixture
def write(tmp_path):
    """write(name, documents): a .jsonl(.gz) of texts or records, or a .txt(.gz) of documents between separators."""

    def write(name, documents):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if ".jsonl" in name:
            records = [{"text": d} if isinstance(d, str) else d for d in documents]
            data = "".join(json.dumps(r) + "\n" for r in records).encode()
        else:
            data = END.join(documents).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


@pytest.fixture
def texts():
    """texts(n, low, high, seed): n different made-up documents of low to high bytes."""

    def texts(count, low=20, high=200, seed=0):
        rng = random.Random(seed)
        return [f"{seed}.{i} " + sentence(rng, rng.randint(low, high)) for i in range(count)]

    return texts


@pytest.fixture
def opened(tokenizer, tmp_path):
    """open_data with small defaults and a cache of the test's own."""

    def opened(spec, **options):
        options = {"seq_len": 128, "batch_size": 4, "seed": 0, "cache_dir": tmp_path / "cache"} | options
        return open_data([str(spec)] if not isinstance(spec, list) else [str(s) for s in spec], tokenizer, **options)

    return opened
