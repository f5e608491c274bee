"""The synthetic recall corpus: locally predictable sentences, with facts stated early and asked for later.

    the quiet river runs near the old bridge . keep metal copper . ... each green hill stands by the tall tower .
    tell metal copper .

Sentences follow a sparse word chain, so a window of a few tokens predicts them. Which value a subject keeps is drawn
anew in every row, and a question comes at least `distance` tokens after the subject's last mention: its answer is
known only to a model that looks beyond its window. Position t needs memory where token t + 1 is such an answer, and
the tokens alone say where that is: t holds the subject after "tell".

The corpus is a function of (seed, split, index); nothing is stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int

from l2a_jax.data.batch import Batch
from l2a_jax.errors import UserError

FACTS = {
    "metal": "copper iron nickel silver zinc lead tin steel",
    "fruit": "apple pear plum cherry fig lemon melon grape",
    "stone": "amber basalt flint garnet jade marble opal slate",
    "cloth": "velvet linen denim silk wool felt cotton lace",
    "spice": "saffron pepper clove ginger cumin anise mace sage",
    "tree": "oak elm birch cedar willow maple pine ash",
    "drink": "coffee cider cocoa water juice tea milk wine",
    "month": "january march april june july august october november",
}
SUBJECTS = list(FACTS)
VALUES = [value for values in FACTS.values() for value in values.split()]
ARTICLES = "the each one this that every".split()
ADJECTIVES = "quiet old green tall narrow bright cold wide golden hidden soft young".split()
NOUNS = "river bridge hill tower garden road forest window harbour field wall door village boat bird cloud".split()
VERBS = "runs waits stands turns rests grows falls moves shines listens".split()
PREPOSITIONS = "near under behind beyond above past".split()
SPECIAL = ["<pad>", "<eos>", ".", "keep", "tell"]
VOCABULARY: list[str] = SPECIAL + SUBJECTS + VALUES + ARTICLES + ADJECTIVES + NOUNS + VERBS + PREPOSITIONS
IDS = {word: index for index, word in enumerate(VOCABULARY)}
PAD, EOS, STOP, KEEP, TELL = range(len(SPECIAL))

SENTENCE = (ARTICLES, ADJECTIVES, NOUNS, VERBS, PREPOSITIONS, ARTICLES, ADJECTIVES, NOUNS)
BRANCHES = 3  # each word is followed by one of this many: about one nat a token, all of it local


_RNG = np.random.default_rng(0)
_CHAIN = [np.array([_RNG.choice(len(after), BRANCHES, replace=False) for _ in before])
          for before, after in itertools.pairwise(SENTENCE)]
"""For each word of a sentence, what may follow each choice of the one before: fixed for ever."""


@dataclass(frozen=True)
class RecallCorpus:
    """Rows of the corpus as training data: `batch(i)` is a pure function of the seed and i.

    `seq_len` T in tokens; `distance`: the least number of tokens between a fact's last mention and its question,
    which must exceed the model's window plus its sinks; `facts` per row; `emphasis`: the weight of a recalled answer in
    the loss of rows trained on, where any other token's is 1, and `held_out_emphasis` in that of held-out rows.
    """

    seq_len: int
    batch_size: int
    seed: int = 0
    distance: int = 24
    facts: int = 4
    emphasis: float = 1.0
    held_out_emphasis: float = 1.0
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        needed = 2 * self.distance + 16 * self.facts
        if self.seq_len < needed:
            raise UserError(f"the recall corpus needs --seq-len of at least {needed} to ask for {self.facts} facts "
                            f"from {self.distance} tokens away; got {self.seq_len}")

    @property
    def fingerprint(self) -> str:
        """Everything that determines the rows and their order."""
        return f"recall-v2 T={self.seq_len} B={self.batch_size} seed={self.seed} distance={self.distance} " \
               f"facts={self.facts} emphasis={self.emphasis}"

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of a micro-batch: every row is full."""
        return self.batch_size * self.seq_len

    def tokens_read(self, batches: int) -> int:
        """Tokens in the first `batches` micro-batches."""
        return batches * self.tokens_per_batch

    def batch(self, index: int) -> Batch:
        """Micro-batch `index` of the training split, this process's rows of it."""
        batch = self._rows(np.random.default_rng((self.seed, 0, index)), self.emphasis)
        size = self.batch_size // self.process_count
        mine = slice(self.process_index * size, (self.process_index + 1) * size)
        return Batch(*(None if field is None else field[mine] for field in batch))

    def of_process(self, index: int, count: int) -> RecallCorpus:
        """This corpus, of whose micro-batches the `index`-th of `count` equal shares of rows is read."""
        return replace(self, process_index=index, process_count=count)

    def held_out(self, batches: int | None = None) -> Iterator[Batch]:
        """The first `batches` batches (8 unless told) of the held-out split: the same for every seed of training."""
        for index in range(8 if batches is None else batches):
            yield self._rows(np.random.default_rng((0, 1, index)), self.held_out_emphasis)

    def describe(self) -> dict:
        """What a summary says about the data."""
        return {"name": "synthetic recall corpus", "fingerprint": self.fingerprint, "domains": {"recall": 1.0},
                "packing_efficiency": 1.0, "unique_tokens": "unlimited (generated)"}

    def _rows(self, rng: np.random.Generator, emphasis: float) -> Batch:
        rows = np.stack([self._row(rng) for _ in range(self.batch_size)])
        weights = np.where(needs_memory(rows[:, :-1]), emphasis, 1.0).astype(np.float32)
        return Batch(rows[:, :-1], rows[:, 1:], weights, None, None)

    def _row(self, rng: np.random.Generator) -> Int[np.ndarray, " S"]:
        subjects = rng.choice(SUBJECTS, self.facts, replace=False)
        kept = {subject: rng.choice(FACTS[subject].split()) for subject in subjects}
        unstated, due_at, row = list(subjects), {}, _sentence(rng)
        while len(row) <= self.seq_len:
            due = [subject for subject, at in due_at.items() if len(row) >= at]
            if due:
                subject, verb = due[rng.integers(len(due))], TELL
            elif unstated and rng.random() < 0.5:
                subject, verb = unstated.pop(), KEEP
            else:
                row += _sentence(rng)
                continue
            row += [verb, IDS[subject], IDS[kept[subject]], STOP]
            # Gaps vary widely: at a fixed distance, position alone would find the answer.
            due_at[subject] = len(row) + self.distance + int(rng.integers(self.distance))
        return np.asarray(row[: self.seq_len + 1], np.int32)


def _sentence(rng: np.random.Generator) -> list[int]:
    chosen = [int(rng.integers(len(SENTENCE[0])))]
    for follow in _CHAIN:
        chosen.append(int(follow[chosen[-1], rng.integers(BRANCHES)]))
    return [*(IDS[words[index]] for words, index in zip(SENTENCE, chosen, strict=True)), STOP]


def needs_memory(tokens: Int[np.ndarray, "B T"]) -> Bool[np.ndarray, "B T"]:
    """The ground truth: True at position t where token t + 1 is the answer to a question about a distant fact."""
    previous = np.concatenate([np.full_like(tokens[:, :1], PAD), tokens[:, :-1]], axis=1)
    return previous == TELL


PREDICTED = ("an answer", "which subject is asked", "what follows a stop", "anything else")


def predicted(tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
    """What kind of token follows each position, as an index into `PREDICTED`: all but the last kind may be told better
    by what stands beyond the window, an answer by that alone."""
    return np.select([needs_memory(tokens), tokens == TELL, tokens == STOP], [0, 1, 2], 3)
