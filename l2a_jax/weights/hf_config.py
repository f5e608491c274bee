"""A Hugging Face `config.json` to and from our configurations.

Both spellings of the rotary embedding are read (`rope_theta` with `rope_scaling`, and transformers 5's
`rope_parameters`); the second is written, with the first beside it for older readers. A model with the L2A layer is
written under its own `model_type`, so that transformers refuses it instead of running it as a plain Qwen2.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from l2a_jax.config import L2AConfig, ModelConfig, RopeScaling, l2a_config_from_dict, to_dict
from l2a_jax.errors import UserError, few, shown
from l2a_jax.fields import check_value
from l2a_jax.weights.names import SIZES

PLAIN_TYPE, L2A_TYPE = "qwen2", "l2a_qwen2"
L2A_KEY = "l2a_config"

_SIZES = {"vocab_size": "vocab_size", **{name: size.hf for name, size in SIZES.items()}}
_OPTIONAL = ("num_kv_heads", "head_dim", "max_positions")
_WRITTEN = {*_SIZES.values(), L2A_KEY, "model_type", "architectures", "hidden_act", "rms_norm_eps",
            "tie_word_embeddings", "use_sliding_window", "rope_theta", "rope_scaling", "rope_parameters", "torch_dtype",
            "dtype"}
_SWITCHES = ("tie_word_embeddings", "use_sliding_window")
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
_ALWAYS = {"rope_theta", "rope_type", "type", "factor", "partial_rotary_factor", "truncate",
           "original_max_position_embeddings"}
_ROPE_KEYS = {"default": _ALWAYS, "linear": _ALWAYS,
              "yarn": _ALWAYS | {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"}}
"""What the RoPE parameters may hold by their type, null aside."""
_POSITIONS = re.compile(r"rope|rotary|yarn|alibi|original_max_position|position_embedding_type")
"""Names of fields that can only be about positions: an unknown one is refused."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    **dict.fromkeys(("attention_bias", "qkv_bias", "is_causal"), (True,)),
    **dict.fromkeys(("mlp_bias", "use_qk_norm", "qk_layernorm", "qk_norm", "use_mrope", "use_dynamic_ntk",
                     "use_logn_attn", "add_cross_attention", "is_encoder_decoder", "use_parallel_residual",
                     "parallel_attn", "alibi"), (False,)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_ratio", "logit_scale", "logits_scaling",
                     "embedding_multiplier", "residual_multiplier", "scale_emb", "scale_depth"), (1,)),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "num_nextn_predict_layers",
                     "attn_logit_softcapping", "final_logit_softcapping", "logit_softcap"), (0,)),
    "position_embedding_type": ("rope", "rotary"),
    # Nothing but null: what they would stand for, only other models or other code compute.
    **dict.fromkeys(("query_pre_attn_scalar", "attention_multiplier", "dim_model_base", "no_rope_layers", "auto_map",
                     "compression_config", "quantization"), ()),
}
"""Fields that change the result in other models (or in code of the model's own), with the values at which they do not.

Fields that are not named here are carried over and change nothing, as in transformers."""


def parse_config(fields: dict[str, Any], where: str = "config.json") -> tuple[ModelConfig, L2AConfig | None]:
    """Our configurations from the fields of `config.json`; absent optional fields take transformers' defaults.

    Raises UserError on another architecture, a missing field, or a feature that this library does not compute.
    """
    if fields.get("model_type") not in (PLAIN_TYPE, L2A_TYPE):
        raise UserError(f"{where} describes a model of type {fields.get('model_type')!r}; expected {PLAIN_TYPE!r} "
                        "(Qwen2 or Qwen2.5)")
    sizes = {name: fields.get(key) for name, key in _SIZES.items()}
    missing = [_SIZES[name] for name, size in sizes.items() if size is None and name not in _OPTIONAL]
    if missing:
        raise UserError(f"{where} misses {', '.join(missing)}")
    for expected, fits in (("whole numbers", lambda size: type(size) is int), ("at least 1", lambda size: size >= 1)):
        wrong = [f"{_SIZES[name]} {shown(size)}" for name, size in sizes.items() if size is not None and not fits(size)]
        if wrong:
            raise UserError(f"{where} has {few(wrong)}; expected {expected}")
    defaults = {"num_kv_heads": sizes["num_heads"], "head_dim": sizes["hidden_size"] // sizes["num_heads"],
                "max_positions": 32_768}
    sizes |= {name: default for name, default in defaults.items() if sizes[name] is None}
    try:
        _refuse_other_computing(fields, where)
        theta, rope = _parse_rope(fields, sizes["max_positions"], where)
        config = ModelConfig(
            **sizes, rope_theta=theta, rope=rope,
            rms_norm_eps=shortest_float32(fields.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        )
        l2a_config = l2a_config_from_dict(fields.get(L2A_KEY))
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where} is unusable: {error}") from error
    if (fields["model_type"] == L2A_TYPE) != (l2a_config is not None):
        have = "without" if l2a_config is None else "with"
        raise UserError(f"{where} has model_type {fields['model_type']!r} {have} {L2A_KEY}; expected {L2A_TYPE!r} with "
                        f"it or {PLAIN_TYPE!r} without")
    return config, l2a_config


