"""Rows of several lengths in one run, one length after the other, as shares of the run: `2048:0.3,8192:0.5,32768:0.2`.

A step reads as many tokens at every length: what changes is how many rows they are. Each length has a packing of its
own of the same text, and step s reads of it what step s of a run of that length alone would. So the step is all that
says where in the data a run stands, and resuming is exact; what a length packs otherwise may be read again at the next.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from l2a_jax.data.batch import Batch, TrainingData
from l2a_jax.errors import UserError

FLAG = "--curriculum"


def parse_curriculum(text: str) -> tuple[tuple[int, float], ...]:
    """(tokens a row, share of the run) for each entry; UserError unless they are as the head of this file shows."""
    expected = f"{FLAG} is {text!r}; expected LENGTH:SHARE,... with shares above 0 that add up to 1"
    try:
        entries = tuple((int(length), float(share)) for length, share in
                        (entry.split(":") for entry in text.split(",")))
    except ValueError:
        raise UserError(expected) from None
    if not all(length >= 2 and share > 0 for length, share in entries):
        raise UserError(expected)
    if abs(sum(share for _, share in entries) - 1) > 1e-6:
        raise UserError(f"{expected}; these come to {sum(share for _, share in entries):g}")
    return entries


@dataclass(frozen=True)
class Stage:
    """A part of the run: `accumulate` micro-batches a step of rows of one length, up to the step `end` (not included;
    0-based)."""

    seq_len: int
    share: float
    data: TrainingData
    accumulate: int
    end: int = 0


@dataclass(frozen=True)
class Curriculum:
    """`TrainingData` whose micro-batches are those of the stage that a step is in (`at`); held-out rows, and what is
    said about the text, are those of `base`, the data at the run's own row length."""

    base: TrainingData
    stages: tuple[Stage, ...]
    grad_accum: int

    def over(self, steps: int) -> Curriculum:
        """This over a run of so many steps; UserError where a stage would have none."""
        done, ends = 0.0, []
        for stage in self.stages:
            done += stage.share
            ends.append(round(done * steps))
            if ends[-1] == (ends[-2] if len(ends) > 1 else 0):
                raise UserError(f"{FLAG} gives rows of {stage.seq_len} a share of {stage.share:g}, which is no step of "
                                f"{steps}")
        return dataclasses.replace(self, stages=tuple(dataclasses.replace(stage, end=end) for stage, end in
                                                      zip(self.stages, ends, strict=True)))

    def at(self, step: int) -> Stage:
        """The stage of step `step` (0-based)."""
        return self.stages[min(bisect.bisect_right([stage.end for stage in self.stages], step), len(self.stages) - 1)]

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines what a step reads."""
        told = [self.base.fingerprint, *((stage.share, stage.accumulate, stage.data.fingerprint)
                                         for stage in self.stages)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def tokens_per_batch(self) -> float:
        """Tokens of a step, on average over the run, for each of the micro-batches that it would have without
        stages."""
        return sum(stage.share * stage.accumulate * stage.data.tokens_per_batch
                   for stage in self.stages) / self.grad_accum

    def tokens_read(self, batches: int) -> int:
        """Tokens in the steps of the first `batches` micro-batches, of which a step would have `grad_accum` without
        stages; padding not counted."""
        steps, begin, tokens = batches // self.grad_accum, 0, 0
        for stage in self.stages:
            first, last = (min(step, steps) * stage.accumulate for step in (begin, stage.end))
            if last > first:
                tokens += stage.data.tokens_read(last) - stage.data.tokens_read(first)
            begin = stage.end
        return tokens

    def batch(self, index: int) -> Batch:
        """Micro-batch `index` of the first stage: what a run begins with."""
        return self.stages[0].data.batch(index)

    def held_out(self, batches: int | None = None) -> Iterator[Batch]:
        """Held-out batches of the run's own row length."""
        return self.base.held_out(batches)

    def of_process(self, index: int, count: int) -> Curriculum:
        """This, of whose micro-batches the `index`-th of `count` equal shares of rows is read."""
        return dataclasses.replace(self, stages=tuple(dataclasses.replace(
            stage, data=stage.data.of_process(index, count)) for stage in self.stages))

    def describe(self) -> dict[str, Any]:
        """What a summary says about the data."""
        return {**self.base.describe(), "fingerprint": self.fingerprint,
                "curriculum": [{"seq_len": stage.seq_len, "share": stage.share, "accumulate": stage.accumulate,
                                "fingerprint": stage.data.fingerprint} for stage in self.stages]}


def make_curriculum(text: str, read: Callable[[int, int], TrainingData], seq_len: int, batch_size: int,
                    grad_accum: int) -> Curriculum:
    """The stages of `text` for a run whose steps read grad_accum x batch_size x seq_len tokens; `read(seq_len,
    batch_size)` opens the data. Micro-batches are as large as the run's own, or one longer row.

    UserError where a length does not divide the tokens of a step."""
    tokens, stages = grad_accum * batch_size * seq_len, []
    for length, share in parse_curriculum(text):
        rows, left = divmod(tokens, length)
        if left or not rows:
            raise UserError(f"{FLAG} has rows of {length}, which do not divide the {tokens} tokens of a step "
                            f"(--grad-accum {grad_accum} x --batch-size {batch_size} x --seq-len {seq_len})")
        together = max(n for n in range(1, rows + 1)
                       if rows % n == 0 and (n == 1 or n * length <= batch_size * seq_len))
        stages.append(Stage(length, share, read(length, together), rows // together))
    return Curriculum(read(seq_len, batch_size), tuple(stages), grad_accum)
