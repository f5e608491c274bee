"""`config.json` in both spellings, its defaults, and what is refused."""

import dataclasses
import json

import pytest
from tiny_qwen import BASE, FAMILIES

from l2a_jax.config import MODELS, L2AConfig, RopeScaling
from l2a_jax.errors import UserError
from l2a_jax.weights.hf_config import config_fields, parse_config

OLD = {key: value for key, value in BASE.items() if key != "rope_theta"}


def rope(fields):
    config, _ = parse_config(fields)
    return config.rope_theta, config.rope


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 1e4}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        ),
        (
            {"rope_theta": 1e6,
             "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e6},
        ),
    ],
)
def test_both_spellings_mean_the_same(old, new):
    assert rope({**OLD, **old}) == rope({**OLD, "rope_parameters": new})


def test_rope_values():
    assert rope({**OLD, "rope_theta": 5e5}) == (5e5, RopeScaling())
    assert rope(OLD) == (10_000.0, RopeScaling())
    assert rope(FAMILIES["linear"])[1] == RopeScaling("linear", 2.5)
    assert rope(FAMILIES["yarn"])[1] == RopeScaling("yarn", 4.0, 32)
    assert rope(FAMILIES["yarn_parameters"]) == (20_000.0, RopeScaling("yarn", 4.0, 32, 16.0, 2.0, 1.3))


def test_absent_fields_take_the_defaults_of_transformers():
    required = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads")
    config, l2a_config = parse_config({key: BASE[key] for key in required})
    assert (config.num_kv_heads, config.head_dim) == (4, 12)
    assert (config.rms_norm_eps, config.max_positions, config.tie_embeddings) == (1e-6, 32_768, False)
    assert l2a_config is None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("l2a_config", [None, L2AConfig(pruned_layers=(1,), rope=RopeScaling("theta", 5.0))])
def test_config_round_trip(name, l2a_config):
    for scaling in (RopeScaling(), RopeScaling("linear", 3.0), RopeScaling("yarn", 4.0, 99, 20.0, 2.0, 1.1)):
        config = dataclasses.replace(MODELS[name], rope=scaling)
        fields = json.loads(json.dumps(config_fields(config, l2a_config)))
        assert parse_config(fields) == (config, l2a_config)


def test_a_stretched_base_is_written_as_the_larger_base():
    config = dataclasses.replace(MODELS["tiny"], rope=RopeScaling("theta", 5.0))
    assert rope(config_fields(config)) == (5 * config.rope_theta, RopeScaling())


def test_a_window_that_is_switched_off_is_ignored():
    assert parse_config({**BASE, "sliding_window": 16, "max_window_layers": 0}) == parse_config(BASE)
    assert parse_config({**BASE, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model of type 'llama'; expected 'qwen2'"),
        ({"model_type": "qwen3"}, "model of type 'qwen3'"),
        ({"model_type": None}, "model of type None"),
        ({"vocab_size": None, "hidden_size": None}, "misses vocab_size, hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {}}, "quantised weights"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
        ({"hidden_size": "48", "num_hidden_layers": 3.5}, "hidden_size '48', num_hidden_layers 3.5; expected whole"),
        ({"layer_types": 3}, "unusable"),
        ({"use_sliding_window": True, "max_window_layers": "x"}, "unusable"),
        ({"rope_theta": "wide"}, "unusable"),
        ({"rope_scaling": "wide"}, "unusable"),
        ({"rms_norm_eps": None}, "unusable"),
        ({"rms_norm_eps": float("nan")}, "unusable: rms_norm_eps is nan; expected between 0 and 1"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; expected above 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1e400}}, "unusable"),
        ({"num_attention_heads": 0}, "expected at least 1"),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding-window attention"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding-window attention"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "scales RoPE by 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1}}, "scales RoPE by 'llama3'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"max_position_embeddings": 0}, "max_position_embeddings 0; expected at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0; expected at least 1"),
        ({"head_dim": 0, "vocab_size": -1}, "vocab_size -1, head_dim 0; expected at least 1"),
        ({"vocab_size": True}, "vocab_size True; expected whole numbers"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'; expected a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e9}}, "rope factor is 1000000000.0; expected between 1 and"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "rope factor is 0.0"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "RoPE factor is '4'; expected a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16.5}}, "whole number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0}}, "beta_fast"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 0}}, "attention_factor is 0"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "by 'linear and yarn'"),
        ({"rope_scaling": {"factor": 4.0}}, "the factor 4.0 without saying how to scale"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "attention_factor": 1.2}}, "with attention_factor, which"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "low_freq_factor": 1}}, "with low_freq_factor, which"),
        ({"rope_scaling": {"type": "default", "mrope_section": [2, 2, 2]}}, "with mrope_section, which"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}, "with full_attention, which"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}, "rope_theta": None},
         "gives rope_theta in rope_parameters, which rope_scaling replaces"),
        ({"partial_rotary_factor": 0.5}, "has partial_rotary_factor 0.5, which this library does not compute; expect"),
        ({"original_max_position_embeddings": 16}, "has original_max_position_embeddings, which this library does not"),
        ({"rope_interleave": True}, "has rope_interleave, which this library does not know"),
        ({"use_mrope": True}, "use_mrope True"),
        ({"attention_bias": False}, "attention_bias False, which this library does not compute; expected True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"is_causal": False}, "is_causal False"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"logit_scale": 0.5}, "logit_scale 0.5"),
        ({"num_experts": 8}, "num_experts 8"),
        ({"auto_map": {"AutoModel": "modeling.MyModel"}}, "auto_map .*does not compute"),
        ({"quantization": {"bits": 4}}, "quantization {'bits': 4}"),
        ({"layer_types": ["full_attention", "linear_attention", "chunked"]}, "asks for chunked, linear_attention in"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false'; expected true or false"),
        ({"l2a_config": {"window": 4}}, "model_type 'qwen2' with l2a_config"),
        ({"model_type": "l2a_qwen2"}, "without l2a_config"),
        ({"model_type": "l2a_qwen2", "l2a_config": {"window": 0}}, "window is 0"),
        ({"model_type": "l2a_qwen2", "l2a_config": {"windows": 4}}, "no field"),
    ],
)
def test_refused(change, message):
    with pytest.raises(UserError, match=message):
        parse_config({**BASE, **change})


CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
"""What the card of Qwen2.5 says to add to `config.json` for long texts."""


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_the_lines_of_the_model_card_in_a_config_that_we_wrote(spelling):
    card = {spelling: CARD["rope_type"], **{name: CARD[name] for name in CARD if name != "rope_type"}}
    fields = config_fields(MODELS["tiny"])
    assert fields["rope_parameters"]["rope_type"] == "default"
    assert rope({**fields, "rope_scaling": card}) == (10_000.0, RopeScaling("yarn", 4.0, 32))


@pytest.mark.torch
@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": CARD, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        {"rope_scaling": CARD, "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10_000.0}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 7e4}, "rope_parameters": {**CARD, "rope_theta": 5e4}},
        {"rope_scaling": {**CARD, "rope_theta": 5e5}, "rope_theta": 1e6},
        {"rope_scaling": None, "rope_parameters": {**CARD, "rope_theta": 5e5}, "rope_theta": 1e6},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
        {"rope_scaling": CARD, "rope_theta": 3e4},
    ],
)
def test_of_two_statements_that_of_transformers_counts(change):
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    from l2a_jax.nn.rope import amplitude, inverse_frequencies

    fields = {**BASE, **change}
    theirs = Qwen2RotaryEmbedding(Qwen2Config(**json.loads(json.dumps(fields))))
    config, _ = parse_config(fields)
    found = inverse_frequencies(config.head_dim, config.rope_theta, config.rope, config.max_positions)
    assert found == pytest.approx(theirs.inv_freq.numpy(), rel=1e-6)
    assert amplitude(config.rope) == pytest.approx(theirs.attention_scaling)


def test_fields_that_change_nothing_are_read_over():
    harmless = {"use_mrope": False, "attention_dropout": 0.0, "use_cache": True, "num_experts": 0, "is_causal": True,
                "layer_types": ["full_attention"] * 3, "partial_rotary_factor": 1.0, "unsloth_version": "2025.1",
                "hidden_act": "swish", "rope_scaling": None, "initializer_range": 0.02, "max_window_layers": 0}
    assert parse_config({**BASE, **harmless}) == parse_config(BASE)


def test_named_layers_stand_above_the_window():
    """transformers looks at `layer_types`, and at the window only to fill them in."""
    slides = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    assert parse_config({**BASE, **slides, "layer_types": ["full_attention"] * 3}) == parse_config(BASE)


HUB = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}
"""The fields of Qwen2.5-0.5B on the hub."""


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rope_scaling": None, "layer_types": ["full_attention"] * 24, "dtype": "bfloat16"},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "rope_theta": None},
        {"_name_or_path": "x", "unsloth_fixed": True, "pruned_heads": {}, "is_encoder_decoder": False,
         "add_cross_attention": False, "torchscript": False, "head_dim": None},
        {"dual_chunk_attention_config": {"chunk_size": 262_144}, "sliding_window": 1_010_000},
    ],
)
def test_files_of_the_hub_still_load(more):
    assert parse_config({**HUB, **more}) == (MODELS["qwen2.5-0.5b"], None)
