"""What a model, an arm of an experiment and a recipe are: frozen values, with the presets by name.

An *arm* is one way to train. What its compiled program depends on (shapes, the kind of attention) is static; what
differs only in numbers (the gate's scale, what is trained, which layers are gated) is traced, so that learned, frozen
random and constant gates run the same program.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from l2a_jax.errors import UserError

SOFT = ("none", "multiplicative", "additive")
SELECT = ("none", "gate", "selector", "oracle", "used", "random", "window")
SCORES = ("own", "shuffled", "other_text")
CONVENTIONS = ("after", "before")
ROUTING = ("none", "learned", "random", "hash")


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

    vocab_size: int = 50_257
    layers: int = 6
    width: int = 256
    heads: int = 4
    hidden: int = 1_024
    positions: int = 512
    tied: bool = True
    dropout: float = 0.1
    gate_width: int = 32
    experts: int = 0
    """Above 0: the feed-forward layer's hidden units are divided among so many experts, one of which serves a token."""
    init_std: float = 0.02
    gate_std: float = 0.02
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
    gate_std: float | None = None
    """Deviation of the gate's initial weights; None takes the model's, 0 makes a constant gate (sigmoid(0) = 0.5)."""
    gate_trained: bool = True
    gate_width: int | None = None
    gated_layers: tuple[int, ...] | None = None
    """None: all."""
    frozen_qkv: tuple[int, ...] = ()
    """Layers whose Q, K and V stay as they were drawn."""
    routing: str = "none"
    """Of a mixture of experts in place of the feed-forward layer."""

    def model(self, config: TransformerConfig, experts: int) -> TransformerConfig:
        """The arm's model: `config` with the arm's own gate width and experts."""
        return dataclasses.replace(config, gate_width=self.gate_width or config.gate_width,
                                   experts=0 if self.routing == "none" else experts)


@dataclass(frozen=True)
class Recipe:
    """How every arm is trained, the same for all; AdamW with warm-up, cosine to 0, clipping by global norm."""

    steps: int = 50_000
    batch_size: int = 16
    seq_len: int = 512
    learning_rate: float = 3e-4
    warmup: int = 1_000
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    balance: float = 0.01
    """Weight of the load-balance loss of a learned router of experts (Fedus et al. 2022, equation 4)."""
    distill_steps: int = 1_000
    distill_learning_rate: float = 1e-3
    dtype: str = "float32"
    """What is computed in; masters, optimizer, norms' statistics, softmax and loss are float32."""


@dataclass(frozen=True)
class Preset:
    """Everything of a suite but its data and its arms."""

    model: TransformerConfig
    recipe: Recipe
    seeds: tuple[int, ...]
    top_k: int
    """Keys that a query keeps; the published 64 of 512."""
    top_ks: tuple[int, ...]
    gate_widths: tuple[int, ...]
    experts: int
    eval_batches: int
    scan: int
    """Steps in one dispatch."""
    save_every: int
    together: int = 1
    """Arms of one program trained side by side, beside the seeds."""


_PAPER = TransformerConfig()
_TOP_KS, _WIDTHS = (16, 32, 64, 128, 256), (8, 128)

PRESETS = {
    "tiny": Preset(
        TransformerConfig(vocab_size=0, layers=2, width=64, heads=2, hidden=128, positions=64, dropout=0.0,
                          gate_width=8, init_std=0.08, gate_std=0.04),
        Recipe(steps=80, batch_size=8, seq_len=64, learning_rate=5e-3, warmup=15, distill_steps=40,
               distill_learning_rate=1e-2),
        seeds=(0, 1), top_k=8, top_ks=(4, 8, 16), gate_widths=(2,), experts=4, eval_batches=8, scan=40,
        save_every=10_000, together=2),
    "gpu": Preset(
        dataclasses.replace(_PAPER, dropout=0.0),  # about one pass over the text: nothing to hold back from
        Recipe(steps=3_000, warmup=200, learning_rate=1e-3, dtype="bfloat16"),
        seeds=(42, 123, 456), top_k=64, top_ks=_TOP_KS, gate_widths=_WIDTHS, experts=8, eval_batches=32, scan=100,
        save_every=100_000),
    "paper": Preset(_PAPER, Recipe(), seeds=(42, 123, 456), top_k=64, top_ks=_TOP_KS, gate_widths=_WIDTHS, experts=8,
                    eval_batches=200, scan=100, save_every=2_500),
}


def check(preset: Preset) -> None:
    """Raise UserError where the parts of a preset (after flags) do not fit each other."""
    model, recipe = preset.model, preset.recipe
    conditions = [
        (recipe.steps >= 1, f"--steps is {recipe.steps}; expected at least 1"),
        (recipe.batch_size >= 1, f"--batch-size is {recipe.batch_size}; expected at least 1"),
        (2 <= recipe.seq_len <= model.positions,
         f"--seq-len is {recipe.seq_len}; expected 2 to the model's {model.positions} positions"),
        (1 <= preset.top_k <= recipe.seq_len, f"--top-k is {preset.top_k}; expected 1 to {recipe.seq_len}"),
        (len(set(preset.seeds)) == len(preset.seeds) >= 1, f"--seeds are {preset.seeds}; expected different numbers"),
        (model.width % model.heads == 0, f"width {model.width} does not divide among {model.heads} heads"),
        (model.hidden % preset.experts == 0, f"hidden {model.hidden} does not divide among {preset.experts} experts"),
        (recipe.dtype in ("float32", "bfloat16"), f"--dtype is {recipe.dtype!r}; expected float32 or bfloat16"),
        (0 < recipe.learning_rate < 1, f"--lr is {recipe.learning_rate}; expected a number between 0 and 1"),
        (0 <= model.dropout < 1, f"--dropout is {model.dropout}; expected 0 to below 1"),
        (recipe.distill_steps >= 1, f"--distill-steps is {recipe.distill_steps}; expected at least 1"),
    ]
    for good, message in conditions:
        if not good:
            raise UserError(message)


def digest(*values: Any) -> str:
    """A short name for any values that JSON can write, dataclasses and named tuples included."""
    def written(value):
        return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)

    return hashlib.sha256(json.dumps(values, default=written, sort_keys=True).encode()).hexdigest()[:12]
