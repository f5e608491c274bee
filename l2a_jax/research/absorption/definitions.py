"""What a model, an arm of an experiment and a recipe are: frozen values, with the presets by name.

An *arm* is one way to train. What its compiled program depends on (shapes, the kind of attention) is static; what
differs only in numbers (the gate's scale, what is trained, which layers are gated) is traced, so that learned, frozen
random and constant gates run the same program.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from l2a_jax import fields
from l2a_jax.errors import UserError
from l2a_jax.fields import DTYPE, SEED, Choice, Distinct, Range, Unit, above, at_least, between, count, length

SOFT = ("none", "multiplicative", "additive")
SELECT = ("none", "gate", "selector", "oracle", "used", "random", "window")
SCORES = ("own", "shuffled", "other_text")
CONVENTIONS = ("after", "before")
ROUTING = ("none", "learned", "random", "hash")
_BELOW_1 = Range(0, 1, high_included=False)
_RATE = Range(0, 1, low_included=False, high_included=False)


class Attention(NamedTuple):
    """How every gated layer attends. All fields together are hashable (training compiles one program for each
    value); `indexed` turns the choices into integers, so that one compiled program evaluates them all.

    S are the scaled products of queries and keys, G the gate's, both [heads, T, T].
    """

    soft: str | int = "none"
    """What the gate does to S before the softmax: nothing, S * sigmoid(G) (published), or S + log sigmoid(G)."""
    select: str | int = "none"
    """Which k keys a query keeps: all, the top k of G, of a distilled `selector` gate, of S (the oracle), of the
    logits in use after `soft`, of fresh noise, or the nearest ones."""
    convention: str | int = "after"
    """Top k of the visible keys (`after` the causal mask), or of all T keys, of which the visible ones stay
    (`before`, published: a query may keep no key at all, and then attends to nothing)."""
    scores: str | int = "own"
    """Whose G: the query's own, its own in another order of the keys, or another text's of the batch. Controls."""
    straight_through: bool = False
    """Keep the hard mask's value but sigmoid(G)'s gradient."""
    hard_rows: float = 1.0
    """Share of the batch's rows that are masked; below 1 the masked rows go without `soft`, the others without mask
    (a backbone trained on its own hard path)."""
    indexer: bool = False
    """Train the gate by its KL divergence to the model's own attention instead of the language model's loss."""

    @property
    def is_static(self) -> bool:
        """Whether the choices are names, known when a program is compiled."""
        return isinstance(self.select, str)

    @property
    def is_dense(self) -> bool:
        """Known to be plain causal attention when a program is compiled."""
        return self.is_static and self.soft == "none" and self.select == "none"

    @property
    def selects(self) -> bool:
        """Whether some keys may be masked beside the future ones; assumed where it is not known."""
        return not self.is_static or self.select != "none"

    @property
    def gate_has_gradient(self) -> bool:
        """Whether any loss reaches the gate of a (static) choice; through a hard top k none does."""
        return self.soft != "none" or self.straight_through or self.indexer

    def indexed(self) -> Attention:
        """The same with `soft`, `select`, `convention` and `scores` as integers."""
        return self._replace(soft=SOFT.index(self.soft), select=SELECT.index(self.select),
                             convention=CONVENTIONS.index(self.convention), scores=SCORES.index(self.scores))


DENSE = Attention()
SOFT_GATE = Attention("multiplicative")
HARD = Attention(select="gate")


@dataclass(frozen=True)
class TransformerConfig:
    """Pre-norm transformer with LayerNorm, GELU and learned positions (arXiv 2603.02227, section 3.1)."""

    vocab_size: Annotated[int, count(0)] = 50_257
    """0: the corpus's."""
    layers: Annotated[int, count()] = 6
    width: Annotated[int, count()] = 256
    heads: Annotated[int, count()] = 4
    hidden: Annotated[int, count()] = 1_024
    positions: Annotated[int, length(2)] = 512
    tied: bool = True
    dropout: Annotated[float, _BELOW_1, "share of activations"] = 0.1
    gate_width: Annotated[int, count()] = 32
    experts: Annotated[int, count(0)] = 0
    """Above 0: the feed-forward layer's hidden units are divided among so many experts, one of which serves a token."""
    init_std: Annotated[float, at_least(0)] = 0.02
    gate_std: Annotated[float, at_least(0)] = 0.02
    """Of the gates; over LayerNorm's unit inputs the published 0.02 at width 256 gives sd(G) = 0.1, so that
    sigmoid(G) = 0.500 +- 0.026: a frozen random gate is nearly a constant."""

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class Arm:
    """One way to train, under a name."""

    name: str
    attention: Attention = DENSE
    gate_std: Annotated[float | None, at_least(0)] = None
    """Deviation of the gate's initial weights; None takes the model's, 0 makes a constant gate (sigmoid(0) = 0.5)."""
    gate_trained: bool = True
    gate_width: Annotated[int | None, count()] = None
    gated_layers: tuple[Annotated[int, count(0)], ...] | None = None
    """None: all."""
    frozen_qkv: tuple[Annotated[int, count(0)], ...] = ()
    """Layers whose Q, K and V stay as they were drawn."""
    routing: Annotated[str, Choice(*ROUTING)] = "none"
    """Of a mixture of experts in place of the feed-forward layer."""
    rate: Annotated[float, above(0)] = 1.0
    """Of all but the gate, times the recipe's learning rate."""
    gate_rate: Annotated[float, above(0)] = 1.0
    """Of the gate, times the recipe's learning rate."""

    def __post_init__(self):
        fields.check(self, spell=lambda name: f"{name} of the arm {self.name!r}")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its weights: no name, and no rates where they are those of the first arms."""
        found = dataclasses.asdict(dataclasses.replace(self, name=""))
        return {name: value for name, value in found.items() if name not in ("rate", "gate_rate") or value != 1}

    def model(self, config: TransformerConfig, experts: int) -> TransformerConfig:
        """The arm's model: `config` with the arm's own gate width and experts."""
        return dataclasses.replace(config, gate_width=self.gate_width or config.gate_width,
                                   experts=0 if self.routing == "none" else experts)


@dataclass(frozen=True)
class Recipe:
    """How every arm is trained, the same for all; AdamW with warm-up, cosine to 0, clipping by global norm."""

    steps: Annotated[int, count(), Unit("steps"), "of every arm"] = 50_000
    batch_size: Annotated[int, count(), Unit("rows"), "rows a step"] = 16
    seq_len: Annotated[int, length(2), Unit("tokens"), "tokens a row"] = 512
    learning_rate: Annotated[float, _RATE, Unit("rate"), "peak learning rate"] = 3e-4
    warmup: Annotated[int, count(0), Unit("steps"), "steps of warm-up"] = 1_000
    weight_decay: Annotated[float, at_least(0), "of AdamW"] = 0.1
    beta1: Annotated[float, _BELOW_1] = 0.9
    beta2: Annotated[float, _BELOW_1] = 0.95
    clip: Annotated[float, above(0)] = 1.0
    balance: Annotated[float, at_least(0)] = 0.01
    """Weight of the load-balance loss of a learned router of experts (Fedus et al. 2022, equation 4)."""
    distill_steps: Annotated[int, count(), Unit("steps"), "of every distilled gate"] = 1_000
    distill_learning_rate: Annotated[float, _RATE, Unit("rate"), "of distilled gates"] = 1e-3
    dtype: Annotated[str, DTYPE, "what is computed in"] = "float32"
    """Masters, optimizer, norms' statistics, softmax and loss are float32."""


