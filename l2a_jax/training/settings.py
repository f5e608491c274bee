"""What a run is asked to do: every setting of `train/run.py`, and the presets that fill them in.

Settings are resolved in one order: the defaults of `Settings`, then the regime's preset, then the named presets, then
the flags. The embedded demo (no model, no data) puts its own sizes where the regime's preset would stand.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any

from l2a_jax import fields
from l2a_jax.attention.backends import CHOICES
from l2a_jax.config import (
    L2AConfig,
    ModelConfig,
    RopeScaling,
    RouterInput,
    Sinks,
    Temperature,
    Threshold,
    Topology,
    Window,
)
from l2a_jax.data.dataset import PACKINGS
from l2a_jax.errors import UserError
from l2a_jax.fields import (
    DTYPE,
    PROBABILITY,
    SEED,
    SHARE_OF_RUN,
    Choice,
    Distinct,
    Filled,
    Range,
    above,
    at_least,
    between,
    count,
    length,
)
from l2a_jax.training.memory import MODES
from l2a_jax.training.regimes import PLAIN_REGIMES, REGIMES, check_regime


@dataclass(frozen=True)
class Settings:
    """One training run. Lengths are tokens or steps as said; `warmup` and the penalty's times are shares of the run.

    `rope` is KIND or KIND:FACTOR (None: the model's own). `unroll` None: on a GPU, unless memory comes first. `steps`
    wins over `tokens`. `dtype` is what the forward pass computes in (None: bfloat16 on an accelerator, float32 on a
    CPU); masters and optimizer are `master_dtype`.
    """

    regime: Annotated[str, Choice(*REGIMES)]
    preset: tuple[str, ...] = ()
    model: Annotated[str | None, Filled()] = None
    data: tuple[Annotated[str, Filled()], ...] = ()
    steps: Annotated[int | None, count()] = None
    tokens: Annotated[int | None, Range(1, 2**63 - 1)] = 12_000_000
    seq_len: Annotated[int, length(2)] = 2_048
    batch_size: Annotated[int, count()] = 4
    grad_accum: Annotated[int, count()] = 1
    packing: Annotated[str, Choice(*PACKINGS)] = "best_fit"
    echo: Annotated[float, between(0, 1, "a share of the rows")] = 0.0
    window: Window = 256
    sinks: Sinks = 4
    topology: Topology = "parallel"
    share_attention: bool = True
    router_input: RouterInput = "pre"
    rope: Annotated[str | None, Filled()] = None
    temperature: Temperature = 0.1
    threshold: Threshold = 0.5
    leakage: Annotated[float, PROBABILITY] = 1.0
    flip: Annotated[float, PROBABILITY] = 0.0
    penalty: Annotated[float, at_least(0)] = 0.0
    penalty_warmup: Annotated[float, SHARE_OF_RUN] = 0.05
    penalty_ramp: Annotated[float, SHARE_OF_RUN] = 0.45
    lr: Annotated[float, above(0)] = 5e-5
    router_lr: Annotated[float | None, above(0)] = None
    weight_decay: Annotated[float, at_least(0)] = 0.0
    warmup: Annotated[float, SHARE_OF_RUN] = 0.05
    clip: Annotated[float, above(0)] = 1.0
    backend: Annotated[str, Choice(*CHOICES)] = "auto"
    dtype: Annotated[str | None, DTYPE] = None
    master_dtype: Annotated[str, DTYPE] = "float32"
    remat: Annotated[str, Choice(*MODES)] = "elementwise"
    unroll: bool | None = None
    # Where attention is trained (None: in all layers).
    attention_layers: Annotated[tuple[Annotated[int, count(0)], ...] | None, Distinct()] = None
    deterministic: bool = False
    save_every: Annotated[int, count()] = 500
    eval_every: Annotated[int, count()] = 250
    eval_batches: Annotated[int, count()] = 8
    seed: Annotated[int, SEED] = 0
    # What was asked for by a flag or a named preset; a routed source's own layer yields only to this.
    given: tuple[str, ...] = ()


# Function-preserving at the start, sinks kept, both paths computed: what made router-only training lossless.
REPAIR: dict[str, Any] = {
    "topology": "parallel", "share_attention": True, "sinks": 4, "window": 256, "rope": "none", "leakage": 1.0,
    "penalty": 0.3, "penalty_warmup": 0.05, "penalty_ramp": 0.45, "lr": 5e-5, "router_lr": 3e-4, "weight_decay": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    # The authors' release: L2A's own layer and schedule (lambda reaches its maximum at the last step).
    "paper": {
        "topology": "sequential", "share_attention": False, "sinks": 0, "rope": "theta:5", "leakage": 0.1,
        "penalty": 1.31e-3, "penalty_warmup": 209 / 3973, "penalty_ramp": 1 - 209 / 3973, "lr": 5e-5,
    },
    "repair": REPAIR,
    # What kept the needle to 32,768 tokens with nine tenths of the decisions local (eval/results/replication.md).
    "repair-far": {**REPAIR, "window": 1_024, "penalty": 0.5, "seq_len": 8_192, "batch_size": 1, "grad_accum": 1,
                   "flip": 0.3, "echo": 1.0},
    # The consumer-scale operating points: one 24 GB card, 12M (0.5B) or 8M tokens, 8,192 tokens a step.
    "0.5b-24gb": {"model": "Qwen/Qwen2.5-0.5B", "tokens": 12_000_000, "seq_len": 2_048, "batch_size": 4,
                  "grad_accum": 1},
    "1.5b-24gb": {"model": "Qwen/Qwen2.5-1.5B", "tokens": 8_000_000, "seq_len": 2_048, "batch_size": 2,
                  "grad_accum": 2, "remat": "layer"},
    "3b-24gb": {"model": "Qwen/Qwen2.5-3B", "tokens": 8_000_000, "seq_len": 2_048, "batch_size": 1, "grad_accum": 4,
                "remat": "layer"},
}

REGIME_PRESET = {"router_strict": "repair", "router_only": "repair", "l2a_ft": "paper", "l2a_paper": "paper",
                 "full_ft": "paper"}

# The embedded demo: `repair`'s layer at the size of the packaged model, on the synthetic recall corpus.
DEMO = {
    **REPAIR, "window": 12, "penalty": 0.2, "seq_len": 128, "batch_size": 16, "steps": 200, "tokens": None,
    "lr": 3e-4, "router_lr": 1e-2, "save_every": 50, "eval_every": 50, "eval_batches": 2, "remat": "none",
}
RECALL_EMPHASIS = 4.0
# What made the packaged model: `python train/run.py --regime pretrain`.
DEMO_PRETRAIN = {
    "seq_len": 128, "batch_size": 16, "steps": 450, "tokens": None, "lr": 3e-3, "weight_decay": 0.01,
    "save_every": 200, "eval_every": 100, "eval_batches": 2, "remat": "none",
}


def resolve(regime: str, given: dict[str, Any], presets: tuple[str, ...] = ()) -> Settings:
    """All settings of a run from its regime, its named presets and the flags that were `given`.

    Raises UserError on an unknown regime or preset, and where a model comes without data or data without a model:
    there is no default text that would silently decide a result.
    """
    check_regime(regime)
    unknown = [name for name in presets if name not in PRESETS]
    if unknown:
        raise UserError(f"--preset is {unknown[0]!r}; expected one of {', '.join(PRESETS)}")
    values: dict[str, Any] = {}
    for name in presets:
        values |= PRESETS[name]
    values |= given
    asked = tuple(sorted(values))
    values["data"] = tuple(values.get("data") or ())
    if values.get("model") is None and not values["data"]:
        base = DEMO_PRETRAIN if regime == "pretrain" else DEMO
    elif values.get("model") is None:
        raise UserError("--data was given without --model; name the model whose tokenizer reads it "
                        "(a hub id, a folder or a .gguf file)")
    elif not values["data"]:
        raise UserError("--model was given without --data; name the text to train on (wikitext, diverse, or files)")
    else:
        base = PRESETS.get(REGIME_PRESET.get(regime, ""), {})
    if "tokens" in given and "steps" in given:
        raise UserError("--steps and --tokens both say how long to train; give one of them")
    if "tokens" in given:
        base = {**base, "steps": None}
    return _checked(Settings(regime=regime, preset=tuple(presets), given=asked, **{**base, **values}))


def _checked(settings: Settings) -> Settings:
    fields.check(settings)
    if settings.echo and not settings.data:
        raise UserError("--echo repeats text of --data, and there is none; give --model and --data")
    if settings.rope is not None:
        parse_rope(settings.rope)
    return settings


def parse_rope(text: str) -> RopeScaling:
    """`none`, `theta:5`, `linear:5` or `yarn:4` as a RopeScaling."""
    kind, _, factor = text.partition(":")
    try:
        return RopeScaling(kind, float(factor) if factor else 1.0)
    except ValueError as error:
        raise UserError(f"--rope is {text!r}; expected none, theta:FACTOR, linear:FACTOR or yarn:FACTOR "
                        f"({error})") from error


LAYER_FIELDS = ("window", "sinks", "topology", "share_attention", "router_input", "temperature", "threshold", "leakage",
                "flip")
STRUCTURE = ("topology", "share_attention", "router_input")


def layer_of(settings: Settings) -> L2AConfig | None:
    """The L2A layer that the settings describe; None for the plain regimes. UserError where they contradict."""
    if settings.regime in PLAIN_REGIMES:
        return None
    try:
        return L2AConfig(rope=None if settings.rope is None else parse_rope(settings.rope),
                         **{name: getattr(settings, name) for name in LAYER_FIELDS})
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def adapt_layer(own: L2AConfig, settings: Settings, source: str) -> L2AConfig:
    """A routed source keeps its own layer; what was asked for by a flag or a named preset may change its numbers, but
    not how it is wired (UserError)."""
    asked = {name: getattr(settings, name) for name in LAYER_FIELDS if name in settings.given}
    for name in STRUCTURE:
        if asked.get(name, getattr(own, name)) != getattr(own, name):
            by = [preset for preset in settings.preset if PRESETS[preset].get(name) == asked[name]]
            raise UserError(f"{fields.flag(name)} is {asked[name]}" + (f" by --preset {by[-1]}" if by else "")
                            + f", but {source} was trained with {getattr(own, name)}")
    if "rope" in settings.given:
        asked["rope"] = None if settings.rope is None else parse_rope(settings.rope)
    return dataclasses.replace(own, **asked)


def as_used(settings: Settings, layer: L2AConfig) -> Settings:
    """The settings with the layer that is in force, where a source brought its own: what a run records."""
    rope = layer.rope
    spelled = None if rope is None else rope.kind if rope.kind == "none" else f"{rope.kind}:{rope.factor:.17g}"
    return dataclasses.replace(settings, rope=spelled, **{name: getattr(layer, name) for name in LAYER_FIELDS})


def idle(settings: Settings) -> list[tuple[bool, tuple[str, ...], str]]:
    """Where a setting changes nothing, as rules for `commands.say_idle`."""
    s, trained = settings, set(REGIMES[settings.regime])
    return [
        (s.regime in PLAIN_REGIMES, (*LAYER_FIELDS, "router_lr", "penalty", "penalty_warmup", "penalty_ramp"),
         f"--regime {s.regime} runs a plain model, which has no L2A layer"),
        (not trained, ("steps", "tokens", "grad_accum", "echo", "lr", "weight_decay", "warmup", "clip", "master_dtype",
                       "remat", "unroll", "save_every", "eval_every"), f"--regime {s.regime} trains nothing"),
        (bool(trained) and not trained & {"attention", "mlp", "embeddings"}, ("weight_decay",),
         f"decay is of matrices, and --regime {s.regime} trains the router and norms alone"),
        (trained == {"router"} and s.router_lr is not None, ("lr",),
         f"--regime {s.regime} trains the router alone, whose rate is --router-lr ({s.router_lr:g})"
         if s.router_lr else ""),
        (s.penalty == 0 and s.regime not in PLAIN_REGIMES, ("penalty_warmup", "penalty_ramp"), "--penalty is 0"),
        (not s.data, ("packing",), "the synthetic recall corpus is made in whole rows"),
    ]


def model_of(settings: Settings, config: ModelConfig) -> ModelConfig:
    """The model's shape; a plain regime carries `rope` itself, having no layer to carry it."""
    if settings.regime in PLAIN_REGIMES and settings.rope is not None:
        return dataclasses.replace(config, rope=parse_rope(settings.rope))
    return config


def steps_of(settings: Settings, tokens_per_batch: float) -> int:
    """Number of optimiser steps: as given, or as many as the token budget needs (the last one may overshoot it)."""
    if settings.steps is not None:
        return settings.steps
    steps = max(1, math.ceil(settings.tokens / (tokens_per_batch * settings.grad_accum)))
    if steps > fields.MOST:
        raise UserError(f"--tokens {settings.tokens} are {steps:,} steps; expected at most {fields.MOST:,}")
    return steps
