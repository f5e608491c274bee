"""Evaluation over a mesh: the numbers, decisions and texts of one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from l2a_jax.attention import pallas
from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.errors import UserError
from l2a_jax.evaluation.evaluate import set_up
from l2a_jax.evaluation.options import Options
from l2a_jax.inference import generate
from l2a_jax.models.params import abstract_params
from l2a_jax.research.speed.compiled import lower_for_cuda, mesh_of, triton_kernels
from tests.sharding.evaluated import CASES, MESHES

MEASURED = "tests.sharding.evaluated"


@pytest.mark.parametrize(("axes", "name"), [(axes, of.__name__) for axes, cases in CASES.items() for of in cases])
def test_a_mesh_finds_what_one_device_finds(found, axes, name):
    told = dict(found[axes][name])
    assert told.pop("same")
    assert 0.2 < told.pop("local", 0.5) < 0.8  # routing that could differ
    assert len(set(told.pop("lengths", (0, 1)))) > 1  # rows that end at different times
    assert all(difference < 1e-6 for difference in told.values()), told


def test_the_command_writes_what_it_writes_on_one_device(found):
    told = found["command"]
    assert told["nll"] < 1e-5  # they are rounded to four places
    assert told["same"][0] == told["same"][1] and told["ranks"][0] == told["ranks"][1]
    assert told["mesh"] == MESHES[1]


@pytest.mark.parametrize(("mesh", "why"), [
    ("data=4096", "--mesh data=4096,context=1 takes 4096 devices; this machine has"),
    ("rows=2", "--mesh is 'rows=2'; expected data=N, context=N or both"),
])
def test_a_mesh_that_cannot_be_is_refused_before_weights_are_read(mesh, why):
    with pytest.raises(UserError, match=why):
        set_up(Options("qwen2.5-tiny", ("perplexity",), mesh=mesh))


def test_rows_are_generated_for_cuda_without_a_word_between_devices(monkeypatch):
    """So one device goes on while another has ended."""
    monkeypatch.setattr(pallas, "machine_why_not", lambda: None)
    config, layer = ModelConfig(64, 128, 128, 1, 2, 1, 64, max_positions=1_024), L2AConfig(window=64, sinks=4)
    mesh = mesh_of("sm_90", data=2, context=1)
    tokens, lengths, options, settings = generate.request(config, layer, [[1] * 200, [2] * 3], max_new_tokens=4,
                                                          backend="pallas")
    options = options._replace(mesh=mesh)
    shapes = jax.eval_shape(lambda *given: given, abstract_params(config, layer, jnp.bfloat16), tokens, lengths,
                            settings)
    lowered = lower_for_cuda(lambda *given: generate._generate.__wrapped__(*given, options, 16), *shapes, mesh=mesh)
    text = lowered.as_text()
    assert triton_kernels(lowered)
    assert not [name for name in ("all_gather", "all_reduce", "reduce_scatter", "collective_permute", "all_to_all")
                if f"stablehlo.{name}" in text]
