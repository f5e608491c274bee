"""Shared set-up: jaxtyping signatures are checked, and what a machine lacks is skipped with the reason."""

from __future__ import annotations

import importlib.util
import os
import pathlib
from importlib.metadata import version

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook finds it by name)
from tests import compiler, garbage

os.environ.update(compiler.flags(quick=True))  # subprocesses inherit it
# Every annotated shape of the library is checked while tests run; users pay nothing for it.
install_import_hook("l2a_jax", "tests.typecheck.check")

import jax  # noqa: E402
import pytest  # noqa: E402

from tests import mappings  # noqa: E402

if jax.default_backend() == "cpu":
    # Programs run a few times on a few numbers: compiling them well would take most of the time, and compiling them
    # again in every worker, subprocess and run much of the rest. The cache is left out with jaxlib 0.12, which now and
    # then ended the process where it wrote or read an entry, perhaps for want of mappings (tests/mappings.py).
    cache = pathlib.Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"
    for name, value in (("jax_disable_most_optimizations", True), *(
            [] if version("jaxlib").startswith("0.12.") else [
                ("jax_compilation_cache_dir", str(cache)), ("jax_persistent_cache_min_compile_time_secs", 0.05)])):
        if name.upper() not in os.environ:
            os.environ[name.upper()] = str(int(value) if isinstance(value, bool) else value)
            jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="module")
def spared():
    """After every file of tests."""
    yield
    mappings.spare()


@pytest.fixture
def optimised():
    """For a test whose programs run long enough to be compiled well."""
    with compiler.well():
        yield


def _lacking(marker: str) -> str | None:
    if marker == "gpu":
        return None if jax.default_backend() == "gpu" else "needs a CUDA device"
    if marker == "torch":
        lacking = [name for name in ("torch", "transformers", "accelerate") if not importlib.util.find_spec(name)]
        return f"needs {' and '.join(lacking)}: pip install -e .[parity]" if lacking else None
    if marker == "weights":
        have = os.environ.get("L2A_TEST_GGUF") and os.environ.get("L2A_TEST_DATA")
        return None if have else "needs L2A_TEST_GGUF (a Qwen2.5 .gguf) and L2A_TEST_DATA (a folder of texts)"
    if marker == "network":
        return None if os.environ.get("L2A_TEST_NETWORK") else "needs a model hub: set L2A_TEST_NETWORK=1"
    return None


# Files with tests of half a minute and more: they begin first, so that at the end no worker is left alone with one.
LONG = ("frozen/test_frozen.py", "training/test_demo.py", "training/test_resume.py", "training/test_control.py",
        "sharding/test_steps.py", "tests/test_guides.py")


def pytest_collection_finish():
    garbage.seldom()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))
    for item in items:
        for marker in item.iter_markers():
            reason = _lacking(marker.name)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
