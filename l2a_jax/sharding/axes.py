"""What `--mesh` says: over how many devices rows (`data`) and the tokens of a row (`context`) are dealt."""

from __future__ import annotations

from typing import NamedTuple

from l2a_jax.errors import UserError, shown

EXPECTED = "data=N, context=N or both, such as data=2,context=4"


class Axes(NamedTuple):
    """Devices along each axis of a mesh."""

    data: int = 1
    context: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.context

    def __str__(self) -> str:
        return ",".join(f"{name}={count}" for name, count in self._asdict().items())


def parse(text: str, flag: str = "--mesh") -> Axes:
    """`"data=2,context=4"` as Axes; an axis that is not named has one device. UserError for anything else."""
    found: dict[str, int] = {}
    for entry in str(text).split(","):
        name, _, count = (part.strip() for part in entry.partition("="))
        if name not in Axes._fields or name in found or not count.isdecimal() or not 1 <= int(count[:9]) < 2**20:
            raise UserError(f"{flag} is {shown(text)}; expected {EXPECTED}")
        found[name] = int(count)
    return Axes(**found)


def written(text: str, flag: str = "--mesh") -> str:
    """A mesh as a run records it."""
    return str(parse(text, flag))
