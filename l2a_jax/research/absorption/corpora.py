"""A corpus as the suite reads it: one string of tokens and where its windows of T + 1 begin, for training and held out.

The tokens live on the device, a batch is a gather, and the order of the windows is a pure function of the seed: a step
needs nothing of the host but B integers. Documents are joined by their end tokens and cut every T tokens, as published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from l2a_jax.data.dataset import open_data
from l2a_jax.data.encoder import make_encoder
from l2a_jax.data.mixing import permutation
from l2a_jax.data.recall import VOCABULARY, RecallCorpus
from l2a_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class CorpusWindows:
    """W windows: window w is `stream[starts[w] : starts[w] + T + 1]`, T inputs and their targets."""

    stream: np.ndarray
    starts: Int32[np.ndarray, " W"]

    def order(self, seed: int, first: int, count: int, batch_size: int) -> Int32[np.ndarray, "n B"]:
        """Where the windows of steps first..first + count begin, for one seed; each epoch in an order of its own."""
        total = self.starts.size
        places = np.arange(first * batch_size, (first + count) * batch_size)
        epochs = places // total
        chosen = np.empty(places.size, np.int64)
        for epoch in np.unique(epochs):
            within = epochs == epoch
            chosen[within] = permutation(seed, "windows", int(epoch), total)[places[within] % total]
        return self.starts[chosen].reshape(count, batch_size)

    def in_turn(self, batches: int, batch_size: int) -> Int32[np.ndarray, "n B"]:
        """The first whole batches, at most `batches`, in one fixed shuffled order: what every arm is scored on."""
        count = min(batches, self.starts.size // batch_size)
        order = permutation(0, "held out", 0, self.starts.size)[: count * batch_size]
        return self.starts[order].reshape(-1, batch_size)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and held-out windows, and what is said about them."""

    train: CorpusWindows
    held_out: CorpusWindows
    vocabulary: int
    fingerprint: str
    description: dict[str, Any]


def recall_corpus(seq_len: int, windows: int, held_out: int, seed: int = 0) -> Corpus:
    """`windows` rows of the synthetic recall corpus, generated here; rows are whole, so windows never join two."""
    distance = max(4, seq_len // 8)
    rows = RecallCorpus(seq_len, windows, seed, distance=distance, facts=2)
    parts = []
    for batch in (rows.batch(0), next(iter(RecallCorpus(seq_len, held_out, seed, distance, 2).held_out(1)))):
        stream = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1).astype(np.uint16).reshape(-1)
        parts.append(CorpusWindows(stream, np.arange(batch.tokens.shape[0], dtype=np.int32) * (seq_len + 1)))
    return Corpus(*parts, len(VOCABULARY), f"{rows.fingerprint} windows={windows}",
                  {"name": "synthetic recall corpus", "train_windows": windows, "held_out_windows": held_out,
                   "train_tokens": windows * seq_len})


def text_corpus(spec: Sequence[str], tokenizer: Any, seq_len: int, held_out: float = 0.02,
                cache_dir: Path | None = None) -> Corpus:
    """The documents of `--data`, each once, in a fixed shuffled order; a share of the documents held out by hash.

    Raises UserError as `open_data` does, and where either side has too little text for a window.
    """
    # An id, not a count: where the tokenizer leaves some out, the largest lies beyond the number of tokens.
    vocabulary = make_encoder(tokenizer).vocabulary
    data = open_data(spec, tokenizer, seq_len=seq_len, batch_size=1, seed=0, packing="concat", held_out=held_out,
                     cache_dir=cache_dir, vocab_size=vocabulary)
    about = data.describe()
    sides = []
    for side in ("train_documents", "held_out_documents"):
        spans = [(part.store.tokens, int(begin), int(end)) for part in data.parts
                 for begin, end in zip(part.store.offsets[getattr(part, side)],
                                       part.store.offsets[getattr(part, side) + 1], strict=True)]
        if not spans:
            raise UserError("--data holds out no document; expected at least ten documents in one of its domains")
        stream = np.concatenate([tokens[begin:end] for tokens, begin, end in
                                 (spans[i] for i in permutation(0, side, 0, len(spans)))])
        count = (stream.size - 1) // seq_len
        if count < 1:
            raise UserError(f"--data has {stream.size} {side.replace('_', ' ')} tokens; expected more than {seq_len}")
        sides.append(CorpusWindows(stream, np.arange(count, dtype=np.int32) * seq_len))
    keep = ("documents", "tokens", "unique_tokens", "held_out_documents", "held_out_tokens")
    description = {key: about[key] for key in keep} | {
        "train_windows": sides[0].starts.size, "held_out_windows": sides[1].starts.size, "held_out_share": held_out,
        "domains": {name: {key: domain[key] for key in keep} for name, domain in about["domains"].items()}}
    return Corpus(*sides, vocabulary, hashlib.sha256(f"{data.fingerprint} {seq_len}".encode()).hexdigest()[:16],
                  description)


def gpt2_tokenizer(place: str) -> Any:
    """A tokenizer of `--tokenizer`: `tokenizer.json`, its folder, a folder with GPT-2's `vocab.json` and `merges.txt`,
    or a name on the hub. UserError where there is none."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = Path(place).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            tokenizer = Tokenizer(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt")))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.add_special_tokens(["<|endoftext|>"])
            return tokenizer
        if path.exists():
            raise UserError(f"--tokenizer {place} holds neither tokenizer.json nor vocab.json with merges.txt")
        return Tokenizer.from_pretrained(place)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"--tokenizer {place} is neither a readable tokenizer nor one on the hub: "
                        f"{' '.join(str(error).split())[:200] or type(error).__name__}") from error
