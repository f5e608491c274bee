"""A training step over many cards, reckoned before there are any: bytes held and moved on each, and where time goes.

    plan(Case("8 cards", "l2a_ft", Axes(data=1, context=8), rows=1), MODELS["qwen2.5-7b"], layer, seq_len=131_072)

`l2a_jax/SCALE.md` shows what comes of it. Every product is counted, at a share of what a card could do at best. Work
and what is moved may overlap in full or not at all: a step takes from the longer of both to their sum.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2a_jax.config import MODELS, L2AConfig, ModelConfig
from l2a_jax.models.params import Tree, abstract_params, by_path
from l2a_jax.sharding import leaves
from l2a_jax.sharding.axes import Axes
from l2a_jax.training.estimate import Held, held, weight_bytes
from l2a_jax.training.optimizer import Dials, OptimizerConfig, is_matrix, make_optimizer
from l2a_jax.training.regimes import partition, regime_mask
from l2a_jax.training.step import initial_state

DTYPE, MASTERS = jnp.bfloat16, jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Card:
    """A card and its links, by its maker's sheet: bytes, bfloat16 operations a second and the share of them that is
    attained, bytes a second from cards of its own machine and from others, cards of a machine."""

    memory: float = 80e9
    operations: float = 989e12
    attained: float = 0.5
    near: float = 450e9
    far: float = 50e9
    together: int = 8


class Case(NamedTuple):
    """A run: `rows` rows a step over a mesh. `shards`: over how many devices each leaf is dealt, each group of so many
    holding a copy (None: over all, which is what `--mesh` does)."""

    name: str
    regime: str
    axes: Axes
    rows: int
    shards: int | None = None


class Moved(NamedTuple):
    """Bytes that come to each device in a step: weights (those of layers forward and again backward, others once),
    their gradients on the way to those who hold them, keys and values of the other parts of a row (forward, again, and
    their gradients), and sums of gradients over those who hold the same part."""

    weights: int
    gradients: int
    keys: int
    copies: int


class Seconds(NamedTuple):
    """What a device would spend on each part of a step if it did nothing else meanwhile."""

    products: float
    attention: float
    weights: float
    gradients: float
    keys: float
    copies: float

    @property
    def least(self) -> float:
        """Of a step in which what is moved is hidden behind the work, or the work behind that."""
        return max(self.products + self.attention, self.weights + self.gradients + self.keys + self.copies)


class Plan(NamedTuple):
    """A step on paper. `whole`: bytes of weights and optimizer that no dimension can divide, which every device holds
    (they are in `held`); `part`: of one layer's weights that come from one device."""

    case: Case
    held: Held
    whole: int
    part: int
    moved: Moved
    seconds: Seconds


def plan(case: Case, config: ModelConfig, layer: L2AConfig, *, seq_len: int, routed: float = 0.2,
         remat: str = "layer", card: Card = Card()) -> Plan:
    """Of one step of the case over rows of `seq_len` tokens, a share `routed` of whose decisions are global."""
    abstract = abstract_params(config, layer, DTYPE)
    mask = regime_mask(abstract, case.regime)
    trainable, frozen = partition(abstract, mask)
    optimizer = make_optimizer(OptimizerConfig(case.regime), Dials(1e-5, 1e-5, 1_000))
    like = jax.eval_shape(functools.partial(initial_state, optimizer=optimizer, master_dtype=MASTERS), trainable)
    axes, shards = case.axes, case.shards or case.axes.devices
    tokens = case.rows // axes.data * seq_len // axes.context
    moved = moved_bytes(config, layer, case, trainable, abstract, seq_len=seq_len)
    products, attention = operations(config, layer, mask, seq_len=seq_len, routed=routed)
    speed = card.operations * card.attained
    among = card.near if shards <= card.together else card.far
    row = card.near if axes.context <= card.together else card.far
    return Plan(case, held(like, frozen, config, layer, axes=axes, rows=case.rows, seq_len=seq_len, remat=remat,
                           dtype=DTYPE, shards=shards),
                leaves.whole_bytes((like, frozen), shards), weight_bytes(config, layer, DTYPE)[0] // shards, moved,
                Seconds(tokens * products / speed, tokens * attention / speed, moved.weights / among,
                        moved.gradients / among, moved.keys / row, moved.copies / card.far))


