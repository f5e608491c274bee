"""Local, routed, mixed and full attention behind one face; see `api` for backends, `reference` for the semantics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from l2a_jax.attention.backends import BACKENDS

if TYPE_CHECKING:
    from l2a_jax.attention.api import both, full, local, local_with_lse, mixed, routed

__all__ = ["BACKENDS", "both", "full", "local", "local_with_lse", "mixed", "routed"]


def __getattr__(name: str) -> Any:  # with JAX, at its first use
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from l2a_jax.attention import api

    globals()[name] = found = getattr(api, name)
    return found