@dataclass(frozen=True)
class SuiteConfig:
    """Everything of a suite but its data and its arms."""

    model: TransformerConfig
    recipe: Recipe
    seeds: Annotated[tuple[Annotated[int, SEED], ...], Distinct(), "trained side by side"]
    top_k: Annotated[int, length(), Unit("keys"), "keys that a query keeps; the published 64 of 512"]
    top_ks: tuple[Annotated[int, length()], ...]
    gate_widths: tuple[Annotated[int, count()], ...]
    experts: Annotated[int, count()]
    eval_batches: Annotated[int, count(), Unit("batches"), "held-out batches, at most"]
    scan: Annotated[int, count()]
    """Steps in one dispatch."""
    save_every: Annotated[int, count(), Unit("steps"), "steps between two checkpoints of an arm"]
    together: Annotated[int, between(1, 1_000), Unit("arms"),
                        "arms of one program trained side by side, beside the seeds"] = 1


_PAPER = TransformerConfig()
_TOP_KS, _WIDTHS = (16, 32, 64, 128, 256), (8, 128)

PRESETS = {
    "tiny": SuiteConfig(
        TransformerConfig(vocab_size=0, layers=2, width=64, heads=2, hidden=128, positions=64, dropout=0.0,
                          gate_width=8, init_std=0.08, gate_std=0.04),
        Recipe(steps=80, batch_size=8, seq_len=64, learning_rate=5e-3, warmup=15, distill_steps=40,
               distill_learning_rate=1e-2),
        seeds=(0, 1), top_k=8, top_ks=(4, 8, 16), gate_widths=(2,), experts=4, eval_batches=8, scan=40,
        save_every=10_000, together=2),
    "gpu": SuiteConfig(
        dataclasses.replace(_PAPER, dropout=0.0),  # about one pass over the text: nothing to hold back from
        Recipe(steps=3_000, warmup=200, learning_rate=1e-3, dtype="bfloat16"),
        seeds=(42, 123, 456), top_k=64, top_ks=_TOP_KS, gate_widths=_WIDTHS, experts=8, eval_batches=32, scan=100,
        save_every=100_000),
    "paper": SuiteConfig(_PAPER, Recipe(), seeds=(42, 123, 456), top_k=64, top_ks=_TOP_KS, gate_widths=_WIDTHS,
                         experts=8, eval_batches=200, scan=100, save_every=2_500),
}
PRESETS |= {f"paper-{steps}": dataclasses.replace(PRESETS["paper"], recipe=Recipe(steps=steps, warmup=max(
    200, steps // 50))) for steps in (3_000, 10_000, 20_000)}  # the paper's setting, but for its length


FLAGS: dict[str, tuple[type, str]] = {
    "seeds": (SuiteConfig, "seeds"), "steps": (Recipe, "steps"), "batch_size": (Recipe, "batch_size"),
    "seq_len": (Recipe, "seq_len"), "lr": (Recipe, "learning_rate"), "warmup": (Recipe, "warmup"),
    "weight_decay": (Recipe, "weight_decay"), "dropout": (TransformerConfig, "dropout"), "dtype": (Recipe, "dtype"),
    "top_k": (SuiteConfig, "top_k"), "distill_steps": (Recipe, "distill_steps"),
    "distill_lr": (Recipe, "distill_learning_rate"), "eval_batches": (SuiteConfig, "eval_batches"),
    "together": (SuiteConfig, "together"), "save_every": (SuiteConfig, "save_every")}
"""By flag: which number of a preset it replaces."""
_SPELLED = {name: flag for flag, (_, name) in FLAGS.items()}


def changed(preset: SuiteConfig, given: Mapping[str, Any], tied: bool) -> SuiteConfig:
    """The preset with the numbers of `FLAGS` that were given; its `top_k` is one of its `top_ks`."""
    numbers: dict[type, dict[str, Any]] = {TransformerConfig: {"tied": tied}, Recipe: {}, SuiteConfig: {}}
    for flag, value in given.items():
        kind, name = FLAGS[flag]
        numbers[kind][name] = value
    preset = dataclasses.replace(preset, model=dataclasses.replace(preset.model, **numbers[TransformerConfig]),
                                 recipe=dataclasses.replace(preset.recipe, **numbers[Recipe]), **numbers[SuiteConfig])
    return dataclasses.replace(preset, top_ks=tuple(sorted({*preset.top_ks, preset.top_k})))


def check_ranges(preset: SuiteConfig) -> None:
    """Raise UserError, naming the flag, where a number of a preset (after flags) is none that it can be."""
    for part in (preset.model, preset.recipe, preset):
        fields.check(part, spell=lambda name: fields.flag(_SPELLED.get(name, name)),
                     names=[name for name in fields.declared(type(part)) if name not in ("model", "recipe")])


def check(preset: SuiteConfig) -> None:
    """Raise UserError where a number of a preset (after flags) cannot be, or its parts do not fit each other."""
    check_ranges(preset)
    model, recipe = preset.model, preset.recipe
    conditions = [
        (recipe.seq_len <= model.positions,
         f"--seq-len is {recipe.seq_len}; expected 2 to the model's {model.positions} positions"),
        (preset.top_k <= recipe.seq_len, f"--top-k is {preset.top_k}; expected 1 to {recipe.seq_len}"),
        (model.width % model.heads == 0, f"width {model.width} does not divide among {model.heads} heads"),
        (model.hidden % preset.experts == 0, f"hidden {model.hidden} does not divide among {preset.experts} experts"),
    ]
    for good, message in conditions:
        if not good:
            raise UserError(message)


def digest(*values: Any) -> str:
    """A short name for any values that JSON can write, dataclasses and named tuples included."""
    def written(value):
        return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)

    return hashlib.sha256(json.dumps(values, default=written, sort_keys=True).encode()).hexdigest()[:12]
