"""What `--distributed` says: how the processes of a run find each other."""

from __future__ import annotations

from typing import NamedTuple

from l2a_jax.errors import UserError, shown

FLAG = "--distributed"
EXPECTED = "auto, or HOST:PORT,INDEX,COUNT: where process 0 listens, the number of this process from 0, and of all"


class Cluster(NamedTuple):
    """Where process 0 listens, which process this is, and how many there are."""

    address: str
    index: int
    count: int


def parse(text: str, flag: str = FLAG) -> Cluster | None:
    """What `--distributed` says; None: JAX is to find out. UserError for anything else."""
    if text == "auto":
        return None
    address, *numbers = (part.strip() for part in text.split(","))
    host, _, port = address.rpartition(":")
    if not host or not all(part.isdecimal() and len(part) < 7 for part in (port, *numbers)) or len(numbers) != 2:
        raise UserError(f"{flag} is {shown(text)}; expected {EXPECTED}")
    index, count = map(int, numbers)
    if index >= count:
        raise UserError(f"{flag} numbers this process {index} of {count}; expected 0 to {max(count - 1, 0)}")
    return Cluster(address, index, count)
