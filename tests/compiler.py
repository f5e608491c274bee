"""How programs are compiled while tests run: quickly, for most run a few times on a few numbers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib.metadata import version

_OLD = version("jaxlib").startswith("0.10.")
# One module for all kernels of a program: to split them over threads costs more than it gains where every core has
# tests of its own. XLA writes a kernel of each fusion through passes that take most of a compilation; the second flag
# leaves them out. A flag that XLA does not know ends the process, and jaxlib 0.12 does not know that one.
QUICK = ("--xla_cpu_parallel_codegen_split_count=1", *(["--xla_cpu_use_fusion_emitters=false"] if _OLD else []))

# Options of a program that is read after it was compiled: its fusions are those that users get.
AS_USERS = {"xla_cpu_use_fusion_emitters": True} if _OLD else {}


def flags(quick: bool) -> dict[str, str]:
    """XLA_FLAGS with QUICK or without it; it is read once, when a process first compiles."""
    rest = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in QUICK]
    return {"XLA_FLAGS": " ".join([*rest, *QUICK] if quick else rest)}


@contextlib.contextmanager
def well() -> Iterator[None]:
    """Here programs run long enough to be compiled well."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
