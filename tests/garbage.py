"""Python's collector of garbage while tests run: seldom, for what tracing leaves are a great many objects that stay."""

from __future__ import annotations

import gc


def seldom() -> None:
    """Its defaults walk every program that was ever traced, again and again. Called where modules are imported: they
    are never walked."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