def config_fields(
    config: ModelConfig, l2a_config: L2AConfig | None = None, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """The fields of a `config.json`: the inverse of `parse_config`.

    RoPE kind `theta` is written as the larger base that it means, because Hugging Face has no such kind; an
    L2AConfig's own scaling is kept as it is.
    """
    rope = config.rope
    theta = config.rope_theta * rope.factor if rope.kind == "theta" else config.rope_theta
    scaling: dict[str, Any] = {"rope_type": "default"}
    if rope.kind in ("linear", "yarn"):
        scaling = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "yarn":
        scaling |= {"original_max_position_embeddings": rope.original_max_positions or config.max_positions,
                    "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    fields = {
        "architectures": ["Qwen2ForCausalLM" if l2a_config is None else "L2AQwen2ForCausalLM"],
        "model_type": PLAIN_TYPE if l2a_config is None else L2A_TYPE,
        **{key: getattr(config, name) for name, key in _SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "use_sliding_window": False,
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta, **scaling},
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if scaling["rope_type"] != "default":
        fields["rope_scaling"] = scaling
    return fields if l2a_config is None else {**fields, L2A_KEY: to_dict(l2a_config)}


def beyond_the_model(fields: dict[str, Any]) -> dict[str, Any]:
    """Those of a `config.json` that say nothing about computing: what `parse_config` does not use, and
    `config_fields` does not write."""
    return {name: value for name, value in fields.items() if name not in _WRITTEN and name not in _ONLY}


def shortest_float32(value: float) -> float:
    """The shortest decimal of the same float32: 1e-06 for 9.999999974752427e-07, which is how GGUF, and whatever was
    converted from it, spells it."""
    return float(str(np.float32(value)))


def _refuse_other_computing(fields: dict[str, Any], where: str) -> None:
    """UserError on a field that says to compute something else than Qwen2 with full attention."""
    if "quantization_config" in fields:
        raise UserError(f"{where} describes quantised weights; expected bfloat16, float16 or float32")
    for name, accepted in _ONLY.items():
        value = fields.get(name)
        if value is not None and not any(value == one and isinstance(value, bool) == isinstance(one, bool)
                                         for one in accepted):
            told = f"; expected {' or '.join(map(repr, accepted))}" if accepted else ""
            raise UserError(f"{where} has {name} {shown(value)}, which this library does not compute{told}")
    unknown = [name for name in fields if _POSITIONS.search(name) and name not in (*_ROPE_FIELDS, *_ONLY)]
    if unknown:
        raise UserError(f"{where} has {few(unknown)}, which this library does not know; expected "
                        f"{' or '.join(_ROPE_FIELDS)}")
    odd = [name for name in _SWITCHES if not isinstance(fields.get(name), bool | None)]
    if odd:
        raise UserError(f"{where} has {odd[0]} {shown(fields[odd[0]])}; expected true or false")
    kinds = fields.get("layer_types")
    if kinds is None:
        # Qwen2 slides only where `use_sliding_window` is set, in layers from `max_window_layers` on.
        slides = (fields.get("use_sliding_window") and fields.get("sliding_window", 4_096) is not None
                  and fields.get("max_window_layers", 28) < fields["num_hidden_layers"])
        kinds = ["sliding_attention"] if slides else []
    others = sorted({str(kind) for kind in kinds} - {"full_attention"})
    if others:
        told = "sliding-window attention" if others == ["sliding_attention"] else few(others)
        raise UserError(f"{where} asks for {told} in some layers (layer_types, use_sliding_window), which a plain "
                        "model here does not compute")


def _parse_rope(fields: dict[str, Any], max_positions: int, where: str) -> tuple[float, RopeScaling]:
    """As in transformers: `rope_scaling`, where it says anything, stands in place of `rope_parameters`, and a base
    inside stands above `rope_theta`."""
    scaling, parameters = dict(fields.get("rope_scaling") or {}), dict(fields.get("rope_parameters") or {})
    given = {name: value for name, value in (scaling or parameters).items() if value is not None}
    base = given.get("rope_theta", fields.get("rope_theta"))
    other = parameters.get("rope_theta")
    if scaling and base is None and other is not None:
        raise UserError(f"{where} gives rope_theta in rope_parameters, which rope_scaling replaces; expected it beside "
                        "them")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_KEYS or given.get("type", kind) != kind:
        told = kind if given.get("type", kind) == kind else f"{kind} and {given['type']}"
        raise UserError(f"{where} scales RoPE by {told!r} with {few(sorted(given))}; expected {', '.join(_ROPE_KEYS)}")
    unknown = sorted(set(given) - _ROPE_KEYS[kind])
    if unknown:
        raise UserError(f"{where} scales RoPE by {kind!r} with {few(unknown)}, which this library does not know there; "
                        f"expected {', '.join(sorted(_ROPE_KEYS[kind]))}")
    if given.get("partial_rotary_factor", 1.0) != 1.0 or given.get("truncate", True) is not True:
        raise UserError(f"{where} scales RoPE with partial_rotary_factor or truncate, which are not supported")

    def number(name: str, default: float) -> float:
        value = given.get(name, default)
        check_value(value, float, f"RoPE {name}", ValueError)
        return float(value)

    given["rope_theta"] = 10_000.0 if base is None else base
    theta = number("rope_theta", 10_000.0)
    if kind == "default":
        if number("factor", 1.0) != 1.0:
            raise UserError(f"{where} gives RoPE the factor {given['factor']} without saying how to scale; expected "
                            "rope_type linear or yarn")
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", number("factor", math.nan))
    original = number("original_max_position_embeddings", max_positions)
    if not original.is_integer():
        raise ValueError(f"original_max_position_embeddings is {original}; expected a whole number")
    factor = number("factor", max_positions / (original or math.nan))
    return theta, RopeScaling("yarn", factor, int(original), number("beta_fast", 32.0), number("beta_slow", 1.0),
                              _attention_factor(given, factor))


def _attention_factor(given: dict[str, Any], factor: float) -> float | None:
    """YaRN's factor on cos and sin where the file says something about it; None leaves 0.1 ln(factor) + 1."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if not (given.get("mscale") and given.get("mscale_all_dim")):
        return None

    def amplitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return amplitude(given["mscale"]) / amplitude(given["mscale_all_dim"])
