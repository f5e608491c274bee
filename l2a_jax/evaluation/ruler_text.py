"""RULER's prompts, exact to the token: a task's own generator at work in lm-eval (`ruler_source`), then one cut.

The generator is asked for a little more haystack than there is room for. What is too much is cut out, token by token,
where the haystack begins: prompt plus the tokens that the task may write are exactly the length asked for, the answer's
beginning (`The special magic number for ... is`) counted in. The cut moves on until it leaves every needle whole, and
its text, made tokens anew, as many tokens. A prompt depends on the seed, the task, the length, its number and what it
is made of, and on nothing else.

Three things differ from the published prompts. An item's prose begins at a sentence of its own, where all published
items share one text: only then are they independent. Its sentences end at `.`, `!` or `?`, where nltk's model is asked.
And what stands in for prose and words, where these are not at hand, is said in `Material.about`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import logging
import math
import random
import re
import string
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from l2a_jax.data.recipes import Hub
from l2a_jax.data.text import HUB_SECONDS, hub_records
from l2a_jax.errors import Missing, UserError, needs
from l2a_jax.evaluation.needle_text import hay_texts
from l2a_jax.evaluation.ruler_source import QUESTIONS, definitions, settings
from l2a_jax.files import read_json
from l2a_jax.weights.tokenizer import Tokenizer

log = logging.getLogger("l2a_jax.eval")
ESSAYS = Hub("baber/paul_graham_essays")
"""The published haystack of prose."""
EXAMPLE_TOKENS = 500
"""What lm-eval gives to the worked example of `vt`."""
NEAR, TRIES = 64, 400
"""Tokens after a cut that are looked at, and how many cuts are tried at most."""
MOST_WORDS = 500_000
"""Of prose that are read, whatever the lengths: a prompt of one length does not depend on the others."""
LEAST = 10
"""The shortest haystack, in lines, words or documents: every needle of a task needs a place of its own."""


class Hay(NamedTuple):
    """Prose as words. `until[i]`: tokens of the first i words; `starts`: the words that begin a sentence."""

    words: list[str]
    until: Int[np.ndarray, " W"]
    starts: Int[np.ndarray, " S"]


class Material(NamedTuple):
    """What prompts are made of. `words`: adjectives, nouns and all; `read`: the JSON file that an address names;
    `about`: what a result says of it all. `hay` is None where no task needs prose."""

    tokenizer: Tokenizer
    hay: Hay | None
    words: tuple[list[str], list[str], list[str]]
    read: Callable[[str], Any]
    about: dict[str, Any]


class Item(NamedTuple):
    """A prompt, and what should be written after it."""

    tokens: Int32[np.ndarray, " T"]
    answers: list[str]


class Draft(NamedTuple):
    """A prompt as text, with any haystack. The haystack is all but the first `before` and the last `after` characters.

    `kept`: what a cut must leave whole; `split`: where entries of a list part, of which the answers are the most
    frequent (None: no list).
    """

    text: str
    before: int
    after: int
    answers: list[str]
    kept: list[str]
    split: str | None = None


class Draws(random.Random):
    """A generator of its own under the names of the module `random`, in whose place it stands."""

    Random = random.Random


class Pairs(Sequence):
    """adjective-noun of every two, without the six millions of them in memory."""

    def __init__(self, first: list[str], second: list[str]):
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) * len(self.second)

    def __getitem__(self, index):
        return f"{self.first[index // len(self.second)]}-{self.second[index % len(self.second)]}"


def material(tokenizer: Tokenizer, tasks: Iterable[str], longest: int, haystack: tuple[str, ...] | None,
             task_data: Path | None) -> Material:
    """What prompts of up to `longest` tokens need. `haystack`: files, folders and globs of prose (None: the hub's
    essays); `task_data`: a folder of the files that questions are made of (None: where lm-eval gets them).

    Raises UserError where something cannot be had, or there is too little of it.
    """
    about: dict[str, Any] = {}
    words = _wonder_words()
    prose = words is None or any(kind(task) is _niah and _niah_settings(task)["type_haystack"] == "essay"
                                 for task in tasks)
    hay = None
    if prose:
        name = ESSAYS.path if haystack is None else ", ".join(haystack)
        texts = (hay_texts(haystack, "source") if haystack is not None else
                 (record["text"] for _, record in hub_records(ESSAYS, "--haystack FILE (any prose)")))
        hay = _hay(texts, tokenizer, longest, name)
        about["haystack"] = {"name": name, "published": haystack is None, "tokens": int(hay.until[-1])}
    if words is None:
        own = sorted({word for word in hay.words if re.fullmatch("[a-z]{4,10}", word)})
        if len(own) < LEAST:
            raise UserError(f"the haystack {name} has {len(own)} different words of 4 to 10 small letters; RULER's "
                            "prompts need more")
        words, about["words"] = (own, own, own), f"{len(own):,} of the haystack's own, wonderwords not being installed"
        log.info("RULER's words are %s", about["words"])
    else:
        about["words"] = f"wonderwords {metadata.version('wonderwords')}"
    return Material(tokenizer, hay, words, functools.partial(_read_questions, task_data), about)


def build(task: str, length: int, number: int, seed: int, made_of: Material, units: int) -> Item:
    """The prompt of an item. `units`: how much haystack to begin with (`calibrate`)."""
    ids, draft, _ = _draft(task, length, f"{seed} {task} {length} {number}", made_of, units)
    return Item(np.asarray(_cut(ids, draft, task, length, made_of.tokenizer), np.int32), draft.answers)


def calibrate(task: str, length: int, seed: int, made_of: Material) -> int:
    """How many units of haystack (tokens of prose, lines, words, documents) a prompt of a length needs, or a few more.

    Raises UserError where the length leaves no room for a haystack, or there is not enough of one.
    """
    sizes = 2 * LEAST, 6 * LEAST
    make = functools.partial(kind(task), task, made_of, length, key=f"{seed} {task} {length}")
    few, more = (len(_encode(made_of.tokenizer, make(units=size).text)) for size in sizes)
    cost = max((more - few) / (sizes[1] - sizes[0]), 0.1)
    room = length - settings(task).new_tokens - (few - sizes[0] * cost)
    if room < LEAST * cost:
        raise UserError(f"a length of {length} is too short for RULER's {task}: its prompt without a haystack and what "
                        f"it may write take about {length - room:.0f} tokens")
    units = math.ceil(room / cost)
    for _ in range(4):  # numbers grow longer as a list does: what the first lines cost is not what the last ones do
        ids, _, units = _draft(task, length, f"{seed} {task} {length} 0", made_of, units)
        surplus = len(ids) - length + settings(task).new_tokens
        units = max(LEAST, units - int(surplus / cost)) + 2  # other items draw longer words
        if surplus < 4 * cost:
            break
    return units


def kind(task: str) -> Callable[..., Draft]:
    """What makes the drafts of a task, by lm-eval's file."""
    return _KINDS[settings(task).maker[0]]


