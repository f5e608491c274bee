"""What a step holds, reckoned from shapes: of leaves exactly, dealt over devices, and of a mesh that is not there."""

from __future__ import annotations

import pytest

from l2a_jax import device
from l2a_jax.config import MODELS, L2AConfig
from l2a_jax.errors import UserError
from l2a_jax.models.params import abstract_params
from l2a_jax.runs.about import dry_run
from l2a_jax.runs.plan import estimate, make_plan
from l2a_jax.training.estimate import kept_of_token, weight_bytes
from l2a_jax.training.regimes import count_parameters
from l2a_jax.training.settings import resolve

SMALL = MODELS["qwen2.5-0.5b"]
MODEL = MODELS["qwen2.5-tiny"], L2AConfig()


def planned(mesh, **given):
    return make_plan(resolve("full_ft", {"mesh": mesh, "batch_size": 8, "leakage": 0.0, **given}),
                     present=False)


def test_leaves_are_dealt_over_the_devices_and_work_follows_the_rows():
    one, eight = (estimate(planned(mesh)) for mesh in ("data=1", "data=8"))
    for name in ("masters", "optimizer", "gradients"):
        assert getattr(eight, name) == pytest.approx(getattr(one, name) / 8, rel=0.01), name
    assert eight.kept == one.kept / 8 and one.frozen == 0
    assert one.masters == one.gradients == 4 * count_parameters(abstract_params(*MODEL))
    assert one.optimizer == pytest.approx(2 * one.masters, rel=0.01)


def test_what_is_frozen_has_no_gradients():
    held = estimate(make_plan(resolve("router_strict", {"mesh": "data=8", "batch_size": 8}), present=False))
    assert held.frozen > 20 * (held.masters + held.optimizer + held.gradients)


def test_a_mode_of_remat_keeps_what_it_names():
    """Per token and layer in bfloat16; what `training.memory` says of the 0.5B model."""
    layer, mlp, elementwise, none = (kept_of_token(SMALL, L2AConfig(), mode, 2)
                                     for mode in ("layer", "mlp", "elementwise", "none"))
    assert layer == 2 * SMALL.hidden_size and elementwise - mlp == 4 * SMALL.intermediate_size
    assert layer < mlp < elementwise < none < 100_000
    assert mlp < kept_of_token(SMALL, L2AConfig(share_attention=False), "mlp", 2)


def test_weights_of_a_layer_and_of_the_ends_are_the_model():
    one, ends = weight_bytes(SMALL, None, "bfloat16")
    assert SMALL.num_layers * one + ends == 2 * 494_032_768


def test_a_mesh_that_is_not_there_is_told_and_refused_by_its_parts(monkeypatch):
    settings = resolve("l2a_ft", {"mesh": "data=8", "batch_size": 8})
    told = dry_run(settings)
    assert "by shapes alone, an estimate on the high side: " in told and "on each of 8 devices: frozen weights" in told
    assert "mesh: data=8,context=1" in told
    monkeypatch.setattr(device, "memory_bytes", lambda: 1_000_000)
    with pytest.raises(UserError, match=r"the device has 0\.0 GB: frozen weights .*Ways out: .*--mesh"):
        dry_run(settings)
