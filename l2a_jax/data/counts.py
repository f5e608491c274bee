"""Numbers as people write them: `12M` tokens, layers `3,5-8`."""

from __future__ import annotations

import re
from decimal import Decimal

from l2a_jax.errors import UserError, shown

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
        raise UserError(f"{what} is {shown(text)}; expected a whole number above 0 such as 500, 20k, 12M or 1.5B")
    return int(value)


def parse_layers(text: str, flag: str = "--prune-layers") -> tuple[int, ...]:
    """The layers that a flag names, such as "3,5-8". Raises UserError on anything else."""
    found = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        whole = first.isdecimal() and (last or first).isdecimal() and len(last or first) <= 6
        if not whole or int(last or first) < int(first):
            raise UserError(f"{flag} {text!r}: {part.strip()!r} is no layer; expected numbers and ranges, such as "
                            "3,5-8")
        found |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def parse_shares(text: str, flag: str) -> tuple[float, ...]:
    """Numbers with commas, such as "1" or "0,0.25,1". Raises UserError on anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} is {text!r}; expected shares with commas, such as 0,0.25,1") from None


def format_count(count: int) -> str:
    """12_345_678 -> `12.3M`: three digits at most, for people to read."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= 0.9995 * unit:  # 999,950 is 1M in three digits, not 1e+03k
            return f"{count / unit:.3g}{name}"
    return str(count)
