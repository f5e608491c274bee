"""Local, routed, mixed and full attention behind one face; see `api` for backends, `reference` for the semantics."""

from l2a_jax.attention.api import BACKENDS, both, full, local, mixed, routed

__all__ = ["BACKENDS", "both", "full", "local", "mixed", "routed"]
