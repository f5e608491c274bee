"""Numbers as people write them: `12M` tokens, `code=2 math=0.5` for a mix."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal

from l2a_jax.errors import UserError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_COUNT = re.compile(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmbgt]?)\s*", re.IGNORECASE)


def parse_count(text: str | int, what: str = "a count") -> int:
    """`"12M"` -> 12,000,000. Decimal units k, M, B (or G) and T in either case; `1.5k`, `1e6`, `2_048`, `12,000` too.

    Raises `UserError` for anything else, for zero, for a fraction of one, and for more than 64 bits hold; `what` names
    the flag in the message.
    """
    match = _COUNT.fullmatch(str(text))
    # Decimal: a float would round the last digits of a long count, and make infinity of 1e999.
    try:
        value = Decimal(0) if match is None else Decimal(re.sub("[_,]", "", match[1])) * _UNITS[match[2].lower()]
    except ArithmeticError:  # an exponent beyond even its range
        value = Decimal(0)
    if not 1 <= value < 2**63 or value % 1:
        shown = repr(text) if len(str(text)) < 40 else f"{str(text)[:30]!r}..."
        raise UserError(f"{what} is {shown}; expected a whole number above 0 such as 500, 20k, 12M or 1.5B")
    return int(value)


def format_count(count: int) -> str:
    """12_345_678 -> `12.3M`: three digits at most, for people to read."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= 0.9995 * unit:  # 999,950 is 1M in three digits, not 1e+03k
            return f"{count / unit:.3g}{name}"
    return str(count)


def parse_weights(entries: str | Iterable[str], what: str = "a weight") -> dict[str, float]:
    """`["code=2", "math=0.5"]` or `"code=2,math=0.5"` -> {"code": 2.0, "math": 0.5}, for `open_data(weights=)`.

    Raises `UserError` for anything that is not NAME=NUMBER, and for a name given twice.
    """
    weights: dict[str, float] = {}
    for entry in [entries] if isinstance(entries, str) else entries:
        for part in filter(None, entry.split(",")):
            name, equals, number = part.strip().partition("=")
            try:
                weight = float(number)
            except ValueError:
                equals = ""
            if not (name and equals) or name in weights:
                raise UserError(f"{what} is {part!r}; expected NAME=NUMBER, each domain once, such as code=2 math=0.5")
            weights[name] = weight
    return weights