def moved_bytes(config: ModelConfig, layer: L2AConfig, case: Case, trainable: Tree, params: Tree, *, seq_len: int
                ) -> Moved:
    """What comes to each device in a step of one micro-batch."""
    axes, shards, size = case.axes, case.shards or case.axes.devices, jnp.dtype(DTYPE).itemsize

    def dealt(tree):
        parts = jax.tree.map(lambda leaf, spec: math.prod(leaf.shape) * size if len(spec) else 0, tree,
                             leaves.specs(tree, shards))
        return sum(jax.tree.leaves(parts))

    def all_but_own(size, parts):
        return size * (parts - 1) // parts

    sets = 1 if layer.share_attention else 2
    keys = sets * 2 * config.num_kv_heads * config.head_dim * case.rows // axes.data * seq_len * size
    trained = dealt(trainable) // size * MASTERS.itemsize
    # What is whole everywhere is summed over all; what is dealt, over the copies of each part. A sum goes round twice.
    copied = trained // shards, axes.devices // shards
    whole = sum(math.prod(leaf.shape) * MASTERS.itemsize for leaf in jax.tree.leaves(trainable)) - trained
    weights = dealt(params) + dealt({"layers": params["layers"]})
    return Moved(all_but_own(weights, shards), all_but_own(trained, shards),
                 3 * config.num_layers * all_but_own(keys, axes.context),
                 2 * all_but_own(*copied) + 2 * all_but_own(whole, axes.devices))


def operations(config: ModelConfig, layer: L2AConfig, mask: Tree, *, seq_len: int, routed: float
               ) -> tuple[float, float]:
    """Of a token and step: those of matrix products, and those of attention.

    A product costs 2 a weight: forward, again backward where it is computed anew, for the gradient of what it is
    applied to, and for that of the weight where it is trained; the output matrix is not computed anew. Attention costs
    4 a key and number of all heads' queries, twice forward and 2.5 times that backward. Global attention sees half a
    row on average.
    """
    sizes = by_path(abstract_params(config, layer))
    trained = by_path(mask)
    head = "embed/embedding" if config.tie_embeddings else "unembed/kernel"
    products = sum(2 * math.prod(leaf.shape) * (3 + trained[path] - (path == head)) for path, leaf in sizes.items()
                   if is_matrix(path) and (path.startswith("layers/") or path == head))
    keys = min(layer.window + layer.sinks, seq_len) + routed * seq_len / 2
    return products, 4 * config.num_heads * config.head_dim * config.num_layers * keys * (2 + 2.5)


MODEL, LAYER, SEQ_LEN = "qwen2.5-7b", L2AConfig(window=1_024, sinks=4), 131_072
CASES = (
    Case("8 cards", "l2a_ft", Axes(1, 8), 1),
    Case("8 cards", "full_ft", Axes(1, 8), 1),
    Case("1,024 cards", "full_ft", Axes(128, 8), 128),
    Case("896 cards", "full_ft", Axes(112, 8), 112),
    Case("1,024 cards, leaves over 8", "full_ft", Axes(128, 8), 128, shards=8),
)
HELD = {"frozen": "frozen weights", "masters": "masters", "optimizer": "optimizer", "gradients": "gradients",
        "gathered": "weights gathered", "kept": "kept for the backward pass", "working": "a layer at work"}
MOVED = {"weights": "weights", "gradients": "gradients to those who hold them", "keys": "keys and values",
         "copies": "sums over copies"}
TIMES = {"products": "matrix products", "attention": "attention", **MOVED}


def table() -> str:
    """The cases in Markdown, a column each."""
    plans = [plan(case, MODELS[MODEL], LAYER, seq_len=SEQ_LEN) for case in CASES]

    def line(name, cell):
        return f"| {name} | " + " | ".join(map(cell, plans)) + " |"

    def parts(of, names, unit, form):
        return [line(f"{of}, {unit}: {told}", lambda found, name=name: form(getattr(getattr(found, of), name)))
                for name, told in names.items()]

    def gb(size):
        return f"{size / 1e9:.1f}"

    def speed(found):
        each = found.case.rows * SEQ_LEN / found.case.axes.devices
        return f"{each / sum(found.seconds):,.0f} to {each / found.seconds.least:,.0f}"

    return "\n".join([
        line("", lambda found: found.case.name), "|---|" + "---|" * len(plans),
        line("`--regime`", lambda found: f"`{found.case.regime}`"),
        line("`--mesh`", lambda found: str(found.case.axes)),
        line("tokens a step", lambda found: f"{found.case.rows * SEQ_LEN:,}"),
        *parts("held", HELD, "GB", gb),
        line("**held, GB**", lambda found: f"**{gb(found.held.total)}**"),
        line("of which on every card whole", lambda found: gb(found.whole)),
        *parts("moved", MOVED, "GB", gb),
        line("a layer's part of one card, MB", lambda found: f"{found.part / 1e6:.1f}"),
        *parts("seconds", TIMES, "s", lambda seconds: f"{seconds:.2f}"),
        line("**a step, s**", lambda found: f"**{found.seconds.least:.1f} to {sum(found.seconds):.1f}**"),
        line("tokens a second and card", speed)])
