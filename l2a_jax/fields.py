"""What a setting may be: its type, its range or choices, its unit and its help, said where it is declared.

    steps: Annotated[int | None, count(), Unit("steps"), "optimiser steps"] = None
    backend: Annotated[str, Choice("auto", "xla"), "attention backend"] = "auto"

`check` holds a value of such a dataclass to its declaration, for commands, for library calls and for files alike;
`flags` makes the command line of it. Free of JAX, so that help is quick.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import numbers
import struct
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from l2a_jax.errors import UserError, shown
from l2a_jax.files import EXPECTED

MOST = 2**31 - 1
"""The largest count: what an int32, which compiled programs count in, can hold."""
LONGEST = 2**30
"""The longest row, window or list: a position and a length, added, are still an int32."""
_ALSO = {int: numbers.Integral, float: numbers.Real, Path: (str, Path)}
"""What counts as a value of a type besides its own."""


@dataclasses.dataclass(frozen=True)
class Range:
    """A finite number between two ends, each included or not. `meaning` says what it is: "a share of the run"."""

    low: float
    high: float = math.inf
    low_included: bool = True
    high_included: bool = True
    meaning: str = ""

    def __contains__(self, value: Any) -> bool:
        if not self.low <= value <= self.high:
            return False
        # Programs compute in float32: what becomes an excluded end there, zero or infinity, is one.
        value = value if isinstance(value, numbers.Integral) else float32(float(value))
        return (value != math.inf and (self.low_included or value != self.low)
                and (self.high_included or value != self.high))

    def __str__(self) -> str:
        if self.high >= LONGEST:
            told = f"at least {self.low}" if self.low_included else f"above {self.low}"
            told += "" if self.high == math.inf else f", at most {self.high:,}"
        else:
            ends = {(True, True): "", (False, False): ", both excluded", (True, False): ", the latter excluded",
                    (False, True): ", the former excluded"}[self.low_included, self.high_included]
            told = f"between {self.low} and {self.high}{ends}"
        return f"{self.meaning}, {told}" if self.meaning else told

    def told(self, value: Any) -> str:
        """What is expected, to one who gave `value`: an end that only float32 makes of it needs a word more."""
        rounds = not isinstance(value, numbers.Integral) and self.low <= value <= self.high
        rounds = rounds and (value != self.low or self.low_included) and (value != self.high or self.high_included)
        more = ", and finite" if value == math.inf == self.high else ", in float32 too" if rounds else ""
        return f"{self}{more}"


def float32(value: float) -> float:
    """The number as programs see it: rounded to float32, where what is too small to be normal counts as 0."""
    try:
        rounded = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        rounded = math.copysign(math.inf, value)
    return 0.0 if abs(rounded) < 2.0**-126 else rounded


class Choice(tuple):
    """One of a few names."""

    def __new__(cls, *names: str):
        return super().__new__(cls, names)

    def __str__(self) -> str:
        return f"one of {', '.join(self)}"


@dataclasses.dataclass(frozen=True)
class Filled:
    """A text or a list with something in it."""

    what: str = "a text"

    def __contains__(self, value: Any) -> bool:
        return bool(value.strip() if isinstance(value, str) else value)

    def __str__(self) -> str:
        return f"{self.what} that is not empty"


@dataclasses.dataclass(frozen=True)
class Distinct(Filled):
    """A list with something in it, each entry once."""

    what: str = "a list"

    def __contains__(self, value: Any) -> bool:
        return bool(value) and len(set(value)) == len(value)

    def __str__(self) -> str:
        return f"{self.what} that is not empty, each entry once"


def at_least(low: float, meaning: str = "") -> Range:
    """A number of at least `low`. For counts, see `count`."""
    return Range(low, meaning=meaning)


def above(low: float, high: float = math.inf, meaning: str = "") -> Range:
    """A number above `low`, and at most `high`."""
    return Range(low, high, low_included=False, meaning=meaning)


def between(low: float, high: float, meaning: str = "") -> Range:
    """A number from `low` to `high`, both included."""
    return Range(low, high, meaning=meaning)


def count(low: int = 1, meaning: str = "") -> Range:
    """A whole number from `low` to what an int32 holds."""
    return Range(low, MOST, meaning=meaning)


def length(low: int = 1, meaning: str = "") -> Range:
    """A number of tokens, keys or files, from `low` to the longest that positions can say."""
    return Range(low, LONGEST, meaning=meaning)


RULES = (Range, Choice, Filled)
SEED = Range(0, 2**32 - 1)
"""JAX makes its keys of 32 bits of a seed: 2**32 would draw what 0 draws."""
DTYPE = Choice("float32", "bfloat16")
SHARE_OF_RUN = between(0, 1, "a share of the run")
PROBABILITY = between(0, 1, "a probability")


@dataclasses.dataclass(frozen=True)
class Unit:
    """What a number counts, or a text names."""

    name: str


@dataclasses.dataclass(frozen=True)
class Written:
    """How people write a value whose type does not say: `read(text, flag)` is the value, or raises UserError."""

    read: Callable[[str, str], Any]


class Mark(enum.Enum):
    """What else there is to say of a field. Without a mark it is a flag, and part of what a step is compiled from."""

    DIAL = "an argument of the compiled step, so that runs that differ in it alone share the program"
    OUTSIDE = "no matter of the compiled step"
    POSITIONAL = "a flag without its name"
    RECORDED = "no flag: added when the flags have been read"


def flag(name: str) -> str:
    """A field's name as the command line spells it."""
    return f"--{name.replace('_', '-')}"


