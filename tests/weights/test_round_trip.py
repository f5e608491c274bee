"""Out and in again, bit for bit: plain and routed models, one file and several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny_qwen import BASE, FAMILIES, bfloat16, weights, write_folder

from l2a_jax.config import MODELS, L2AConfig, RopeScaling
from l2a_jax.models.params import init_params
from l2a_jax.sources import convert, load_pretrained, read_config, source_hash
from l2a_jax.weights import save_pretrained

ROUTED = {
    "shared": L2AConfig(window=8, sinks=2),
    "parallel": L2AConfig(share_attention=False, router_input="post_local", pruned_layers=(2,)),
    "a router that sees more": L2AConfig(window=8, sinks=2, router_sees=("position", "lse", "sink"), router_hidden=2),
    "sequential": L2AConfig(share_attention=False, topology="sequential", rope=RopeScaling("theta", 5.0), leakage=0.1),
}


def random_tree(config, l2a_config, dtype=jnp.bfloat16):
    """Every leaf different, also those that start as copies, zeros or ones."""
    tree = init_params(config, jax.random.key(0), l2a_config, dtype)
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten(
        jax.random.normal(key, leaf.shape, jnp.float32).astype(leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    )


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("family", ["tied", "untied", "many_groups", "wide_heads"])
@pytest.mark.parametrize("shards", [1, 4])
def test_hugging_face_to_hugging_face(tmp_path, family, shards):
    fields = FAMILIES[family]
    source = bfloat16(weights(fields))
    write_folder(tmp_path / "in", fields, source, shards)
    convert(tmp_path / "in", tmp_path / "out", shard_bytes=8_000 if shards > 1 else 10**9)
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == source.keys()
    assert all(written[name].tobytes() == source[name].tobytes() for name in source)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shards > 1)
    assert read_config(tmp_path / "out") == read_config(tmp_path / "in")


@pytest.mark.parametrize("layer", ROUTED)
@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
def test_a_routed_model_comes_back(tmp_path, layer, shard_bytes):
    config, l2a_config = MODELS["tiny"], ROUTED[layer]
    params = random_tree(config, l2a_config)
    save_pretrained(tmp_path / "out", params, config, l2a_config, shard_bytes=shard_bytes)
    model = load_pretrained(tmp_path / "out")
    assert (model.config, model.l2a_config, model.tokenizer) == (config, l2a_config, None)
    assert read_config(tmp_path / "out") == (config, l2a_config)
    assert_same_bits(model.params, params)
    assert model.params["layers"]["router"]["kernel"].dtype == jnp.float32


def test_the_local_set_has_the_plain_names(tmp_path):
    config, l2a_config = MODELS["tiny"], ROUTED["sequential"]
    params = random_tree(config, l2a_config)
    save_pretrained(tmp_path / "out", params, config, l2a_config)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        for suffix, name in (("", "local"), ("_global", "global")):
            stored = file.get_tensor(f"model.layers.2.self_attn.q_proj{suffix}.weight")
            np.testing.assert_array_equal(stored, params["layers"][f"attention_{name}"]["q"]["kernel"][2].T)
            stored = file.get_tensor(f"model.layers.2.input_layernorm{suffix}.weight")
            np.testing.assert_array_equal(stored, params["layers"][f"norm_{name}"]["scale"][2])


@pytest.mark.torch
def test_transformers_refuses_a_routed_model(tmp_path):
    """It would run the local set as plain full attention, without a word about what it left out."""
    import transformers

    config, l2a_config = MODELS["tiny"], ROUTED["shared"]
    save_pretrained(tmp_path / "out", random_tree(config, l2a_config), config, l2a_config)
    with pytest.raises(ValueError, match="l2a_qwen2"):
        transformers.AutoConfig.from_pretrained(tmp_path / "out")


def test_float32_and_mixed_leaves_keep_their_dtype(tmp_path):
    config = MODELS["tiny"]
    params = random_tree(config, ROUTED["shared"], jnp.float32)
    params["embed"]["embedding"] = params["embed"]["embedding"].astype(jnp.bfloat16)
    save_pretrained(tmp_path / "out", params, config, ROUTED["shared"])
    model = load_pretrained(tmp_path / "out", jnp.float32)
    assert_same_bits(model.params["layers"], params["layers"])
    np.testing.assert_array_equal(model.params["embed"]["embedding"], params["embed"]["embedding"].astype(jnp.float32))


def test_old_rotary_buffers_are_ignored(tmp_path):
    tensors = weights(BASE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    load_pretrained(write_folder(tmp_path, BASE, tensors))


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16, np.float16])
def test_dtype(tmp_path, dtype):
    params = load_pretrained(write_folder(tmp_path), dtype).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


def test_the_hash_follows_the_content(tmp_path):
    first, same = write_folder(tmp_path / "a"), write_folder(tmp_path / "b")
    assert source_hash(first) == source_hash(same) == load_pretrained(first).source_hash
    changed = weights(BASE)
    changed["model.norm.weight"][0] += 1
    assert source_hash(write_folder(tmp_path / "c", tensors=changed)) != source_hash(first)
    assert source_hash(write_folder(tmp_path / "d", {**BASE, "rms_norm_eps": 1e-5})) != source_hash(first)
