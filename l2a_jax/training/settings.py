"""What a run is asked to do: every setting of `train/run.py`, and how presets fill them in.

Settings are resolved in one order: the defaults of `Settings`, then the regime's preset (a named recipe takes its
place), then the named presets, then the flags. The embedded demo (no model, no data) puts its own sizes where the
regime's preset would stand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from l2a_jax import config, fields
from l2a_jax.attention.backends import Backend
from l2a_jax.config import L2AConfig, ModelConfig, RopeScaling
from l2a_jax.data.counts import parse_count, parse_layers, parse_shares
from l2a_jax.data.curriculum import parse_curriculum
from l2a_jax.data.packing import PACKINGS
from l2a_jax.errors import UserError
from l2a_jax.fields import DTYPE, SHARE_OF_RUN, Choice, Distinct, Filled, Mark, Range, Unit, Written, above, count
from l2a_jax.sharding import axes
from l2a_jax.training.presets import DEMO, DEMO_PRETRAIN, PRESETS, RECALL_EMPHASIS
from l2a_jax.training.tables import (
    MIXED,
    NEXT_TOKEN,
    PLAIN_REGIMES,
    REGIME_PRESET,
    REGIMES,
    SALIENCY,
    Cost,
    Minimised,
    Regime,
    Remat,
    TargetTokens,
    check_regime,
)

DIAL, OUTSIDE = Mark.DIAL, Mark.OUTSIDE
STEPS, SHARE = Unit("steps"), Unit("share")
Source = Annotated[str, Filled(), Unit("source"),
                   "hub id, folder, run folder (its newest checkpoint; RUN/checkpoints/best: its best) or .gguf file"]


@dataclass(frozen=True)
class DataSettings:
    """Model and data."""

    model: Annotated[Source | None, OUTSIDE] = None
    data: Annotated[tuple[Annotated[str, Filled(), Unit("text")], ...], OUTSIDE,
                    "wikitext, diverse, RECIPE=DIR, files, folders or globs"] = ()
    seq_len: Annotated[int, fields.length(2), Unit("tokens"), "tokens a row"] = 2_048
    batch_size: Annotated[int, count(), Unit("rows"), "rows a micro-batch"] = 4
    grad_accum: Annotated[int, count(), Unit("batches"), "micro-batches a step"] = 1
    curriculum: Annotated[str | None, Filled(), Unit("stages"),
                          "rows of other lengths, as shares of the run with as many tokens a step, such as "
                          "2048:0.3,8192:0.5,32768:0.2; held-out rows stay those of --seq-len"] = None
    packing: Annotated[str, Choice(*PACKINGS), "documents that never see each other, or one long text"] = "best_fit"
    echo: Annotated[float, fields.between(0, 1, "a share of the rows"), SHARE, OUTSIDE,
                    "share of the rows trained on in which earlier text is repeated"] = 0.0
    ask: Annotated[float, fields.between(0, 1, "a share of the rows"), SHARE, OUTSIDE,
                   "share of the rows trained on that ask for what was said in them"] = 0.0
    answer_weight: Annotated[float, fields.between(1, 1_000, "a weight"), Unit("x"), OUTSIDE,
                             "how much an answer in a row of --ask, or in the demo's, counts in the loss, other tokens "
                             "counting 1"] = 1.0
    unique: Annotated[int | None, count(), Unit("tokens"), Written(parse_count), OUTSIDE,
                      "train on so many tokens of the text alone, over and over, such as 100k (default: all there are)"
                      ] = None


@dataclass(frozen=True)
class LayerSettings:
    """Layer."""

    window: config.Window = L2AConfig.window
    sinks: config.Sinks = L2AConfig.sinks
    topology: config.Topology = L2AConfig.topology
    share_attention: config.ShareAttention = L2AConfig.share_attention
    router_input: config.RouterInput = L2AConfig.router_input
    router_sees: config.RouterSees = L2AConfig.router_sees
    router_hidden: config.RouterHidden = L2AConfig.router_hidden
    rope: Annotated[str | None, Filled(),
                    "none, theta:FACTOR, linear:FACTOR or yarn:FACTOR (default: the model's own)"] = None
    temperature: config.Temperature = L2AConfig.temperature
    threshold: config.Threshold = L2AConfig.threshold


@dataclass(frozen=True)
class RoutingSettings:
    """How routing is trained."""

    objective: Minimised = NEXT_TOKEN
    distill_share: Annotated[float, fields.between(0, 1, "a share of the loss"), SHARE, DIAL,
                             "share of the divergence in --objective mixed; the rest is next-token loss"] = 0.5
    saliency_share: Annotated[float, fields.between(0, 1, "a share of the decisions"), SHARE, DIAL,
                              "share of decisions routed, at random, where --objective saliency takes their worth "
                              "(1: everything)"] = 0.5
    leakage: config.Leakage = L2AConfig.leakage
    flip: config.Flip = L2AConfig.flip
    explore: config.Explore = L2AConfig.explore
    explore_by: config.ExploreBy = L2AConfig.explore_by
    penalty: Annotated[float, fields.at_least(0), DIAL, "maximum of lambda, the weight of mean p^2"] = 0.0
    penalty_warmup: Annotated[float, SHARE_OF_RUN, SHARE, DIAL, "share of the run with lambda 0"] = 0.05
    penalty_ramp: Annotated[float, SHARE_OF_RUN, SHARE, DIAL,
                            "share of the run over which lambda then rises"] = 0.45
    cost: Cost = "tokens"
    target_local: Annotated[float | None,
                            Range(0, 1, False, False, "a share that leaves something to route and something local"),
                            SHARE, DIAL, "share of decisions to be local at the end, in place of --penalty: lambda "
                            "is 0 in the warm-up, then moved so that the ramp leads there"] = None
    target_tokens: TargetTokens = "all"
    forced: Annotated[tuple[Annotated[float, fields.between(0, 1, "a share of the tokens")], ...] | None,
                      Filled("a list"), Unit("shares"), Written(parse_shares), DIAL,
                      "share of tokens routed in each layer (one number: in all), drawn once for every place of a row, "
                      "in place of the router's decisions; the router stays as it is"] = None


@dataclass(frozen=True)
class OptimizerSettings:
    """Length and optimizer."""

    steps: Annotated[int | None, count(), STEPS, DIAL, "optimiser steps; they win over --tokens"] = None
    tokens: Annotated[int | None, Range(1, 2**63 - 1), Unit("tokens"), Written(parse_count), DIAL,
                      "tokens to train on, such as 12M; a row of --ask counts as the text in whose place it stands"
                      ] = 12_000_000
    lr: Annotated[float, above(0), DIAL, "peak learning rate"] = 5e-5
    router_lr: Annotated[float | None, above(0), DIAL, "the router's own (default: --lr)"] = None
    weight_decay: Annotated[float, fields.at_least(0), "of matrices, but for the router"] = 0.0
    warmup: Annotated[float, SHARE_OF_RUN, SHARE, DIAL, "share of the run over which the learning rate rises"] = 0.05
    clip: Annotated[float, above(0), Unit("norm"), "global norm of the gradient"] = 1.0
    attention_layers: Annotated[tuple[Annotated[int, count(0)], ...] | None, Distinct(), Unit("layers"),
                                Written(parse_layers),
                                "train attention in these layers alone, such as 3,5-8 (default: all)"] = None


@dataclass(frozen=True)
class ComputeSettings:
    """Compute."""

    backend: Backend = "auto"
    dtype: Annotated[str | None, DTYPE,
                     "what the forward pass computes in (default: bfloat16; on a CPU float32)"] = None
    master_dtype: Annotated[str, DTYPE, "of trained weights and optimizer"] = "float32"
    remat: Remat = "elementwise"
    unroll: Annotated[bool | None, "a program without a loop over layers: slower to compile, faster on a GPU "
                                   "(default: on a GPU, unless --remat is layer)"] = None
    mesh: Annotated[str | None, Written(axes.written), Unit("axes"),
                    "devices over which rows (data) and the tokens of a row (context) are dealt, such as "
                    "data=2,context=4 (default: one device)"] = None
    deterministic: Annotated[bool, "bit for bit the same on a GPU too, resumed or not; slower"] = False


@dataclass(frozen=True)
class ReportSettings:
    """Checkpoints, evaluation and chance."""

    save_every: Annotated[int, count(), STEPS, OUTSIDE, "steps between two checkpoints"] = 500
    eval_every: Annotated[int, count(), STEPS, OUTSIDE, "steps between two looks at held-out text"] = 250
    eval_batches: Annotated[int, count(), Unit("batches"), OUTSIDE, "held-out batches an evaluation"] = 8
    seed: Annotated[int, fields.SEED, OUTSIDE, "of data, leakage, noise and fresh parameters"] = 0


@dataclass(frozen=True, kw_only=True)
class Settings(DataSettings, LayerSettings, RoutingSettings, OptimizerSettings, ComputeSettings, ReportSettings):
    """What is trained. One run: every setting, in groups that are these base classes; `given` is what a flag or a named
    preset asked for (a routed source's own layer yields only to this)."""

    regime: Regime
    preset: Annotated[tuple[str, ...], OUTSIDE,
                      "values by name, the later one wins and flags override; of a routed --model, either may change "
                      "the layer's numbers, not its wiring"] = ()
    given: Annotated[tuple[str, ...], OUTSIDE, Mark.RECORDED] = ()


def compiled_in(settings: Settings) -> tuple:
    """What a step is compiled from besides shapes and layer: every setting that no mark says to be something else."""
    chosen = (getattr(settings, name) for name, hint in fields.declared(Settings).items()
              if name not in (*LAYER_FIELDS, "rope") and not {DIAL, OUTSIDE} & {*fields.said(hint, Mark)})
    # A target is a number, but it brings its control along; forced shares bring their decisions.
    return settings.target_local is not None, settings.forced is not None, *chosen


def resolve(regime: str, given: dict[str, Any], presets: tuple[str, ...] = (),
            begins: Mapping[str, str] = REGIME_PRESET) -> Settings:
    """All settings of a run from its regime, its named presets and the flags that were `given`. `begins`: the preset
    that each regime begins with.

    Raises UserError on an unknown regime or preset, and where a model comes without data or data without a model:
    there is no default text that would silently decide a result.
    """
    check_regime(regime)
    unknown = [name for name in presets if name not in PRESETS]
    if unknown:
        raise UserError(f"--preset is {unknown[0]!r}; expected one of {', '.join(PRESETS)}")
    values: dict[str, Any] = {}
    unread = unread_of_presets(regime)
    named = ({key: value for key, value in PRESETS[name].values.items() if key not in unread} for name in presets)
    for priced in (*named, given):
        if ("penalty" in priced or priced.get("forced") is not None) and "target_local" not in given:
            values.pop("target_local", None)  # an earlier preset's: the later one says how much stays local
        values |= priced
    asked = tuple(sorted(values))
    values["data"] = tuple(values.get("data") or ())
    if values.get("model") is None and not values["data"]:
        base = DEMO_PRETRAIN if regime == "pretrain" else DEMO
        if values.get("topology") == "sequential":
            base = {**base, "router_input": "pre"}  # there the router reads local attention as it is
    elif values.get("model") is None:
        raise UserError("--data was given without --model; name the model whose tokenizer reads it "
                        "(a hub id, a folder or a .gguf file)")
    elif not values["data"]:
        raise UserError("--model was given without --data; name the text to train on (wikitext, diverse, or files)")
    elif any(PRESETS[name].recipe for name in presets):
        base = {}
    else:
        base = PRESETS[begins[regime]].values if regime in begins else {}
    if "tokens" in given and "steps" in given:
        raise UserError("--steps and --tokens both say how long to train; give one of them")
    if "tokens" in given:
        base = {**base, "steps": None}
    if "penalty" in values or values.get("forced") is not None:
        base = {**base, "target_local": values.get("target_local")}
    if values.get("target_local") is not None:
        if "penalty" in given:
            raise UserError("--penalty and --target-local both say how much stays local; give one of them")
        values["penalty"] = 0.0  # a preset's; the weight is now moved
    if values.get("forced") is not None:
        if given.get("penalty"):
            raise UserError("--penalty is of learned decisions, and --forced leaves none; give one of them")
        values["penalty"] = 0.0
    return _checked(Settings(regime=regime, preset=tuple(presets), given=asked, **{**base, **values}))


def _checked(settings: Settings) -> Settings:
    fields.check(settings)
    if settings.target_local is not None and settings.regime in PLAIN_REGIMES:
        raise UserError(f"--target-local is of decisions, and --regime {settings.regime} runs a plain model, which "
                        "makes none")
    if settings.target_local is not None and settings.penalty:
        raise UserError(f"--penalty is {settings.penalty:g}; expected 0 where --target-local moves the weight")
    if settings.forced is not None:
        why = (f"--regime {settings.regime} runs a plain model, which routes nothing"
               if settings.regime in PLAIN_REGIMES else
               "--target-local moves learned ones" if settings.target_local is not None else
               f"--regime {settings.regime} trains nothing else" if REGIMES[settings.regime] == ("router",) else
               f"--objective {settings.objective}{asked_by(settings, 'objective')} teaches a router"
               if settings.objective != NEXT_TOKEN else
               f"--penalty {settings.penalty:g} is of learned ones" if settings.penalty else None)
        if why is not None:
            raise UserError(f"--forced takes the router's decisions away, but {why}")
    if settings.echo and not settings.data:
        raise UserError("--echo repeats text of --data, and there is none; give --model and --data")
    if settings.unique is not None and not settings.data:
        raise UserError("--unique takes a part of the text of --data, and there is none; give --model and --data")
    if settings.unique is not None and settings.curriculum is not None:
        raise UserError("--unique keeps some rows of one length, and of each length of --curriculum they would be "
                        "other text; give one of them")
    if settings.ask and not settings.data:
        raise UserError("--ask puts questions into text of --data, and there is none; give --model and --data")
    if settings.rope is not None:
        parse_rope(settings.rope)
    if settings.curriculum is not None:
        parse_curriculum(settings.curriculum)
    return settings


def unread_of_presets(regime: str) -> frozenset[str]:
    """The settings of a named preset that the regime reads nothing of: without a router, all that is of one. A flag
    that says the same is refused, or said to have no effect."""
    return ROUTED if regime in PLAIN_REGIMES else frozenset()


def asked_by(settings: Settings, name: str) -> str:
    """Which preset asked for what stands in a setting, in brackets, for messages; nothing where none did."""
    own = REGIME_PRESET.get(settings.regime)
    regimes = own is not None and settings.model is not None and name not in settings.given
    by = [preset for preset in ((own,) if regimes else settings.preset)
          if PRESETS[preset].values.get(name) == getattr(settings, name)]
    return f" (by --preset {by[-1]})" if by else ""


def parse_rope(text: str) -> RopeScaling:
    """`none`, `theta:5`, `linear:5` or `yarn:4` as a RopeScaling."""
    kind, _, factor = text.partition(":")
    try:
        return RopeScaling(kind, float(factor) if factor else 1.0)
    except ValueError as error:
        raise UserError(f"--rope is {text!r}; expected none, theta:FACTOR, linear:FACTOR or yarn:FACTOR "
                        f"({error})") from error


LAYER_FIELDS = tuple(name for name in fields.declared(L2AConfig) if name in {*fields.declared(Settings)} - {"rope"})
ROUTED = frozenset({*fields.declared(LayerSettings), *fields.declared(RoutingSettings), "router_lr"} - {"rope"})
"""Settings of which a plain model has nothing."""
STRUCTURE = ("topology", "share_attention", "router_input", "router_sees", "router_hidden")


def make_layer(given: Mapping[str, Any], own: L2AConfig | None = None) -> L2AConfig:
    """The L2A layer that settings describe: a new one, or `own` with these changes. UserError where they contradict."""
    values = dict(given)
    if values.get("rope") is not None:
        values["rope"] = parse_rope(values["rope"])
    try:
        return L2AConfig(**values) if own is None else dataclasses.replace(own, **values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def layer_of(settings: Settings) -> L2AConfig | None:
    """The L2A layer of a run from a plain model; None for the plain regimes."""
    if settings.regime in PLAIN_REGIMES:
        return None
    return make_layer({name: getattr(settings, name) for name in (*LAYER_FIELDS, "rope")})


def adapt_layer(own: L2AConfig, given: Mapping[str, Any], source: str, named: tuple[str, ...] = ()) -> L2AConfig:
    """A routed source keeps its own layer; what was given by a flag or a preset of `named` may change its numbers, but
    not how it is wired (UserError)."""
    for name in STRUCTURE:
        if given.get(name, getattr(own, name)) != getattr(own, name):
            by = [preset for preset in named if PRESETS[preset].values.get(name) == given[name]]
            raise UserError(f"{fields.flag(name)} is {given[name]}" + (f" by --preset {by[-1]}" if by else "")
                            + f", but {source} was trained with {getattr(own, name)}")
    return make_layer({name: value for name, value in given.items() if name in (*LAYER_FIELDS, "rope")}, own)


def check_target(settings: Settings, layer: L2AConfig | None) -> None:
    """UserError where a target counts tokens of which no row has any."""
    if settings.target_local is None or settings.target_tokens == "all":
        return
    stages = [(settings.seq_len, 1.0)] if settings.curriculum is None else parse_curriculum(settings.curriculum)
    longest = max(length for length, _ in stages)
    if longest <= layer.window + layer.sinks:
        raise UserError(f"--target-tokens {settings.target_tokens}{asked_by(settings, 'target_tokens')} counts tokens "
                        f"with keys beyond --window {layer.window} and --sinks {layer.sinks}, and rows of {longest} "
                        "tokens have none; expected a larger --seq-len, a smaller --window, or --target-tokens all")


def as_used(settings: Settings, layer: L2AConfig) -> Settings:
    """The settings with the layer that is in force, where a source brought its own: what a run records."""
    rope = layer.rope
    spelled = None if rope is None else rope.kind if rope.kind == "none" else f"{rope.kind}:{rope.factor:.17g}"
    return dataclasses.replace(settings, rope=spelled, **{name: getattr(layer, name) for name in LAYER_FIELDS})


def idle(settings: Settings) -> list[tuple[bool, tuple[str, ...], str]]:
    """Where a setting changes nothing, as rules for `commands.say_idle`."""
    s, trained = settings, set(REGIMES[settings.regime])
    return [
        (s.regime in PLAIN_REGIMES, (*LAYER_FIELDS, "router_lr", "penalty", "penalty_warmup", "penalty_ramp", "cost",
                                      "target_tokens"),
         f"--regime {s.regime} runs a plain model, which has no L2A layer"),
        (not trained, ("steps", "tokens", "grad_accum", "curriculum", "echo", "ask", "answer_weight", "unique", "lr",
                       "weight_decay", "warmup", "clip", "master_dtype", "remat", "unroll", "save_every", "eval_every"),
         f"--regime {s.regime} trains nothing"),
        (bool(trained) and not trained & {"attention", "mlp", "embeddings"}, ("weight_decay",),
         f"decay is of matrices, and --regime {s.regime} trains the router and norms alone"),
        (trained == {"router"} and s.router_lr is not None, ("lr",),
         f"--regime {s.regime} trains the router alone, whose rate is --router-lr ({s.router_lr:g})"
         if s.router_lr else ""),
        (s.target_local is None and s.regime not in PLAIN_REGIMES, ("target_tokens",), "there is no --target-local"),
        (s.penalty == 0 and s.target_local is None and s.regime not in PLAIN_REGIMES,
         ("penalty_warmup", "penalty_ramp", "cost"), "--penalty is 0"),
        (s.forced is not None, ("router_lr", "temperature", "threshold", "leakage", "flip", "explore", "explore_by",
                                "penalty_warmup", "penalty_ramp", "cost"), "--forced decides in the router's place"),
        (s.ask == 0 and bool(s.data), ("answer_weight",), "--ask is 0"),
        (s.regime == "pretrain" and not s.data, ("answer_weight",),
         f"the demo's pretraining counts an answer {RECALL_EMPHASIS:g} times"),
        (s.objective != MIXED, ("distill_share",), f"--objective is {s.objective}"),
        (s.explore == 0 and s.regime not in PLAIN_REGIMES, ("explore_by",), "--explore is 0"),
        (s.objective != SALIENCY, ("saliency_share",), f"--objective is {s.objective}"),
        (s.objective == SALIENCY, ("leakage", "flip", "explore", "explore_by"),
         "--objective saliency never runs the router's own decisions"),
        (not s.data, ("packing",), "the synthetic recall corpus is made in whole rows"),
    ]


def model_of(settings: Settings, shape: ModelConfig) -> ModelConfig:
    """The model's shape; a plain regime carries `rope` itself, having no layer to carry it."""
    if settings.regime in PLAIN_REGIMES and settings.rope is not None:
        return dataclasses.replace(shape, rope=parse_rope(settings.rope))
    return shape


def steps_of(settings: Settings, tokens_per_batch: float) -> int:
    """Number of optimiser steps: as given, or as many as the token budget needs (the last one may overshoot it)."""
    if settings.steps is not None:
        return settings.steps
    steps = max(1, math.ceil(settings.tokens / (tokens_per_batch * settings.grad_accum)))
    if steps > fields.MOST:
        raise UserError(f"--tokens {settings.tokens} are {steps:,} steps; expected at most {fields.MOST:,}")
    return steps
