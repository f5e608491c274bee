"""Frozen configurations: the shape of a model, of its L2A layer, and of its rotary embedding.

Everything here is hashable, so a configuration can be a static argument of a jitted function.
Presets (what to train with) live in `l2a_jax.training.settings`; this file only says what a model *is*. What cannot be
is a plain ValueError here: whoever read the numbers says where they stand.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

from l2a_jax.fields import LONGEST, PROBABILITY, Choice, Range, Unit, above, between, check, count, length

END_OF_TEXT = "<|endoftext|>"
"""Qwen2.5's mark between documents. An instruct model's `eos_token` is its end of turn, which is something else."""
Window = Annotated[int, length(), Unit("keys"), "keys a local token sees, itself included"]
Sinks = Annotated[int, length(0), Unit("keys"), "first keys that every token sees"]
Topology = Annotated[str, Choice("sequential", "parallel"),
                     "local and global attention one after the other, or side by side"]
ShareAttention = Annotated[bool, "one attention set for both"]
RouterInput = Annotated[str, Choice("pre", "post_local"),
                        "the router reads the stream before or after local attention"]
OF_SCORES = ("lse", "sink")  # signals that local attention's scores give
RouterSees = Annotated[tuple[Annotated[str, Choice("position", *OF_SCORES), Unit("signal")], ...],
                       "what the router sees beside the stream: position, how much past there is beyond a window; "
                       "and of each head's local attention lse, its scores' log-sum-exp, or sink, the mass on sinks"]
RouterHidden = Annotated[int, count(0), Unit("units"),
                         "hidden units of the router, beside its linear part (0: linear)"]
# Beyond these a sigmoid of z / temperature is a step, or a constant, in float32.
Temperature = Annotated[float, between(1e-6, 1e6), "of the router"]
Threshold = Annotated[float, Range(0, 1, low_included=False, high_included=False), Unit("probability"),
                      "probability from which a token is routed"]
Leakage = Annotated[float, PROBABILITY, Unit("share"), "share of layer calls that compute every row's global attention"]
Flip = Annotated[float, PROBABILITY, Unit("share"),
                 "share of decisions that training inverts at random (routing noise)"]
Explore = Annotated[float, PROBABILITY, Unit("share"),
                    "share of unrouted tokens whose global attention training computes all the same (leakage 0)"]
ExploreBy = Annotated[str, Choice("uniform", "unsure"),
                      "which these are: any alike, or the likelier the less sure the router is"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary embedding is stretched over longer sequences.

    `theta`: base x factor. `linear`: positions / factor. `yarn`: frequency-dependent interpolation
    (arXiv 2309.00071, as in transformers), where `original_max_positions` is the trained length
    (None: the model's `max_positions`) and `attention_factor` scales cos and sin (None: 0.1 ln(factor) + 1).
    """

    kind: Annotated[str, Choice("none", "theta", "linear", "yarn")] = "none"
    # 10,000 times the longest trained length there is would no longer be a position in int32.
    factor: Annotated[float, between(1, 10_000)] = 1.0
    original_max_positions: Annotated[int | None, length()] = None
    beta_fast: Annotated[float, above(0)] = 32.0
    beta_slow: Annotated[float, above(0)] = 1.0
    attention_factor: Annotated[float | None, above(0)] = None

    def __post_init__(self):
        check(self, spell=lambda name: f"rope {name}", error=ValueError)
        _require(self.kind != "none" or self.factor == 1.0, f"rope kind 'none' takes no factor, got {self.factor}")
        _require(self.beta_fast > self.beta_slow,
                 f"rope beta_fast ({self.beta_fast}) must exceed beta_slow ({self.beta_slow})")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Qwen2.5 model. `head_dim` is H; `max_positions` the longest trained sequence, before RoPE scaling."""

    vocab_size: Annotated[int, count()]
    hidden_size: Annotated[int, count()]
    intermediate_size: Annotated[int, count()]
    num_layers: Annotated[int, count()]
    num_heads: Annotated[int, count()]
    num_kv_heads: Annotated[int, count()]
    head_dim: Annotated[int, count()]
    rope_theta: Annotated[float, above(0)] = 1_000_000.0
    rope: RopeScaling = field(default_factory=RopeScaling)
    rms_norm_eps: Annotated[float, above(0, 1)] = 1e-6
    tie_embeddings: bool = True
    max_positions: Annotated[int, length()] = 32_768

    def __post_init__(self):
        check(self, spell=str, error=ValueError)
        _require(self.num_heads % self.num_kv_heads == 0,
                 f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        _require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; rotary embedding needs an even width")


@dataclass(frozen=True)
class L2AConfig:
    """The conditional-attention layer (DESIGN.md, "The layer").

    `window` keys including the token itself, plus the first `sinks` keys, are local; `topology`, `share_attention`
    and `router_input` choose the wiring, `router_sees` and `router_hidden` what the router is made of (`nn.router`);
    `rope=None` inherits the model's. A decision is
    1[z >= temperature * logit(threshold)]. `leakage` is the probability that a training call of a layer computes
    global attention for every row, so that unrouted tokens get a router gradient too. `pruned_layers` have lost
    global attention: nothing is ever routed there. `flip` is the probability that a training call inverts a decision
    (routing noise); the gradient is that of the inverted decision, and nothing else knows of it. `explore` computes the
    global attention of so many unrouted tokens in training, chosen by `explore_by`, each counted as often as its chance
    makes it rare: in expectation the gradient of leakage 1, at the price of these rows alone.
    """

    window: Window = 256
    sinks: Sinks = 4
    topology: Topology = "parallel"
    share_attention: ShareAttention = True
    router_input: RouterInput = "pre"
    router_sees: RouterSees = ()
    router_hidden: RouterHidden = 0
    rope: RopeScaling | None = None
    temperature: Temperature = 0.1
    threshold: Threshold = 0.5
    leakage: Leakage = 1.0
    pruned_layers: tuple[Annotated[int, count(0)], ...] = ()
    flip: Flip = 0.0
    explore: Explore = 0.0
    explore_by: ExploreBy = "uniform"

    def __post_init__(self):
        for name in ("pruned_layers", "router_sees"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check(self, spell=str, error=ValueError)
        object.__setattr__(self, "pruned_layers", tuple(sorted(int(layer) for layer in self.pruned_layers)))
        _require(len({*self.router_sees}) == len(self.router_sees),
                 f"router_sees is {', '.join(self.router_sees)}; expected each signal once")
        _require(self.sinks > 0 or "sink" not in self.router_sees,
                 "router_sees names sink, the mass on the sinks, and sinks is 0")
        _require(not (self.share_attention and self.topology == "sequential"),
                 "share_attention needs topology 'parallel': the sequential layer runs two attention sets one after "
                 "another (--topology sequential goes with --no-share-attention)")
        _require(self.topology == "parallel" or self.router_input == "pre",
                 "router_input 'post_local' is a choice of topology 'parallel'; the sequential router always reads the "
                 "state after local attention")
        _require(self.explore == 0 or self.leakage == 0,
                 f"explore {self.explore:g} and leakage {self.leakage:g} both choose rows to compute (--explore goes "
                 "with --leakage 0)")

    @property
    def sees_scores(self) -> bool:
        """Whether the router sees what local attention's scores give, which is then computed before it decides."""
        return bool({*OF_SCORES} & {*self.router_sees})


def rope_of(config: ModelConfig, l2a_config: L2AConfig | None = None) -> RopeScaling:
    """The scaling in force: the layer's own, or the model's where the layer names none."""
    return config.rope if l2a_config is None or l2a_config.rope is None else l2a_config.rope


def position_limit(config: ModelConfig, l2a_config: L2AConfig | None = None) -> int:
    """Longest sequence in tokens that the rotary embedding is meant for: the trained length x the scaling factor."""
    rope = rope_of(config, l2a_config)
    base = config.max_positions if rope.kind != "yarn" else rope.original_max_positions or config.max_positions
    return min(LONGEST, max(config.max_positions, int(base * rope.factor)))


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
    fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
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
