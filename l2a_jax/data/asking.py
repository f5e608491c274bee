"""Text that asks about itself: things said at random places of a row, and asked for further on.

Ordinary text seldom needs what stood thousands of tokens before, and where it does, a word or a name comes again
(`echo`). A router that has read nothing else stays local in lists, tables and monotone text, whatever is asked of them
later. These rows ask: what was noted of something, entries of a register, which names stand for a value through others,
which words a list holds most often, in the row's own text, in sentences that repeat, or in nothing but entries. The
answers follow, so next-token loss and distillation both say where the past was needed.

Answers may count more than once in the loss (`weight`): they are about one token in a hundred, and the only ones of a
row of which it is known that they need its past.

Wordings are our own and vary; none is that of a task that this project scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from l2a_jax.data.batch import Batch
from l2a_jax.data.mixing import raw_random

QUALITIES = ("amber ashen bitter blunt brisk broad calm clever coarse copper crooked dim dusty eager early faded "
             "gentle gilded hollow humble idle ivory jagged keen late lean little lofty lonely loud mild muddy "
             "narrow nimble northern old pale patient plain proud quiet rapid rough rusty salty scarlet secret "
             "silent silver slow small solemn steep stern sunny tall tidy violet wary western wide windy wooden "
             "young").split()
THINGS = ("anchor archive barrel basket beacon bell bridge cabin candle canyon castle cellar chapel clock compass "
          "copse cradle dagger door engine falcon farm ferry fiddle flute forge fountain garden gate glove granary "
          "hammer harbour hedge inn island kettle ladder lamp lantern library locker mill mirror oak orchard oven "
          "parcel pier pilot plough quarry raven reservoir saddle school shed signal station table tailor tower "
          "trunk vault wagon well workshop").split()
ATTRIBUTES = ("code weight owner number password colour keeper price label price tag file address motto height age "
              "opening hour licence seal").split()
FILLERS = ("The road went on between the fields. Nobody was on it. A cart stood by the wall. ",
           "It rained in the morning. It rained in the evening. The river was high. ",
           "The meeting was opened. The minutes were read. There were no objections. ",
           "Line checked. Nothing to report. Moving on to the next line. ",
           "One step and another step. The stairs turn left. The stairs turn right. ")
SYLLABLES = ("ba be bo da do fe ga go ka ke ko la le lo ma me mo na ne no pa pe po ra re ro sa se so ta te to va ve "
             "vo").split()
NOTED = (" The {attribute} of the {subject} is {value}.",
         " Of the {subject} it is known that its {attribute} is {value}.",
         " {subject}, {attribute}: {value}.", " (Remember: {subject} - {attribute} - {value}.)",
         " For the {subject}, the {attribute} was set to {value}.",
         ' "{value}" is what the {subject} has as its {attribute}.',
         " They agreed on {value} as the {attribute} of the {subject}.",
         " Note: {attribute} ({subject}) = {value}.", "\n| {subject} | {attribute} | {value} |\n",
         " <{subject}> {attribute}={value};", "\n{attribute} of {subject} -> {value}\n",
         " Whoever looks for the {subject} should know the {attribute} {value}.")
ASKED = ("\nAs said above, the {attribute} of the {subject} is {value}.",
         "\nAsked which {attribute} the {subject} has, one answers: {value}.",
         "\n{subject}, {attribute}: {value}.", "\nQ: {attribute} of the {subject}? A: {value}",
         "\nWhat is the {attribute} of the {subject}? It is {value}.",
         "\nLook up the {subject} in what stands above and state its {attribute}.\nAnswer: {value}",
         "\nWhich {attribute} belongs to the {subject}, according to the passage? According to the passage: {value}",
         "\nuser: i forgot the {attribute} of the {subject}, can you find it again?\nassistant: {value}",
         "\nFill in. The {subject} has the {attribute} ____. -> {value}",
         '\n{{"of": "{subject}", "{attribute}": "{value}"}}',
         "\nRecall all that was said of the {subject}. Its {attribute}: {value}.",
         "\nTest: does the reader still know the {attribute} of the {subject}? Yes, {value}.")
GROUPED = ("\nState, in this order, {things}. {value}.", "\nQ: {things}? A: {value}",
           "\nWhat are {things}? They are {value}.",
           "\nuser: please list {things}, as they stand above.\nassistant: {value}")
_LEAST, _ATTEMPTS = 16, 8
"""Tokens that a row is made for at least, and how often it is drawn, for half as many each time, until it fits."""


Asked = tuple[str, str]
"""A question, and the answer that ends it."""


class Row(NamedTuple):
    """Tokens, and which of them are of answers."""

    tokens: Int32[np.ndarray, " T"]
    answers: Bool[np.ndarray, " T"]


class _Draws:
    """Random numbers, one after the other, as choices."""

    def __init__(self, key: str):
        self._numbers = itertools.chain.from_iterable(
            raw_random(f"{key} {part}", 1_024).tolist() for part in itertools.count())

    def below(self, count: int) -> int:
        return next(self._numbers) % count

    def of(self, choices: Sequence[str]) -> str:
        return choices[self.below(len(choices))]

    def subject(self) -> str:
        return f"{self.of(QUALITIES)} {self.of(THINGS)}"

    def name(self) -> str:
        return "".join(self.of(SYLLABLES) for _ in range(3 + self.below(2)))

    def value(self) -> str:
        kind = self.below(3)
        if kind == 0:
            return str(10 ** (2 + self.below(6)) + self.below(10**7))
        if kind == 1:
            return f"{self.of(QUALITIES)} {self.of(QUALITIES)} {self.of(THINGS)}"
        return f"{self.below(1 << 32):08x}-{self.below(1 << 32):08x}"

    def order(self, count: int) -> list[int]:
        keys = [next(self._numbers) for _ in range(count)]
        return sorted(range(count), key=keys.__getitem__)


def _different(draw: Callable[[], str], count: int) -> list[str]:
    """As many draws, no two alike."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