def _draft(task: str, length: int, key: str, made_of: Material, units: int) -> tuple[list[int], Draft, int]:
    """(tokens, draft, units) of at least as many tokens as the prompt's: more units where those given are too few."""
    target = length - settings(task).new_tokens
    while True:
        draft = kind(task)(task, made_of, length, key=key, units=units)
        ids = _encode(made_of.tokenizer, draft.text)
        short = target - len(ids)
        if short <= 0:
            return ids, draft, units
        units += math.ceil(units * short / max(len(ids), 1))


def _cut(ids: list[int], draft: Draft, task: str, length: int, tokenizer: Tokenizer) -> list[int]:
    surplus = len(ids) - (length - settings(task).new_tokens)
    opening = draft.text[: draft.before].rstrip(" ")  # a blank before a word is the word's
    at = len(_encode(tokenizer, opening.rstrip()))
    while len(tokenizer.decode(ids[:at])) < len(opening):
        at += 1
    rough = None
    for _ in range(TRIES):
        left = ids[:at] + ids[at + surplus :]
        text = tokenizer.decode(left)
        hay = text[draft.before : len(text) - draft.after]
        if not (all(one in hay for one in draft.kept) and _clear(hay, draft)):
            at += NEAR // 2
        elif not text.startswith(draft.text[: draft.before]):
            at += 1
        elif not _same(tokenizer, left[: at + NEAR], at + NEAR // 2):
            rough, at = rough or left, at + 1
        else:
            return left
        if not surplus or at + surplus > len(ids):
            break
    if rough is None:
        raise UserError(f"a length of {length} is too short for RULER's {task}: there is no prompt of it with a clear "
                        "answer")
    return rough


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Without a token before or after every text, as the needle has it."""
    return tokenizer.encode(text, add_special_tokens=False)


def _same(tokenizer: Tokenizer, ids: list[int], first: int) -> bool:
    """Whether the text of tokens gives them again, the `first` of them: at its end it may go on otherwise."""
    return _encode(tokenizer, tokenizer.decode(ids))[:first] == ids[:first]


def _clear(hay: str, draft: Draft) -> bool:
    """Whether the answers are the most frequent entries of a list; the dots of coded text are none."""
    if draft.split is None:
        return True
    counts = Counter(filter(None, re.split(draft.split, hay)))
    least = min(counts.pop(answer, 0) for answer in draft.answers)
    counts.pop("...", None)
    return least > max(counts.values(), default=0)


@functools.cache
def _niah_settings(task: str) -> dict[str, Any]:
    """What lm-eval gives its generator of needles for a task: caught where its function hands it over."""
    file, name = settings(task).maker
    found = definitions(file, ("TEMPLATE", name), DEFAULT_SEQ_LENGTHS=[0], get_tokenizer=lambda name: None,
                        resolve_tokenizer_name=lambda given: None, get_haystack=lambda type_haystack: None,
                        generate_samples=lambda haystack, **given: given, download_dataset=lambda made: next(made))
    given = found[name]()
    wanted = ("template", "type_haystack", "type_needle_k", "type_needle_v", "num_needle_k", "num_needle_v",
              "num_needle_q")
    defaults = {"num_needle_k": 1, "num_needle_v": 1, "num_needle_q": 1}
    out = {**defaults, **{name: given[name] for name in wanted if name in given}}
    return {**out, "num_needle_k": max(out["num_needle_k"], out["num_needle_q"])}


def _niah(task: str, made_of: Material, length: int, *, key: str, units: int) -> Draft:
    """Needles in prose (units: tokens of it), or in lines that repeat or are needles themselves."""
    draws, about = Draws(key), _niah_settings(task)
    made = ("generate_random_number", "generate_random_word", "generate_random_uuid", "generate_random")
    found = definitions("prepare_niah", ("RANDOM_SEED", "NEEDLE", "DEPTHS", *made, "generate_input_output",
                                         "get_haystack"), random=draws, uuid=uuid, np=np,
                        WORDS=Pairs(*made_of.words[:2]), cached_sent_tokenize=_sentences)
    if about["type_haystack"] == "essay":
        haystack = _stretch(made_of, units, draws)
        units = len(haystack)
    else:
        haystack = found["get_haystack"](about["type_haystack"])
    text, answers, _ = found["generate_input_output"](units, haystack, **about)
    question = text[text.rindex("\n") :]
    asked = re.fullmatch(r"\nWhat (is|are all) the (.+)\?", question)
    if asked is None:
        raise UserError(f"lm-eval asks {question[1:]!r} in RULER's {task}; expected 0.4.13's question")
    end = f"{settings(task).delimiter}The {asked[2]} {asked[1].split()[0]}"
    needle = found["NEEDLE"].partition("{")[0]
    ends = [text.index(f"{answer}.") + len(answer) + 1 for answer in answers]
    kept = [text[text.rindex(needle, 0, end) : end] for end in ends]
    return Draft(text + end, text.index("\n") + 1, len(question) + len(end), answers, kept)


def _vt(task: str, made_of: Material, length: int, *, key: str, units: int) -> Draft:
    """A chain of assignments in lines that repeat, after a worked example."""
    draws, whole = Draws(key), "sys_vartrack_w_noise_random"
    numbers = SimpleNamespace(random=SimpleNamespace(randint=draws.randrange))  # numpy's, with the same ends
    found = definitions("vt_utils", ("CONFIG", "TEMPLATE", "generate_chains", "generate_input_output", whole),
                        random=draws, string=string, np=numbers)
    usual = inspect.signature(found[whole]).parameters
    make = functools.partial(found["generate_input_output"], num_chains=usual["num_chains"].default,
                             num_hops=usual["num_hops"].default)
    tokens, noises, example = settings(task).new_tokens, 0, ""
    while True:
        noises += 5
        text, names = make(noises, is_icl=True)
        text += f" {' '.join(names)}\n\n"
        if example and len(_encode(made_of.tokenizer, text)) + tokens > EXAMPLE_TOKENS:
            break
        example = text
    text, answers = make(units)
    opening, _, question = found["TEMPLATE"].partition("{context}")
    before = len(example) + 2 + len(opening)
    whole = f"{example}\n\n{text}".strip()
    end = whole.rindex(question.partition("{")[0])
    kept = re.findall(r"VAR \w+ = (?:VAR )?\w+", whole[before:end])
    return Draft(whole, before, len(whole) - end, answers, kept)


def _words(task: str, made_of: Material, length: int, *, key: str, units: int) -> Draft:
    """A numbered list of words, ten of which stand in it ten times as often as the others."""
    draws, words = Draws(key), made_of.words[2]
    if units > len(words):
        raise UserError(f"RULER's {task} needs {units:,} different words at a length of {length}; there are "
                        f"{len(words):,}: {made_of.about['words']}")
    found = definitions("cwe_utils", ("CONFIG", "TEMPLATE", "get_example", "generate_input_output"), random=draws,
                        RNG=draws, WORDS=words)
    _, text, answers = found["generate_input_output"](units, length)
    return _listed(task, found, text, answers, r" *\d+\. ")


def _coded(task: str, made_of: Material, length: int, *, key: str, units: int) -> Draft:
    """Coded words, three of which are the most frequent."""
    zeta = needs("scipy.special", "research", f"RULER's {task}").zeta
    found = definitions("fwe_utils", ("CONFIG", "SEED", "TEMPLATE", "generate_input_output"), random=Draws(key),
                        string=string, np=np, zeta=zeta)
    uncounted = lambda text: SimpleNamespace(input_ids=())  # noqa: E731 it would take words away; we cut
    text, answers, _ = found["generate_input_output"](length, uncounted, num_words=units, vocab_size=length // 50)
    return _listed(task, found, text, answers, r"\s+")


def _listed(task: str, found: dict[str, Any], text: str, answers: list[str], split: str) -> Draft:
    begins = found["CONFIG"]["answer_prefix"]
    opening, _, rest = found["TEMPLATE"].partition("{context}")
    question = rest.removesuffix(begins)
    text = text.removesuffix(begins).strip()
    end = settings(task).delimiter + begins.strip()
    return Draft(text + end, len(opening), len(question) + len(end), answers, [], split)


def _questions(task: str, made_of: Material, length: int, *, key: str, units: int) -> Draft:
    """A question about documents, among others."""
    draws = Draws(key)
    reader = QUESTIONS[task]
    found = definitions("qa_utils", ("CONFIG", "SEED", "TEMPLATE", "DOCUMENT_PROMPT", reader, "generate_input_output"),
                        random=draws, download_json=made_of.read)
    asked, documents = _documents(reader, made_of.read)
    if units > len(documents):
        raise UserError(f"RULER's {task} needs {units:,} documents at a length of {length}; there are "
                        f"{len(documents):,}: give shorter lengths")
    index = draws.randrange(len(asked))
    text, answers = found["generate_input_output"](index, units, asked, list(documents))  # which it may shuffle
    opening, _, rest = found["TEMPLATE"].partition("{context}")
    end = settings(task).delimiter + found["CONFIG"]["answer_prefix"]
    after = len(rest.replace("{query}", asked[index]["query"])) + len(end)
    return Draft(text + end, len(opening), after, answers, [documents[one] for one in asked[index]["context"]])


_KINDS: dict[str, Callable[..., Draft]] = {"niah_utils": _niah, "vt_utils": _vt, "cwe_utils": _words,
                                           "fwe_utils": _coded, "qa_utils": _questions}


@functools.cache
def _documents(reader: str, read: Callable[[str], Any]) -> tuple[list[dict], list[str]]:
    addresses: list[str] = []
    found = definitions("qa_utils", (reader,), download_json=lambda address: addresses.append(address) or read(address))
    try:
        return found[reader]()
    except (LookupError, TypeError) as error:
        raise UserError(f"{addresses[-1].rpartition('/')[2]} holds no questions as {addresses[-1]} has them "
                        f"({error!r})") from error


def _read_questions(folder: Path | None, address: str) -> Any:
    name = address.rpartition("/")[2]
    if folder is not None:
        return read_json(folder / name, None)  # one holds an object, the other a list
    try:
        with urllib.request.urlopen(address, timeout=HUB_SECONDS) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise UserError(f"RULER's questions cannot be had from {address} ({type(error).__name__}); without a network "
                        f"give a folder that holds {name}: --task-data DIR") from error


def _wonder_words() -> tuple[list[str], list[str], list[str]] | None:
    """Adjectives, nouns and all words as lm-eval takes them; None where they are not installed."""
    try:
        library = needs("wonderwords", "eval", "--tasks ruler")
    except Missing:
        return None
    lists = library.RandomWord(enhanced_prefixes=False)._categories
    every = sorted({word for name in ("noun", "adjective", "verb") for word in lists[name]})
    return lists["adjective"], lists["noun"], every


def _hay(texts: Iterable[str], tokenizer: Tokenizer, longest: int, name: str) -> Hay:
    words = list(itertools.islice((word for text in texts for word in text.split()), MOST_WORDS))
    different = list(dict.fromkeys(words))
    # Byte-pair merging stays within a word, so that its tokens are the same wherever it stands.
    cost = dict(zip(different, map(len, tokenizer.encode_batch([f" {word}" for word in different],
                                                               add_special_tokens=False)), strict=True))
    until = np.cumsum([0, *(cost[word] for word in words)])
    if until[-1] < longest:
        raise UserError(f"the haystack {name} holds {until[-1]:,} tokens; prompts of {longest:,} need as many: give "
                        "more text or shorter lengths")
    ends = np.array([word.rstrip('"\'’”)').endswith((".", "!", "?")) for word in words])
    return Hay(words, until, np.append(0, np.flatnonzero(ends[:-1]) + 1))


def _stretch(made_of: Material, count: int, draws: Draws) -> list[str]:
    """So many tokens of prose, or a few more, from the beginning of a sentence."""
    hay = made_of.hay
    starts = hay.starts[hay.until[hay.starts] + count <= hay.until[-1]]
    if not len(starts):
        raise UserError(f"the haystack {made_of.about['haystack']['name']} holds {hay.until[-1]:,} tokens; a prompt "
                        f"needs {count:,}: give more text or shorter lengths")
    start = int(starts[draws.randrange(len(starts))])
    return hay.words[start : int(np.searchsorted(hay.until, hay.until[start] + count))]


def _sentences(text: str) -> list[str]:
    return re.split(r"""(?:(?<=[.!?])|(?<=[.!?]["'’”]))\s+""", text)
