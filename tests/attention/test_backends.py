"""One suite for all backends: values and gradients against the oracle, causality, determinism."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, value_and_gradients

from l2a_jax.attention import xla

BACKENDS = ("xla", "xla_chunked", "cudnn", pytest.param("pallas", marks=pytest.mark.gpu), "pallas_interpret")


@pytest.fixture
def backend(request, monkeypatch):
    """The backend's name; `xla_chunked` is xla made to take its long-sequence path at these small sizes."""
    if request.param == "xla_chunked":
        monkeypatch.setattr(xla, "PLAIN_LENGTH", 0)
        monkeypatch.setattr(xla, "CHUNK", 16)
        return "xla"
    return request.param


def run(case, backend, *args):
    """`value_and_gradients`, skipping what the backend openly declines."""
    try:
        return value_and_gradients(case, backend, *args)
    except NotImplementedError as error:
        pytest.skip(str(error))


def assert_close(actual, expected, tolerance):
    """Relative errors in the 2-norm. The floor is for gradients that are exactly 0 (a window of one key)."""
    floor = 0.1 * np.linalg.norm(np.asarray(expected[0], np.float64)) + 1e-6
    for name, one, other in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.isfinite(one).all(), name
        error = np.linalg.norm(one - other) / max(np.linalg.norm(other), floor)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_values_and_gradients_are_the_oracles(backend, case):
    inputs = case.inputs()
    assert_close(run(case, backend, *inputs), value_and_gradients(case, "reference", *inputs), 3e-6)