class _Fact(NamedTuple):
    subject: str
    attribute: str
    values: Sequence[str]


def _questions(draws: _Draws, facts: Sequence[_Fact]) -> list[Asked]:
    """Questions for the facts in another order, most of them for one, some for a few at once."""
    left, asked = [facts[i] for i in draws.order(len(facts))], []
    while left:
        count = 2 + draws.below(3) if draws.below(4) == 0 else 1
        chosen, left = left[:count], left[count:]
        if len(chosen) == 1:
            wording, said = draws.of(ASKED), {"subject": chosen[0].subject, "attribute": chosen[0].attribute}
        else:
            things = [f"the {one.attribute} of the {one.subject}" for one in chosen]
            wording, said = draws.of(GROUPED), {"things": ", ".join(things)}
        question, end = wording.split("{value}")
        answer = "; ".join(", ".join(one.values) for one in chosen)
        asked.append((question.format(**said), answer + end.format()))
    return asked


def _notes(draws: _Draws, room: int) -> tuple[list[str], list[Asked]]:
    """Statements and, in another order, questions with their answers; some subjects have several values."""
    said, facts = [], []
    for subject in _different(draws.subject, 1 + draws.below(max(1, min(28, room // 200)))):
        attribute = draws.of(ATTRIBUTES)
        values = [draws.value() for _ in range(1 + (draws.below(4) == 0) * draws.below(4))]
        wording = draws.of(NOTED)
        said += [wording.format(subject=subject, attribute=attribute, value=value) for value in values]
        facts.append(_Fact(subject, attribute, values))
    return said, _questions(draws, facts)


def _register(draws: _Draws, room: int) -> tuple[list[str], list[Asked]]:
    """Entries that fill most of the row, and some of them asked for. An entry takes 17 to 25 tokens."""
    wording, attribute = draws.of(NOTED), draws.of(ATTRIBUTES)
    facts = [_Fact(f"{draws.subject()} {draws.name()}", attribute, [draws.value()]) for _ in range(max(1, room // 28))]
    said = [wording.format(subject=one.subject, attribute=attribute, value=one.values[0]) for one in facts]
    return said, _questions(draws, [facts[i] for i in draws.order(len(facts))[:8]])


def _names(draws: _Draws, room: int) -> tuple[list[str], list[Asked]]:
    """Names that stand for a value, each by way of the one before, and all of them asked for."""
    said, asked = [], []
    for _ in range(1 + draws.below(max(1, min(5, room // 200)))):
        chain, value = [draws.name() for _ in range(2 + draws.below(4))], draws.value()
        be = draws.of((" Let {} be {}.", " {} = {};", " We write {} for {}.", " {} is the same as {}.",
                       "\n{} := {}\n", " From here on {} means {}."))
        said += [be.format(name, before) for name, before in zip(chain, [value, *chain], strict=False)]
        asked += [(draws.of((f"\nAll that stand for {value}: ", f"\nWhich names lead back to {value}? These: ")),
                   f"{', '.join(chain)}."),
                  (draws.of((f"\nIn the end {chain[-1]} is ", f"\nFollow {chain[-1]} back to its value: ")),
                   f"{value}.")]
    return said, asked


def _tally(draws: _Draws, room: int) -> tuple[list[str], list[Asked]]:
    """A list of words, some of which it holds often, and those."""
    often = _different(lambda: draws.of(THINGS) if draws.below(2) else draws.name(),
                       min(3 + draws.below(6), 1 + room // 200))
    words = [draws.name() for _ in range(room // 8)]
    words += [word for word in often for _ in range(8 + draws.below(12))]
    separator = draws.of((", ", "\n- ", "; ", " "))
    said = [separator + words[i] for i in draws.order(len(words))]
    ask = draws.of(("\nThe words that came again and again: ", "\nWhich words does the list repeat most? These: "))
    return said, [(ask, f"{', '.join(often)}."),
                  *((f"\nHow often the list holds {word} was counted: ", f"{words.count(word)} times.")
                    for word in often[:2])]


EDITION = 2
"""Of what these rows say: a run goes on with the edition that it began with, or not at all."""
KINDS = {"notes": _notes, "register": _register, "names": _names, "tally": _tally}


def _kind(key: str) -> str:
    return _Draws(key).of(tuple(KINDS))


def _attempt(kind: str, key: str, attempt: int, size: int, encode: Callable[[Sequence[str]], list[np.ndarray]]
             ) -> tuple[_Draws, list[str], list[Asked], list[np.ndarray]]:
    """What is said and asked for in a row of `size` tokens, and the tokens of all of it; each attempt says less."""
    draws = _Draws(f"{key} {attempt}")
    said, asked = KINDS[kind](draws, max(_LEAST, size >> attempt))
    return draws, said, asked, encode([*said, *(f"{question}{answer}\n" for question, answer in asked)])


def asked_row(tokens: Int32[np.ndarray, " T"], key: str, encode: Callable[[Sequence[str]], list[np.ndarray]]
              ) -> Row | None:
    """A row of as many tokens that asks about itself, made of `tokens` (what the statements stand in, unless it is
    nothing but entries or sentences that repeat) and of what follows from `key`; None where it has no room for that.

    Some questions come between the middle and the end, the others at the end.
    """
    kind, size = _kind(key), tokens.size
    for attempt in range(_ATTEMPTS):
        draws, said, asked, pieces = _attempt(kind, key, attempt, size, encode)
        left = size - sum(map(len, pieces))
        if left >= 0:
            break
    else:
        return None
    filler, pieces = np.asarray(tokens), [np.asarray(ids, tokens.dtype) for ids in pieces]
    early = len(asked) // 3
    if kind in ("register", "tally"):  # one long list; what text there still is stands before it
        cuts = [left] * (len(said) + early)
    else:
        if draws.below(2):
            sentence = np.asarray(encode([draws.of(FILLERS)])[0], tokens.dtype)
            filler = np.tile(sentence, -(-size // sentence.size))
        middle = left // 2
        cuts = sorted(draws.below(middle + 1) for _ in said)
        cuts += sorted(middle + draws.below(left - middle + 1) for _ in range(early))
    filler = filler[:left]
    nothing = [np.zeros(ids.size, bool) for ids in pieces[: len(said)]]
    answers = [*nothing, *_of_answers(pieces[len(said):], [question for question, _ in asked], encode)]

    def laid(filler: np.ndarray, pieces: Sequence[np.ndarray]) -> np.ndarray:
        within = zip(pieces, [0, *cuts], cuts, strict=False)
        parts = [part for piece, begin, end in within for part in (filler[begin:end], piece)]
        return np.concatenate([*parts, filler[cuts[-1]:], *pieces[len(cuts):]])

    return Row(laid(filler, pieces), laid(np.zeros(filler.size, bool), answers))


def _of_answers(pieces: Sequence[np.ndarray], questions: Sequence[str],
                encode: Callable[[Sequence[str]], list[np.ndarray]]) -> list[Bool[np.ndarray, " t"]]:
    """Which tokens of each piece are of its answer: those after the last that it shares with its question alone."""
    found = []
    for ids, asked in zip(pieces, encode([question.rstrip() for question in questions]), strict=True):
        shared = min(len(asked), ids.size)
        same = np.asarray(asked[:shared]) == ids[:shared]
        found.append(np.arange(ids.size) >= (shared if same.all() else int(np.argmin(same))))
    return found


def _drawn(row: int, share: float, seed: int) -> bool:
    return int(raw_random(f"ask {seed} {row}", 1)[0]) < share * 2.0**64


def _key(row: int, seed: int) -> str:
    return f"asked {seed} {row}"


def rows_that_ask(rows: Iterable[int], size: int, share: float, seed: int,
                  encode: Callable[[Sequence[str]], list[np.ndarray]]) -> Iterator[int]:
    """Those of `rows`, of `size` tokens each, that `with_questions` fills, without filling them: the last attempt says
    least, so that it is soon known whether any fits."""
    for row in rows:
        if _drawn(row, share, seed):
            key = _key(row, seed)
            kind = _kind(key)
            if any(sum(map(len, _attempt(kind, key, attempt, size, encode)[-1])) <= size
                   for attempt in reversed(range(_ATTEMPTS))):
                yield row


def with_questions(batch: Batch, rows: range, share: float, seed: int,
                   encode: Callable[[Sequence[str]], list[np.ndarray]], weight: float = 1.0) -> Batch:
    """The batch with a `share` of its rows asking about themselves, each one document; `rows` are their numbers in the
    whole stream, which with the seed decide everything, so that a resumed run sees the same. Answers have the `weight`.
    """
    tokens, targets, weights = batch.tokens.copy(), batch.targets.copy(), batch.weights.copy()
    segments, positions = (None if x is None else x.copy() for x in (batch.segment_ids, batch.positions))
    for b, row in enumerate(rows):
        if not _drawn(row, share, seed):
            continue
        asked = asked_row(batch.tokens[b], _key(row, seed), encode)
        if asked is None:
            continue
        tokens[b], targets[b, :-1] = asked.tokens, asked.tokens[1:]
        weights[b, :-1], weights[b, -1] = np.where(asked.answers[1:], weight, 1.0), 0.0
        if segments is not None:
            segments[b], positions[b] = 1, np.arange(tokens.shape[1])
    return Batch(tokens, targets, weights, segments, positions)
