"""The backends by name: the one list that settings, flags and their help go by. Free of JAX, so that help is quick."""

from __future__ import annotations

BACKENDS = ("reference", "xla", "cudnn", "pallas", "pallas_interpret")
CHOICES = ("auto", *BACKENDS)
HELP = f"attention: {', '.join(CHOICES)}"
