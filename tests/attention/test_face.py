"""The face: refusals name their reason, `auto` takes the first backend that can and says so, shapes are checked."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax import attention, device
from l2a_jax.attention import api
from l2a_jax.attention.kernels import blocks
from tests import compiler


def arrays(width=16, dtype=jnp.float32, length=5):
    return [jnp.ones((1, length, heads, width), dtype) for heads in (2, 1, 1)]


def test_unknown_and_unable_backends_say_why():
    with pytest.raises(ValueError, match="expected one of"):
        attention.full(*arrays(), backend="fastest")
    with pytest.raises(NotImplementedError, match="head width 24 is none of"):
        attention.full(*arrays(24), backend="pallas_interpret")
    with pytest.raises(NotImplementedError, match="65 sinks are more than 64"):
        attention.local(*arrays(), window=2, sinks=65, backend="pallas_interpret")
    for call, reason in (
        (api.Call("routed", 1, 8, 2, 1, 64, "bfloat16"), "no per-token choice of keys"),
        (api.Call("full", 1, 8, 2, 1, 64, "float32"), "not float32"),
        (api.Call("local", 1, 8, 2, 1, 64, "bfloat16", 4, 2), "no attention sinks"),
        (api.Call("full", 1, 8, 2, 1, 64, "bfloat16", segmented=True), "packed rows"),
        (api.Call("full", 1, 8, 2, 1, 64, "bfloat16", placed=True), "a part of the tokens"),
        (api.Call("full", 1, 8, 2, 1, 100, "bfloat16"), "head widths"),
    ):
        from l2a_jax.attention import cudnn
        assert reason in cudnn.why_not(call)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the reasons of a machine without a GPU")
@pytest.mark.parametrize("backend", ("pallas", "cudnn"))
def test_gpu_backends_decline_without_a_gpu(backend):
    with pytest.raises(NotImplementedError, match="NVIDIA GPU"):
        attention.full(*arrays(), backend=backend)


def test_auto_says_what_it_picked_and_why(caplog):
    api.choose.cache_clear()
    with caplog.at_level(logging.INFO, "l2a_jax.attention"):
        attention.full(*arrays(24, length=7), backend="auto")
    expected = "backend xla" if jax.default_backend() != "gpu" else "passed over: pallas (head width 24"
    assert expected in caplog.text


@pytest.mark.parametrize("operation, width, window, first", [
    ("full", 64, None, "cudnn"), ("local", 64, 2_047, "pallas"), ("local", 64, 2_048, "cudnn"),
    ("local", 128, 1_023, "pallas"), ("local", 128, 1_024, "cudnn"), ("routed", 64, None, "pallas"),
])
def test_hopper_takes_what_measured_faster(monkeypatch, operation, width, window, first):
    call = api.Call(operation, 1, 16_384, 14, 2, width, "bfloat16", window)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="9.0")])
    assert api._order(call, "gpu")[0] == first
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="8.9")])
    assert api._order(call, "gpu")[0] == "pallas"


@pytest.mark.parametrize("capability, arch", [("8.0", "sm_89"), ("8.9", "sm_89"), ("9.0", "sm_90"), ("10.0", "sm_90"),
                                              ("12.0", "sm_89")])
def test_a_card_takes_the_tiles_that_its_shared_memory_holds(monkeypatch, capability, arch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert blocks.architecture() == arch


def test_the_kernels_decline_64_bit_mode():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="jax_enable_x64"):
        attention.full(*arrays(length=9), backend="pallas_interpret")


def test_a_gpu_of_another_maker_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="gfx942")])
    assert device.capability() == 0.0
    assert api._order(api.Call("full", 1, 64, 2, 2, 64, "bfloat16"), "gpu")[0] != "cudnn"


def test_shapes_that_do_not_fit_are_named():
    """Past the signatures, which the test run checks too, and users do not."""
    q, k, v = arrays()
    with pytest.raises(ValueError, match="must agree"):
        api._dispatch("full", "auto", q, k[:, :3], v[:, :3], segment_ids=None, places=None)
    with pytest.raises(ValueError, match="decisions is"):
        api._dispatch("routed", "auto", q, k, v, jnp.ones((1, 4), bool), segment_ids=None, places=None)
    with pytest.raises(ValueError, match="must have one dtype; got float32, bfloat16, float32"):
        api._dispatch("full", "auto", q, k.astype(jnp.bfloat16), v, segment_ids=None, places=None)
    with pytest.raises(ValueError, match="attention of nothing"):
        api._dispatch("full", "auto", q[:, :0], k[:, :0], v[:, :0], segment_ids=None, places=None)
    with pytest.raises(ValueError, match="or places must say whose queries these are"):
        api._dispatch("full", "auto", q[:, :3], k, v, segment_ids=None, places=None)
    with pytest.raises(ValueError, match="places is"):
        api._dispatch("full", "auto", q, k, v, segment_ids=None, places=jnp.arange(4))
    for places in ([2, 2, 3], [-1, 0, 1], [2, 3, 5]):
        with pytest.raises(ValueError, match="places must be strictly ascending numbers of the 5 tokens"):
            attention.full(q[:, :3], k, v, places=jnp.asarray(places))
    with pytest.raises(ValueError, match="window must be"):
        attention.local(q, k, v, window=0)


def test_long_sequences_need_no_square_memory_in_xla():
    """8,192 tokens: a score table of one head alone would be 256 MB."""
    shape = jax.ShapeDtypeStruct((1, 8_192, 4, 32), jnp.float32)
    keys = jax.ShapeDtypeStruct((1, 8_192, 2, 32), jnp.float32)
    decisions = jnp.asarray(np.random.default_rng(0).random((1, 8_192)) < 0.2)

    def loss(q, k, v):
        local = attention.local(q, k, v, window=256, sinks=4, backend="xla")
        return jnp.sum(local * attention.routed(q, k, v, decisions, backend="xla"))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, keys, keys).compile(compiler.AS_USERS)
    assert compiled.memory_analysis().temp_size_in_bytes < 100e6
