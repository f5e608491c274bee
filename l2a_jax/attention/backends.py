"""The backends by name: the one list that settings, flags and their help go by. Free of JAX, so that help is quick."""

from __future__ import annotations

from typing import Annotated

from l2a_jax.errors import UserError
from l2a_jax.fields import Choice

BACKENDS = ("reference", "xla", "cudnn", "pallas", "pallas_interpret")
CHOICES = ("auto", *BACKENDS)
Backend = Annotated[str, Choice(*CHOICES), "what computes attention"]


def check_name(backend: str, what: str = "attention backend", names: tuple[str, ...] = BACKENDS) -> None:
    """UserError, beginning with `what`, unless `backend` is one of `names`."""
    if backend not in names:
        raise UserError(f"{what} is {backend!r}; expected one of {', '.join(names)}")
