"""Frozen configurations: the shape of a model, of its L2A layer, and of its rotary embedding.

Everything here is hashable, so a configuration can be a static argument of a jitted function.
Presets (what to train with) live in `l2a_jax.presets`; this file only says what a model *is*.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

ROPE_KINDS = ("none", "theta", "linear", "yarn")
TOPOLOGIES = ("sequential", "parallel")
ROUTER_INPUTS = ("pre", "post_local")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name} is {value!r}; expected one of {', '.join(allowed)}")


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary embedding is stretched over longer sequences.

    `theta`: base x factor. `linear`: positions / factor. `yarn`: frequency-dependent interpolation
    (arXiv 2309.00071, as in transformers), where `original_max_positions` is the trained length
    (None: the model's `max_positions`) and `attention_factor` scales cos and sin (None: 0.1 ln(factor) + 1).
    """

    kind: str = "none"
    factor: float = 1.0
    original_max_positions: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        _choice("rope kind", self.kind, ROPE_KINDS)
        _require(self.factor >= 1.0, f"rope factor is {self.factor}; expected at least 1")
        _require(self.kind != "none" or self.factor == 1.0, f"rope kind 'none' takes no factor, got {self.factor}")
        _require(
            self.beta_fast > self.beta_slow > 0,
            f"rope beta_fast ({self.beta_fast}) must exceed beta_slow ({self.beta_slow}), both above 0",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Qwen2.5 model. `head_dim` is H; `max_positions` the longest trained sequence, before RoPE scaling."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    rope: RopeScaling = field(default_factory=RopeScaling)
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    max_positions: int = 32_768

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "max_positions"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected at least 1")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        _require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; rotary embedding needs an even width")


@dataclass(frozen=True)
class L2AConfig:
    """The conditional-attention layer (DESIGN.md, "The layer").

    `window` keys including the token itself, plus the first `sinks` keys, are local; `topology`, `share_attention`
    and `router_input` choose the wiring; `rope=None` inherits the model's. A decision is
    1[z >= temperature * logit(threshold)]. `leakage` is the probability that a training call of a layer computes
    global attention for every row, so that unrouted tokens get a router gradient too. `pruned_layers` have lost
    global attention: nothing is ever routed there. `flip` is the probability that a training call inverts a decision
    (routing noise); the gradient is that of the inverted decision, and nothing else knows of it.
    """

    window: int = 256
    sinks: int = 4
    topology: str = "parallel"
    share_attention: bool = True
    router_input: str = "pre"
    rope: RopeScaling | None = None
    temperature: float = 0.1
    threshold: float = 0.5
    leakage: float = 1.0
    pruned_layers: tuple[int, ...] = ()
    flip: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "pruned_layers", tuple(sorted(int(layer) for layer in self.pruned_layers)))
        _require(self.window >= 1, f"window is {self.window}; expected at least 1 (the token itself)")
        _require(self.sinks >= 0, f"sinks is {self.sinks}; expected at least 0")
        _choice("topology", self.topology, TOPOLOGIES)
        _choice("router_input", self.router_input, ROUTER_INPUTS)
        _require(
            not (self.share_attention and self.topology == "sequential"),
            "share_attention needs topology 'parallel': the sequential layer runs two attention sets one after another",
        )
        _require(
            self.topology == "parallel" or self.router_input == "pre",
            "router_input 'post_local' is a choice of topology 'parallel'; the sequential router always reads the "
            "state after local attention",
        )
        _require(self.temperature > 0, f"temperature is {self.temperature}; expected above 0")
        _require(0 < self.threshold < 1, f"threshold is {self.threshold}; expected between 0 and 1, both excluded")
        _require(0 <= self.leakage <= 1, f"leakage is {self.leakage}; expected a probability")
        _require(0 <= self.flip <= 1, f"flip is {self.flip}; expected a probability")
        _require(all(layer >= 0 for layer in self.pruned_layers), f"pruned_layers {self.pruned_layers} holds a "
                 "negative layer")


def rope_of(config: ModelConfig, l2a_config: L2AConfig | None = None) -> RopeScaling:
    """The scaling in force: the layer's own, or the model's where the layer names none."""
    return config.rope if l2a_config is None or l2a_config.rope is None else l2a_config.rope


def position_limit(config: ModelConfig, l2a_config: L2AConfig | None = None) -> int:
    """Longest sequence in tokens that the rotary embedding is meant for: the trained length x the scaling factor."""
    rope = rope_of(config, l2a_config)
    base = config.max_positions if rope.kind != "yarn" else rope.original_max_positions or config.max_positions
    return max(config.max_positions, int(base * rope.factor))


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types."""
    return dataclasses.asdict(config)


def model_config_from_dict(fields: dict[str, Any]) -> ModelConfig:
    """Inverse of `to_dict`; an unknown or missing field is an error that names it."""
    return _from_dict(ModelConfig, fields)


def l2a_config_from_dict(fields: dict[str, Any] | None) -> L2AConfig | None:
    """Inverse of `to_dict`; None stays None."""
    return None if fields is None else _from_dict(L2AConfig, fields)


def _from_dict(kind, fields):
    fields = dict(fields)
    known = {f.name for f in dataclasses.fields(kind)}
    required = {f.name for f in dataclasses.fields(kind)
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    _require(set(fields) <= known, f"{kind.__name__} has no field {sorted(set(fields) - known)}")
    _require(required <= set(fields), f"{kind.__name__} misses {sorted(required - set(fields))}")
    if isinstance(fields.get("rope"), dict):
        fields["rope"] = _from_dict(RopeScaling, fields["rope"])
    if "pruned_layers" in fields:
        fields["pruned_layers"] = tuple(fields["pruned_layers"])
    return kind(**fields)


def _qwen(hidden, intermediate, layers, heads, kv_heads, head_dim, *, vocab=151_936, tied=True) -> ModelConfig:
    return ModelConfig(vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, tie_embeddings=tied)


MODELS: dict[str, ModelConfig] = {
    "qwen2.5-0.5b": _qwen(896, 4_864, 24, 14, 2, 64),
    "qwen2.5-1.5b": _qwen(1_536, 8_960, 28, 12, 2, 128),
    "qwen2.5-3b": _qwen(2_048, 11_008, 36, 16, 2, 128),
    "qwen2.5-7b": _qwen(3_584, 18_944, 28, 28, 4, 128, vocab=152_064, tied=False),
    # The embedded demo's model: the same architecture, small enough to ship and to train on two CPU cores.
    "qwen2.5-tiny": ModelConfig(128, 64, 176, 3, 4, 2, 16, rope_theta=10_000.0, max_positions=1_024),
}
MODELS["tiny"] = MODELS["qwen2.5-tiny"]
