"""What a JSON file must hold for its reader: a shape that stands beside the reader, and a sentence where it is not so.

    PERPLEXITY = {"perplexity": float, "perplexity_95": [float, 2], "text": {"name": str}, "sparsity?": share}

A type is a value of it (`float`: any number). A dictionary is an object with at least these keys; one that ends in `?`
may be missing or null, and `*` is every key not named. A list holds the shape of each entry, and how many there are
where that is fixed. A function is a rule: it returns what was expected, where that is not so, else None.
"""

from __future__ import annotations

from typing import Any

from l2a_jax.errors import UserError, shown
from l2a_jax.files import EXPECTED, KINDS

_MOST_SHOWN = 40


def require(value: Any, shape: Any, where: str) -> None:
    """UserError, beginning with `where` (the file), on the first part of `value` that is not of its shape."""
    found = misfit(value, shape)
    if found is not None:
        raise UserError(f"{where}: {found}")


def require_length(value: Any, length: int, where: str, reason: str) -> None:
    """UserError, beginning with `where`, unless a list or text has as many entries as another part of the file says."""
    if len(value) != length:
        raise UserError(f"{where} has {len(value)} entries; expected {length}, {reason}")


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """The first part of `value` that is not of its shape, and what was expected there; None where all of it is."""
    if isinstance(shape, dict):
        return _object(value, shape, place)
    if isinstance(shape, list):
        return _list(value, *shape, place=place)
    expected = (shape(value) if not isinstance(shape, type)
                else None if _is(value, shape) else EXPECTED[shape])
    return None if expected is None else f"{place or 'the file'} is {_shown(value)}; expected {expected}"


def each(shape: Any) -> dict[str, Any]:
    """An object whose every value has this shape."""
    return {"*": shape}


def nullable(shape: Any) -> Any:
    """The shape, or null."""
    return lambda value: None if value is None or misfit(value, shape) is None else f"null, or {_meaning(shape)}"


def at_least(low: float, kind: type = int) -> Any:
    """A number of a kind from `low` on; one that is not finite is no whole number."""
    told = f"{EXPECTED[kind]}, at least {low}"
    return lambda value: None if _is(value, kind) and not value < low else told


def number(value: Any) -> str | None:
    """Any number, also as `files.plain` spells one that is not finite."""
    return None if _is(value, float) or value in ("nan", "inf", "-inf") else EXPECTED[float]


def share(value: Any) -> str | None:
    """A number from 0 to 1; NaN is one that was not measured."""
    return None if _is(value, float) and not (value < 0 or value > 1) else "a number from 0 to 1"


def some(shape: Any) -> Any:
    """A list of at least one entry of this shape."""
    def rule(value):
        if isinstance(value, list) and value and misfit(value, [shape]) is None:
            return None
        return f"a list of one or more entries, each {_meaning(shape)}"

    return rule


def one_of(*choices: Any) -> Any:
    """One of a few values, of their types too."""
    told = f"one of {', '.join(map(str, choices))}"
    return lambda value: None if any(value == one and type(value) is type(one) for one in choices) else told


def _object(value, shape, place):
    if not isinstance(value, dict):
        return f"{place or 'the file'} is {_shown(value)}; expected {KINDS[dict]}"
    named = {name.removesuffix("?"): (name, entry) for name, entry in shape.items() if name != "*"}
    for key, (name, entry) in named.items():
        inside = f"{place}.{key}" if place else key
        if value.get(key) is None and name.endswith("?"):
            continue
        if key not in value:
            return f"{inside} is missing; expected {_meaning(entry)}"
        found = misfit(value[key], entry, inside)
        if found is not None:
            return found
    for key in value.keys() - named.keys() if "*" in shape else ():
        found = misfit(value[key], shape["*"], f"{place}.{key}" if place else key)
        if found is not None:
            return found
    return None


def _list(value, entry, count=None, *, place):
    if not isinstance(value, list) or (count is not None and len(value) != count):
        many = KINDS[list] if count is None else f"a list of {count}"
        shown = f"a list of {len(value)}" if isinstance(value, list) else _shown(value)
        return f"{place or 'the file'} is {shown}; expected {many}"
    found = (misfit(one, entry, f"{place}[{index}]") for index, one in enumerate(value))
    return next((one for one in found if one is not None), None)


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _meaning(shape: Any) -> str:
    if isinstance(shape, type):
        return EXPECTED[shape]
    if isinstance(shape, dict):
        return KINDS[dict]
    return KINDS[list] if isinstance(shape, list) else shape(object())


def _shown(value: Any) -> str:
    return KINDS[type(value)] if isinstance(value, dict | list) or value is None else shown(value, _MOST_SHOWN)
