"""What a run is asked to do: every setting of `train/run.py`, and the presets that fill them in.

Settings are resolved in one order: the defaults of `Settings`, then the regime's preset, then the named presets, then
the flags. The embedded demo (no model, no data) puts its own sizes where the regime's preset would stand.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from l2a_jax.config import L2AConfig, ModelConfig, RopeScaling
from l2a_jax.errors import UserError
from l2a_jax.training.regimes import PLAIN_REGIMES, check_regime
from l2a_jax.training.remat import checkpoint_policy


@dataclass(frozen=True)
class Settings:
    """One training run. Lengths are tokens or steps as said; `warmup` and the penalty's times are shares of the run.

    `rope` is KIND or KIND:FACTOR (None: the model's own). `unroll` None: on a GPU, unless memory comes first. `steps`
    wins over `tokens`. `dtype` is what the forward pass computes in (None: bfloat16 on an accelerator, float32 on a
    CPU); masters and optimizer are `master_dtype`.
    """

    regime: str
    preset: tuple[str, ...] = ()
    model: str | None = None
    data: tuple[str, ...] = ()
    steps: int | None = None
    tokens: int | None = 12_000_000
    seq_len: int = 2_048
    batch_size: int = 4
    grad_accum: int = 1
    packing: str = "best_fit"
    echo: float = 0.0
    window: int = 256
    sinks: int = 4
    topology: str = "parallel"
    share_attention: bool = True
    router_input: str = "pre"
    rope: str | None = None
    temperature: float = 0.1
    threshold: float = 0.5
    leakage: float = 1.0
    flip: float = 0.0
    penalty: float = 0.0
    penalty_warmup: float = 0.05
    penalty_ramp: float = 0.45
    lr: float = 5e-5
    router_lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.05
    clip: float = 1.0
    backend: str = "auto"
    dtype: str | None = None
    master_dtype: str = "float32"
    remat: str = "elementwise"
    unroll: bool | None = None
    attention_layers: tuple[int, ...] | None = None  # where attention is trained (None: in all layers)
    deterministic: bool = False
    save_every: int = 500
    eval_every: int = 250
    eval_batches: int = 8
    seed: int = 0
    given: tuple[str, ...] = ()  # the flags that were spelled out; a routed source's own layer yields only to these


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
    fields: dict[str, Any] = {}
    for name in presets:
        fields |= PRESETS[name]
    fields |= given
    fields["data"] = tuple(fields.get("data") or ())
    if fields.get("model") is None and not fields["data"]:
        base = DEMO_PRETRAIN if regime == "pretrain" else DEMO
    elif fields.get("model") is None:
        raise UserError("--data was given without --model; name the model whose tokenizer reads it "
                        "(a hub id, a folder or a .gguf file)")
    elif not fields["data"]:
        raise UserError("--model was given without --data; name the text to train on (wikitext, diverse, or files)")
    else:
        base = PRESETS.get(REGIME_PRESET.get(regime, ""), {})
    if "tokens" in given and "steps" in given:
        raise UserError("--steps and --tokens both say how long to train; give one of them")
    if "tokens" in given:
        base = {**base, "steps": None}
    return _checked(Settings(regime=regime, preset=tuple(presets), given=tuple(sorted(given)), **{**base, **fields}))


def _checked(settings: Settings) -> Settings:
    positive = ("seq_len", "batch_size", "grad_accum", "save_every", "eval_every", "eval_batches", "clip", "lr")
    for name in positive:
        if getattr(settings, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(settings, name)}; expected above 0")
    for name in ("penalty_warmup", "penalty_ramp", "warmup"):
        if not 0 <= getattr(settings, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(settings, name)}; expected a share of the run, "
                            "between 0 and 1")
    if not 0 <= settings.echo <= 1:
        raise UserError(f"--echo is {settings.echo}; expected a share of the rows, between 0 and 1")
    if settings.echo and not settings.data:
        raise UserError("--echo repeats text of --data, and there is none; give --model and --data")
    checkpoint_policy(settings.remat)
    for name in ("steps", "tokens"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected at least 1")
    for name in ("dtype", "master_dtype"):
        if getattr(settings, name) not in ("float32", "bfloat16", *((None,) if name == "dtype" else ())):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(settings, name)!r}; expected float32 or bfloat16")
    for name in ("penalty", "weight_decay", "seed"):
        if getattr(settings, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(settings, name)}; expected at least 0")
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
    """A routed source keeps its own layer; a flag may change its numbers, but not how it is wired (UserError)."""
    asked = layer_of(settings)
    for name in set(STRUCTURE) & set(settings.given):
        if getattr(asked, name) != getattr(own, name):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(asked, name)}, but {source} was trained with "
                            f"{getattr(own, name)}")
    changed = {name: getattr(asked, name) for name in {*LAYER_FIELDS, "rope"} & set(settings.given)}
    return dataclasses.replace(own, **changed)


def model_of(settings: Settings, config: ModelConfig) -> ModelConfig:
    """The model's shape; a plain regime carries `rope` itself, having no layer to carry it."""
    if settings.regime in PLAIN_REGIMES and settings.rope is not None:
        return dataclasses.replace(config, rope=parse_rope(settings.rope))
    return config


def steps_of(settings: Settings, tokens_per_batch: float) -> int:
    """Number of optimiser steps: as given, or as many as the token budget needs (the last one may overshoot it)."""
    if settings.steps is not None:
        return settings.steps
    return max(1, math.ceil(settings.tokens / (tokens_per_batch * settings.grad_accum)))
