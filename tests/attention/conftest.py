"""What the attention tests share beside `cases`."""

from __future__ import annotations

import pytest

from l2a_jax.attention import xla


@pytest.fixture
def backend(request, monkeypatch):
    """The backend's name; `xla_chunked` is xla made to take its long-sequence path at these small sizes."""
    if request.param == "xla_chunked":
        monkeypatch.setattr(xla, "PLAIN_LENGTH", 0)
        monkeypatch.setattr(xla, "CHUNK", 16)
        return "xla"
    return request.param
