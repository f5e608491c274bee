"""A GGUF file's fields as a model's configuration: each that says how a Qwen2 model computes is used, or refused unless
it changes nothing.

The meanings are llama.cpp's. A field that is not listed here is refused too: what it would change is not known.
Tensors need no permutation of q and k: GGUF keeps Qwen2's half-split rotary layout.
"""

from __future__ import annotations

import math
from typing import Any

from l2a_jax.config import ModelConfig, RopeScaling
from l2a_jax.errors import UserError, shown
from l2a_jax.fields import check_value
from l2a_jax.weights.gguf_file import GGUFFile
from l2a_jax.weights.hf_config import shortest_float32
from l2a_jax.weights.names import SIZES

ARCHITECTURE = "qwen2"
_PREFIX = ARCHITECTURE + "."
_SCALING = "rope.scaling."

_USED = {*(size.gguf for size in SIZES.values()), "vocab_size", "attention.value_length",
         "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base",
         "rope.scale_linear", *(_SCALING + name for name in (
             "type", "factor", "original_context_length", "attn_factor", "yarn_attn_factor", "yarn_ext_factor",
             "yarn_beta_fast", "yarn_beta_slow"))}

_HARMLESS = {"rope.scaling.finetuned", "pooling_type", "attention.layer_norm_epsilon", "tensor_data_layout",
             # Only for layers with a sliding window, of which there are none.
             "rope.freq_base_swa", "rope.dimension_count_swa", "attention.key_length_swa", "attention.value_length_swa",
             "attention.sliding_window_pattern"}

