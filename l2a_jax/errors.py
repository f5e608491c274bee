"""Exceptions that mean "the input is wrong, not the program", and the sentence that other failures are told in.

Standard library alone: a command can say what is wrong before anything slow has been imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from types import ModuleType

FEW = 12
"""As many names as a message lists: one layer's tensors."""


class UserError(ValueError):
    """A mistake in what the user gave; the message names the file, key or flag and what was expected.

    Commands print it as one line and exit with status 2, without a traceback.
    """


class Unsupported(UserError, NotImplementedError):
    """What was asked for exists, but not for this device, dtype or shape; the message says which and why."""


class Missing(UserError):
    """A library that only some of the work needs is not installed; the message names the extra that brings it."""


def needs(module: str, extra: str, work: str, instead: str = "") -> ModuleType:
    """The module, imported now: what `work` needs and the base installation leaves out. `extra`: see `pyproject.toml`.

    Raises `Missing`; `instead` says what would do without it.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != library:  # it is there, and lacks something itself
            raise
        raise Missing(f"{work} needs {library}, which is not installed: pip install 'l2a-jax[{extra}]', or "
                      f"{library.replace('_', '-')} alone{instead}") from None


def few(names: Iterable[object], most: int = FEW) -> str:
    """Names for a message: the first of them, and how many more there are."""
    listed = [str(name) for name in names]
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more:,} more" if more > 0 else "")


def shown(value: object, most: int = 60) -> str:
    """A value for a message, cut to `most` letters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most - 3]}..."


def sentence(error: BaseException) -> str | None:
    """One line for a failure that is not the program's fault; None for one that deserves its traceback.

    These are `UserError`s, the operating system's refusals (a full disk, permissions, names too long) and memory.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        where = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        what = error.strerror or str(error) or type(error).__name__
        return f"{where}: {what}" if where else what
    if isinstance(error, MemoryError):
        return "this machine's memory is used up"
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(error, jax.errors.JaxRuntimeError):
        text = str(error).strip().splitlines()[0]
        if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
            return f"the device's memory is used up ({text}); ask for less at once (a smaller batch, shorter rows)"
    return None