@functools.cache
def declared(kind: type) -> dict[str, Any]:
    """The fields of a dataclass with their full annotations."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def said(hint: Any, kind: type) -> list[Any]:
    """What an annotation says of a field, of one kind: its help is the first `str`, its unit the first `Unit`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return [note for note in arguments[1:] if isinstance(note, kind)] + said(arguments[0], kind)
    if origin in (typing.Union, types.UnionType):
        return [note for option in arguments for note in said(option, kind)]
    return []


def check(settings: Any, spell: Callable[[str], str] = flag, names: Iterable[str] | None = None,
          error: type[ValueError] = UserError) -> None:
    """`error` on the first field (of `names`, or all) whose value is not what its declaration says.

    `spell` is how a field is named to the user: as a flag, or as a key of a file.
    """
    hints = declared(type(settings))
    for name in hints if names is None else names:
        check_value(getattr(settings, name), hints[name], spell(name), error)


def check_given(given: Mapping[str, Any], kind: type) -> None:
    """UserError on the first of some fields of the dataclass `kind` whose value is not what is declared there."""
    for name, value in given.items():
        check_value(value, declared(kind)[name], flag(name))


def check_value(value: Any, hint: Any, name: str, error: type[ValueError] = UserError) -> None:
    """`error` naming `name` where `value` is not what the annotation `hint` says."""
    wrong = problem(value, hint)
    if wrong is not None:
        raise error(f"{name} is {shown(value)}; expected {wrong}")


def problem(value: Any, hint: Any) -> str | None:
    """What was expected of `value`, where it is not what the annotation `hint` says; else None."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        inner, *rules = typing.get_args(hint)
        rules = [rule for rule in rules if isinstance(rule, RULES)]
        wrong = problem(value, inner)
        if wrong is not None or value is None:
            return wrong if wrong is None or not rules else f"{wrong}, {rules[0]}"
        broken = next((rule for rule in rules if value not in rule), None)
        return broken.told(value) if isinstance(broken, Range) else None if broken is None else str(broken)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        wrong = [problem(value, option) for option in options]
        if None in wrong:
            return None
        return next(told for told, option in zip(wrong, options, strict=True) if option is not type(None))
    if origin is tuple:
        if not isinstance(value, tuple):
            return "a list"
        element = typing.get_args(hint)[0]
        wrong = [told for told in (problem(entry, element) for entry in value) if told is not None]
        return f"a list, each {wrong[0]}" if wrong else None
    if hint is Any or hint is None:
        return None
    kind = origin or hint
    fits = isinstance(value, _ALSO.get(kind, kind)) and (kind not in (int, float) or not isinstance(value, bool))
    return None if fits else EXPECTED.get(kind, kind.__name__)
