"""A Hugging Face `config.json` to and from our configurations.

Both spellings of the rotary embedding are read (`rope_theta` with `rope_scaling`, and transformers 5's
`rope_parameters`); the second is written, with the first beside it for older readers. A model with the L2A layer is
written under its own `model_type`, so that transformers refuses it instead of running it as a plain Qwen2.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from l2a_jax.config import L2AConfig, ModelConfig, RopeScaling, l2a_config_from_dict, to_dict
from l2a_jax.errors import UserError

PLAIN_TYPE, L2A_TYPE = "qwen2", "l2a_qwen2"
L2A_KEY = "l2a_config"

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_INTEGERS = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")
_ROPE_KEYS = {"rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
              "attention_factor", "mscale", "mscale_all_dim", "truncate", "partial_rotary_factor"}


def parse_config(fields: dict[str, Any], where: str = "config.json") -> tuple[ModelConfig, L2AConfig | None]:
    """Our configurations from the fields of `config.json`; absent optional fields take transformers' defaults.

    Raises UserError on another architecture, a missing field, or a feature that this library does not compute.
    """
    if fields.get("model_type") not in (PLAIN_TYPE, L2A_TYPE):
        raise UserError(f"{where} describes a model of type {fields.get('model_type')!r}; expected {PLAIN_TYPE!r} "
                        "(Qwen2 or Qwen2.5)")
    missing = [name for name in _REQUIRED if fields.get(name) is None]
    if missing:
        raise UserError(f"{where} misses {', '.join(missing)}")
    if fields.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where} has hidden_act {fields['hidden_act']!r}; expected 'silu'")
    if "quantization_config" in fields:
        raise UserError(f"{where} describes quantised weights; expected bfloat16, float16 or float32")
    odd = [name for name in _INTEGERS if not isinstance(fields.get(name), int | None)]
    if odd:
        raise UserError(f"{where} has {', '.join(f'{name} {fields[name]!r}' for name in odd)}; expected whole numbers")
    try:
        _refuse_sliding_window(fields, where)
        heads, max_positions = fields["num_attention_heads"], fields.get("max_position_embeddings") or 32_768
        theta, rope = _parse_rope(fields, max_positions, where)
        config = ModelConfig(
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            intermediate_size=fields["intermediate_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or fields["hidden_size"] // max(heads, 1),
            rope_theta=theta,
            rope=rope,
            rms_norm_eps=shortest_float32(fields.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
            max_positions=max_positions,
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
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
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


def shortest_float32(value: float) -> float:
    """The shortest decimal of the same float32: 1e-06 for 9.999999974752427e-07, which is how GGUF, and whatever was
    converted from it, spells it."""
    return float(str(np.float32(value)))


def _refuse_sliding_window(fields: dict[str, Any], where: str) -> None:
    """Qwen2 slides only where `use_sliding_window` is set, in layers from `max_window_layers` on."""
    slides = any(kind == "sliding_attention" for kind in fields.get("layer_types") or ())
    if fields.get("use_sliding_window") and fields.get("sliding_window", 4_096) is not None:
        slides |= fields.get("max_window_layers", 28) < fields["num_hidden_layers"]
    if slides:
        raise UserError(f"{where} asks for sliding-window attention in some layers (use_sliding_window), which a plain "
                        "model here does not compute")


def _parse_rope(fields: dict[str, Any], max_positions: int, where: str) -> tuple[float, RopeScaling]:
    given = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    theta = float(given.get("rope_theta") or fields.get("rope_theta") or 10_000.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    unknown = set(given) - _ROPE_KEYS
    if kind not in ("default", "linear", "yarn") or unknown:
        raise UserError(f"{where} scales RoPE by {kind!r} with {sorted(given)}; expected default, linear or yarn")
    if given.get("partial_rotary_factor", 1.0) != 1.0 or given.get("truncate", True) is not True:
        raise UserError(f"{where} scales RoPE with partial_rotary_factor or truncate, which are not supported")
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", float(given["factor"]) if "factor" in given else math.nan)
    original = int(given.get("original_max_position_embeddings") or max_positions)
    factor = float(given.get("factor") or max_positions / original)
    return theta, RopeScaling(
        "yarn",
        factor,
        original,
        float(given.get("beta_fast") or 32.0),
        float(given.get("beta_slow") or 1.0),
        _attention_factor(given, factor),
    )


def _attention_factor(given: dict[str, Any], factor: float) -> float | None:
    """YaRN's factor on cos and sin where the file says something about it; None leaves 0.1 ln(factor) + 1."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if not (given.get("mscale") and given.get("mscale_all_dim")):
        return None

    def amplitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return amplitude(given["mscale"]) / amplitude(given["mscale_all_dim"])
