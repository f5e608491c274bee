"""Attention of tokens that are dealt over devices: the rows and gradients of one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from l2a_jax.attention import pallas
from l2a_jax.config import L2AConfig
from l2a_jax.models.layer import Attention
from l2a_jax.research.speed.compiled import lower_for_cuda, mesh_of, triton_kernels
from l2a_jax.sharding.attention import striped
from tests.sharding.striped import LAYERS, OPERATIONS, PACKINGS, SHARDS

MEASURED = "tests.sharding.striped"


@pytest.mark.parametrize("packing", PACKINGS)
def test_shards_compute_the_rows_and_gradients_of_one_device(found, packing):
    told = found["operations"][packing]
    assert {*told["apart"]} == {*OPERATIONS} and max(told["apart"].values()) < 1e-6, told["apart"]
    # Keys and values are gathered, and what all shards give back to them is summed where its tokens are.
    assert told["collectives"] == ["all_gather", "reduce_scatter"]


@pytest.mark.parametrize("layer", LAYERS)
def test_shards_compute_the_layers_of_one_device(found, layer):
    assert found["layers"][layer] < 1e-6


def test_a_prompt_that_shards_read_is_the_prompt_that_one_device_reads(found):
    told = found["prompts"]
    assert max(told["full"], told["ring"]) < 1e-6 and told["logits"] < 3e-6 and told["same"], told


def test_the_imbalance_of_routed_rows_is_what_all_wait_for(found):
    """In one layer all shards have as many; in another one has all, as many times the mean as there are shards."""
    rows = 48 * 2 / SHARDS
    assert found["imbalance"] == pytest.approx((rows + rows) / (rows + rows / SHARDS))


def test_the_kernels_lower_for_cuda_under_a_mesh(monkeypatch):
    """Packed rows with sinks; keys and values are gathered once for all that look at them, and so are the ids."""
    monkeypatch.setattr(pallas, "machine_why_not", lambda: None)
    layer, mesh, whole = L2AConfig(window=256, sinks=4), mesh_of("sm_90", context=4), jax.sharding.PartitionSpec()

    def step(q, k, v, ids, decisions):
        attend = striped(Attention(layer, ids, "pallas"), "context")

        def rows(q, k, v):
            k, v = attend.keys(k, v)
            return attend.local(q, k, v) + attend.routed(q, k, v, decisions)

        out, pull = jax.vjp(rows, q, k, v)
        return pull(out)

    shapes = [jax.ShapeDtypeStruct((1, 1_024, heads, 64), jnp.bfloat16) for heads in (14, 2, 2)]
    shapes += [jax.ShapeDtypeStruct((1, 1_024), dtype) for dtype in (jnp.int32, jnp.bool_)]
    lowered = lower_for_cuda(jax.shard_map(step, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False), *shapes,
                             mesh=mesh)
    assert len(triton_kernels(lowered)) == 9  # three a path, a join of two of the routed one's, the sinks'
    text = lowered.as_text()
    assert (text.count("stablehlo.all_gather"), text.count("stablehlo.reduce_scatter")) == (3, 2)
