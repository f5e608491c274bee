"""Shared set-up: jaxtyping signatures are checked, and what a machine lacks is skipped with the reason."""

from __future__ import annotations

import importlib.util
import os

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook finds it by name)

# Every annotated shape of the library is checked while tests run; users pay nothing for it.
install_import_hook("l2a_jax", "tests.typecheck.check")

import jax  # noqa: E402
import pytest  # noqa: E402


def _lacking(marker: str) -> str | None:
    if marker == "gpu":
        return None if jax.default_backend() == "gpu" else "needs a CUDA device"
    if marker == "torch":
        found = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
        return None if found else "needs torch and transformers: pip install -e .[parity]"
    if marker == "weights":
        have = os.environ.get("L2A_TEST_GGUF") and os.environ.get("L2A_TEST_DATA")
        return None if have else "needs L2A_TEST_GGUF (a Qwen2.5 .gguf) and L2A_TEST_DATA (a folder of texts)"
    if marker == "network":
        return None if os.environ.get("L2A_TEST_NETWORK") else "needs a model hub: set L2A_TEST_NETWORK=1"
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        for marker in item.iter_markers():
            reason = _lacking(marker.name)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