_OFF: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "expert_weights_norm": (False,),
    "swin_norm": (False,),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale", "attention.output_scale",
                     "expert_weights_scale"), (0, 1)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping",
                     "attention.scale", "attention.max_alibi_bias", "attention.clamp_kqv",
                     "attention.temperature_length", "attention.temperature_scale", "attention.shared_kv_layers",
                     "rope.scaling.yarn_log_multiplier", "rope.scaling.alpha", "expert_count", "expert_used_count",
                     "expert_shared_count", "expert_feed_forward_length", "expert_shared_feed_forward_length",
                     "expert_gating_func", "leading_dense_block_count", "nextn_predict_layers",
                     "rescale_every_n_layers", "token_shift_count", "n_deepstack_layers"), (0,)),
}
"""Fields of other models, with the values at which they change nothing."""


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The model's shape; a stored `output.weight` makes it untied, as in transformers.

    Raises UserError on another architecture, or on fields that are missing, unknown or unsupported.
    """
    architecture = file.fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(f"{file.path} holds a model of architecture {architecture!r}; expected {ARCHITECTURE!r}")
    if file.fields.get("split.count", 1) not in (0, 1):
        raise UserError(f"{file.path} is one of {file.fields['split.count']} parts of a model; merge them into one")
    if "token_embd.weight" not in file.shapes:
        raise UserError(f"{file.path} does not fit its configuration; missing: token_embd.weight")
    _check_keys(file)
    heads, hidden = (_number(file, SIZES[name].gguf, int) for name in ("num_heads", "hidden_size"))
    defaults = {"num_kv_heads": heads, "head_dim": hidden // max(heads, 1)}
    sizes = {name: _number(file, size.gguf, int, defaults.get(name)) for name, size in SIZES.items()}
    for name in ("rope.dimension_count", "attention.value_length"):
        width = _number(file, name, int, sizes["head_dim"])
        if width != sizes["head_dim"]:
            raise UserError(f"{file.path}: {_PREFIX}{name} is {width}, the head width {sizes['head_dim']}; they must "
                            "be equal")
    try:
        return ModelConfig(
            vocab_size=file.shapes["token_embd.weight"][0], **sizes,
            rope_theta=shortest_float32(file.fields.get(_PREFIX + "rope.freq_base", 10_000.0)),
            rope=_rope_scaling(file),
            rms_norm_eps=_number(file, "attention.layer_norm_rms_epsilon", float),
            tie_embeddings="output.weight" not in file.shapes,
        )
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{file.path} has an unusable configuration: {error}") from error


def _number(file: GGUFFile, name: str, kind: type, default: float | None = None) -> Any:
    """The number in a field of the model. Raises UserError where it is missing, or not of its kind (int or float)."""
    value = file.fields.get(_PREFIX + name, default)
    if value is None:
        raise UserError(f"{file.path} misses the field {_PREFIX}{name}")
    check_value(value, kind, f"{file.path}: {_PREFIX}{name}")
    return value if kind is int else shortest_float32(value)


def _check_keys(file: GGUFFile) -> None:
    """UserError on a field that says to compute something else than this library does, or that is unknown."""
    kind = file.fields.get("general.type", "model")
    if kind != "model":
        raise UserError(f"{file.path} holds {shown(kind)} (general.type); expected a model")
    for key, value in file.fields.items():
        prefix, _, name = key.partition(".")
        if prefix != ARCHITECTURE:
            if prefix == "adapter" or (name in _USED and prefix not in ("general", "tokenizer")):
                raise UserError(f"{file.path} holds {key}, which is no field of a {ARCHITECTURE} model")
            continue
        if name in _USED or name in _HARMLESS:
            continue
        if name not in _OFF:
            raise UserError(f"{file.path} has the field {key} ({shown(value)}), which this library does not know; "
                            "computing without it could give other results")
        if value not in _OFF[name]:
            raise UserError(f"{file.path}: {key} is {shown(value)}, which this library does not compute; expected "
                            f"{' or '.join(map(str, _OFF[name]))}, or no such field")
    rows, vocabulary = file.shapes["token_embd.weight"][0], file.fields.get(_PREFIX + "vocab_size")
    if vocabulary is not None and not (isinstance(vocabulary, int) and vocabulary <= rows):  # rows may be padding
        raise UserError(f"{file.path}: {_PREFIX}vocab_size is {shown(vocabulary)}, token_embd.weight has {rows} rows")
    window, context = (file.fields.get(_PREFIX + name) for name in ("attention.sliding_window", "context_length"))
    if window not in (None, 0) and not (isinstance(window, int) and isinstance(context, int) and window >= context):
        raise UserError(f"{file.path}: {_PREFIX}attention.sliding_window is {shown(window)}, which this library does "
                        "not compute; expected 0, the context length, or no such field")


def _rope_scaling(file: GGUFFile) -> RopeScaling:
    """How the file stretches RoPE. As in llama.cpp a factor without a type is linear, a factor of 0 is none, and
    YaRN's attention factor multiplies 0.1 ln(factor) + 1. Raises UserError on what is not computed here."""
    stated = file.fields.get(_PREFIX + _SCALING + "type")

    def number(name: str, default: float) -> float:
        return _number(file, _SCALING + name, float, default)

    kind = "linear" if stated is None else stated
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{file.path} scales RoPE by {shown(kind)}; expected none, linear or yarn")
    factor = number("factor", _number(file, "rope.scale_linear", float, 0.0)) or 1.0
    attention = number("attn_factor", 1.0) * number("yarn_attn_factor", 1.0)
    if kind != "yarn":
        if attention != 1.0:
            raise UserError(f"{file.path} scales cos and sin by {attention} ({_PREFIX}{_SCALING}attn_factor) without "
                            "YaRN, which this library does not compute")
        none = kind == "none" or (factor == 1.0 and stated is None)
        return RopeScaling() if none else RopeScaling("linear", factor)
    extrapolation = number("yarn_ext_factor", 1.0)
    if extrapolation not in (1.0, -1.0):
        raise UserError(f"{file.path}: {_PREFIX}{_SCALING}yarn_ext_factor is {extrapolation}; expected 1")
    return RopeScaling("yarn", factor, file.fields.get(_PREFIX + _SCALING + "original_context_length"),
                       number("yarn_beta_fast", 32.0), number("yarn_beta_slow", 1.0),
                       None if attention == 1.0 else attention * (0.1 * math.log(factor) + 1.0))
