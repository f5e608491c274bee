"""What a device is told by, and how a result says where it was made."""

from __future__ import annotations

import datetime
import json
from types import SimpleNamespace

import jax
import pytest

from l2a_jax import device
from l2a_jax.provenance import installed, provenance, revision


@pytest.mark.parametrize("capability, expected", [("9.0", 9.0), ("8.9", 8.9), ("gfx942", 0.0)])
def test_a_card_has_a_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert device.capability() == expected


def test_what_is_no_gpu_has_the_one_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace()])
    assert device.capability() == 9.0 and device.capability(absent=0.0) == 0.0


@pytest.mark.parametrize("platform, dtype, tokens", [("cpu", "float32", 4_096), ("gpu", "bfloat16", 16_384)])
def test_what_suits_a_platform(monkeypatch, platform, dtype, tokens):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert (device.default_dtype(), device.batch_tokens(16_384)) == (dtype, tokens)


def test_an_accelerator_tells_its_own_memory(monkeypatch):
    stats = {"bytes_limit": 80_000_000_000, "peak_bytes_in_use": 3_000_000_000}
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
    assert device.memory_bytes() == 80_000_000_000 and device.peak_memory_gb() == 3.0
    stats.clear()
    assert 0 < device.peak_memory_gb() < device.memory_bytes() / 1e9


def test_provenance_is_plain_and_whole():
    found = json.loads(json.dumps(provenance()))
    assert set(found) == {"command", "date", "device", "versions", "revision"}
    assert datetime.datetime.fromisoformat(found["date"]).tzinfo is not None
    assert found["device"] == f"{len(jax.devices())} x {device.kind()}"
    assert {"python", "l2a_jax", "jax", "flax"} <= set(found["versions"])


def test_packages_that_are_not_there_are_left_out():
    assert set(installed("numpy", "no-such-package-of-ours")) == {"numpy"}


def test_a_revision_is_a_hash_or_nothing(monkeypatch, tmp_path):
    assert revision() is None or len(revision().removesuffix("-dirty")) == 40
    monkeypatch.setattr("l2a_jax.provenance.__file__", str(tmp_path / "l2a_jax" / "provenance.py"))
    revision.cache_clear()
    assert revision() is None  # an installed package, whatever repository it may lie in
    revision.cache_clear()
