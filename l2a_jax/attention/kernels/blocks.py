"""Tile sizes by (architecture, head width, element size) and kernel, and the shared memory that each needs."""

from __future__ import annotations

import jax

from l2a_jax.attention.kernels.plan import Block

SHARED_MEMORY = {"sm_89": 101_376, "sm_90": 232_448}  # bytes that one program may have (opt-in limits)
INTERPRET = {"forward": Block(32, 16, 4, 1), "backward_q": Block(16, 32, 4, 1, flat=True),
             "backward_kv": Block(16, 32, 4, 1), "sinks": Block(32, 0, 4, 1)}

_HALF = {
    ("sm_90", 64): {"forward": Block(128, 64, 4, 3), "backward_q": Block(128, 64, 8, 3),
                    "backward_kv": Block(64, 128, 8, 3), "sinks": Block(128, 0, 4, 1)},
    ("sm_90", 128): {"forward": Block(128, 64, 8, 3), "backward_q": Block(128, 64, 8, 2),
                     "backward_kv": Block(64, 128, 8, 2), "sinks": Block(64, 0, 4, 1)},
    ("sm_89", 64): {"forward": Block(128, 64, 4, 3), "backward_q": Block(64, 64, 4, 3),
                    "backward_kv": Block(64, 64, 4, 2), "sinks": Block(64, 0, 4, 1)},
    ("sm_89", 128): {"forward": Block(128, 32, 4, 2), "backward_q": Block(64, 32, 4, 2),
                     "backward_kv": Block(32, 64, 4, 2), "sinks": Block(64, 0, 4, 1)},
}
_SINGLE = {"forward": Block(32, 32, 4, 1), "backward_q": Block(32, 32, 4, 1),
           "backward_kv": Block(32, 32, 4, 1), "sinks": Block(32, 0, 4, 1)}


def table(arch: str, width: int, itemsize: int) -> dict[str, Block]:
    """The blocks of every kernel. Widths below 64 take the row of 64; float32 is for checking, not for speed."""
    if itemsize > 2:
        return _SINGLE
    return _HALF[arch, 64 if width <= 64 else 128]


def architecture() -> str:
    """The row of the table for the device at hand: a newer device takes Hopper's, an older one Ada's."""
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    return "sm_90" if float(capability) >= 9 else "sm_89"
