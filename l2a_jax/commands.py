"""What every command shares: its logging, and how it ends.

Standard library alone, and nothing of the package but `errors`: this must be in force before the slow imports begin,
so that an interruption in the middle of them ends as cleanly as one later.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from l2a_jax.errors import UserError, sentence

INTERRUPTED, BROKEN_PIPE = 130, 141
"""Exit statuses: 128 and the signal that a shell would name."""
_TALKATIVE = ("jax", "orbax", "httpx", "lm_eval", "datasets", "huggingface_hub")


def run(body: Callable[[list[str] | None], int | None], arguments: list[str] | None = None, *,
        interrupted: str = "interrupted", level: int = logging.INFO) -> int:
    """Exit status of a command whose work is `body(arguments)`.

    0, or what `body` returns. 2 after one line `error: ...` where the input is wrong or the machine refuses (see
    `errors.sentence`); anything else keeps its traceback. 130 after Ctrl-C, with the line `interrupted`, which says
    what is kept and how to go on. 141 where whoever read standard output is gone.
    """
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for name in ("absl", "asyncio"):  # through these Orbax logs what it raises, traceback and all
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    _outlive_readers()
    try:
        status = body(arguments)
        sys.stdout.flush()
        return status or 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _to_nowhere(sys.stdout)
        return BROKEN_PIPE
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2


class Parsed(argparse.Action):
    """Keeps what `parse(text, flag)` makes of a flag's text; argparse's own `type` drops a UserError's sentence."""

    def __init__(self, *args, parse: Callable[[str, str], Any], **kwargs):
        super().__init__(*args, **kwargs)
        self.parse = parse

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, self.parse(values, option_string))


def path(text: str, flag: str) -> Path:
    """A path, which an empty text (the current folder, to pathlib) is not. For `Parsed`."""
    if not text.strip():
        raise UserError(f"{flag} is empty; expected a path")
    return Path(text)


def spelled(script: str) -> str:
    """How the user would run a command of ours, such as `train/run.py`: by the name under which it is installed where
    this one was run so, else by its path."""
    ran = sys.argv[0]
    if ran.endswith(script):
        return f"python {ran}"
    module, installed = f".{script.removesuffix('.py').replace('/', '.')}", Path(ran).name.startswith("l2a-")
    points = metadata.entry_points(group="console_scripts") if installed else ()
    return next((point.name for point in points if point.module.endswith(module)), f"python {script}")


def say_idle(given: Iterable[str], rules: Iterable[tuple[bool, Iterable[str], str]]) -> None:
    """One line in the log for each setting of `given` that changes nothing here.

    A rule is (whether it holds, the names that then have no effect, why).
    """
    given = list(given)
    for holds, names, why in rules:
        for name in given:
            if holds and name in names:
                logging.getLogger("l2a_jax").warning("--%s has no effect here: %s", name.replace("_", "-"), why)


class _Outliving:
    """Standard error that goes on into nothing once its reader is gone: telling is no reason to stop working."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        self._outlive(self._stream.write, text)
        return len(text)

    def flush(self):
        self._outlive(self._stream.flush)

    def _outlive(self, work, *given):
        try:
            work(*given)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe's reader, a terminal
                raise
            _to_nowhere(self._stream)


def _outlive_readers() -> None:
    if not isinstance(sys.stderr, _Outliving) and sys.stderr is sys.__stderr__:
        sys.stderr = _Outliving(sys.stderr)
        for handler in logging.getLogger().handlers:
            if getattr(handler, "stream", None) is sys.__stderr__:
                handler.setStream(sys.stderr)


def _to_nowhere(stream) -> None:
    """Point the stream's descriptor at nothing, so that neither it nor the interpreter's last flush fails again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
