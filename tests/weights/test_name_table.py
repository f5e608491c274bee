"""The table of names: one-to-one, complete, and the release's names for the second attention set."""

import dataclasses

import pytest
from tiny_qwen import FAMILIES, shapes

from l2a_jax.config import MODELS, L2AConfig
from l2a_jax.models.params import map_with_path, param_shapes
from l2a_jax.weights.hf_config import parse_config
from l2a_jax.weights.names import TABLE, tensor_map

LAYERS = {
    "plain": None,
    "shared": L2AConfig(),
    "parallel": L2AConfig(share_attention=False),
    "sequential": L2AConfig(share_attention=False, topology="sequential"),
    "seeing": L2AConfig(router_sees=("position", "lse", "sink"), router_hidden=2),
}


def paths(config, l2a_config):
    found = set()
    map_with_path(lambda path, _: found.add(path), param_shapes(config, l2a_config))
    return found


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("model", ["tiny", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"])
def test_every_leaf_is_filled_once_per_layer(model, layer):
    config = MODELS[model]
    places = tensor_map(config, LAYERS[layer])
    found = paths(config, LAYERS[layer])
    assert {place.path for place in places.values()} == found
    stacked = {path for path in found if path.startswith("layers/")}
    assert len(places) == len(stacked) * config.num_layers + len(found - stacked)


def test_the_table_has_a_row_for_every_leaf_and_no_other():
    untied = dataclasses.replace(MODELS["tiny"], tie_embeddings=False)
    assert set(TABLE) == set().union(*(paths(untied, layer) for layer in LAYERS.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_hugging_face(family):
    config, _ = parse_config(FAMILIES[family])
    assert {name: place.shape for name, place in tensor_map(config).items()} == shapes(FAMILIES[family])


@pytest.mark.parametrize("layer", ["parallel", "sequential"])
def test_the_second_set_has_the_names_of_the_release(layer):
    config = MODELS["tiny"]
    added = {
        name.removeprefix("model.layers.0.")
        for name in tensor_map(config, LAYERS[layer]).keys() - tensor_map(config).keys()
        if ".0." in name
    }
    assert added == {
        "input_layernorm_global.weight",
        "self_attn.sigmoid_linear.weight",
        *(f"self_attn.{p}_proj_global.weight" for p in "qkvo"),
        *(f"self_attn.{p}_proj_global.bias" for p in "qkv"),
    }
    router = tensor_map(config, LAYERS[layer])["model.layers.0.self_attn.sigmoid_linear.weight"]
    assert router.shape == (1, config.hidden_size)


def test_a_shared_set_adds_the_router_alone():
    config = MODELS["tiny"]
    added = tensor_map(config, LAYERS["shared"]).keys() - tensor_map(config).keys()
    assert added == {f"model.layers.{i}.self_attn.sigmoid_linear.weight" for i in range(config.num_layers)}
