"""Mappings of memory, of which Linux gives a process so many and every compiled program takes a few: a worker that
keeps the programs of a whole run comes to the limit, and then ends inside a compilation instead of being told.
"""

from __future__ import annotations

import gc
import pathlib

import jax

HELD = pathlib.Path("/proc/self/maps")
LIMIT = pathlib.Path("/proc/sys/vm/max_map_count")


def held() -> int:
    """How many this process has; 0 where the system does not say."""
    return HELD.read_bytes().count(b"\n") if HELD.exists() else 0


def spare(share: float = 0.25) -> None:
    """Forget all compiled programs where more than that share of the limit is held; who needs one compiles it again."""
    if LIMIT.exists() and held() > share * int(LIMIT.read_text()):
        jax.clear_caches()
        gc.collect()
