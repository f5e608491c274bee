"""What the kernels are told about a call: static facts (`Spec`), small integer tables (`Plan`), and block sizes.

All tables are O(T). Without documents, decisions and places there are none at all: the kernels compute their bounds.
Where queries are a part of the tokens, the kernels count a row's token among the queries, and read what it sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from l2a_jax.attention.reference import Places, at_places, real_tokens, take
from l2a_jax.attention.rows import Rows, align_groups, compact, partition, token_rows

ALIGN = 128  # rows; the second group of a mixed call starts at a multiple of every block of rows


@dataclass(frozen=True)
class Spec:
    """The static facts of a call. `kind`: all rows as they are, only routed rows, or two groups of rows. `length`
    counts the keys, `placed` the queries where they are a part of the tokens."""

    kind: str  # "all", "routed" or "mixed"
    length: int
    heads: int
    kv_heads: int
    width: int
    window: int | None = None
    sinks: int = 0
    segmented: bool = False
    interpret: bool = False  # the kernels run step by step, on any device
    placed: int | None = None

    @property
    def queries(self) -> int:
        """Rows of q."""
        return self.length if self.placed is None else self.placed

    @property
    def rows(self) -> int:
        """Length of the working order."""
        return self.queries if self.kind != "mixed" else -(-self.queries // ALIGN) * ALIGN + ALIGN

    @property
    def ordered(self) -> bool:
        """Whether rows are worked on in an order of their own."""
        return self.kind != "all"

    @property
    def explicit(self) -> bool:
        """Whether a row's keys are read from a table (else they follow from its token's number)."""
        return self.segmented or self.kind == "mixed" or self.placed is not None

    @property
    def bounded_below(self) -> bool:
        """Whether some row may not see key 0."""
        return self.segmented or self.window is not None

    @property
    def group_size(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        """1 / sqrt(H)."""
        return self.width**-0.5


@dataclass(frozen=True)
class Block:
    """Tile sizes of one kernel: `rows` x `keys` scores at a time.

    `flat`: one loop, masked throughout (the compiler turns the branch into selects), in place of two of which the first
    has no mask: fewer registers and one filling of the load pipeline, against more arithmetic.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    flat: bool = False


class Plan(NamedTuple):
    """Integer tables; None where a number follows from the others.

    `limits`: what each query sees. `index` [B, R], `rank`, `count` [B]: the working order (see `Order`). `before`
    [B, T + 1] per group: how many of the group's rows come before a token, plus the row where the group starts. `end`
    [B, T]: one past the last token of a token's document.
    """

    limits: Rows | None = None
    index: Int[Array, "B R"] | None = None
    rank: Int[Array, "B Q"] | None = None
    count: Int[Array, " B"] | None = None
    before: tuple[Int[Array, "B S"], ...] | None = None
    end: Int[Array, "B T"] | None = None

    @property
    def for_rows(self) -> Plan:
        """The part that the kernels over rows read."""
        return Plan(limits=self.limits, index=self.index, count=self.count)


def make_plan(
    spec: Spec, batch: int, decisions: Bool[Array, "B Q"] | None, segment_ids: Int[Array, "B T"] | None,
    places: Places | None = None,
) -> Plan:
    """The tables of a call."""
    shape = (batch, spec.length)
    plan = Plan()
    if spec.explicit:
        everything = decisions if spec.kind == "mixed" else None
        rows = token_rows(shape, segment_ids, window=spec.window, sinks=spec.sinks, everything=everything,
                          places=places)
        sinks = (rows.sink_low, rows.sink_high) if spec.sinks else (None, None)
        high = rows.high if spec.segmented or places is not None else None
        plan = plan._replace(limits=Rows(rows.low if spec.bounded_below else None, high, *sinks))
    if spec.segmented:
        plan = plan._replace(end=segment_ends(segment_ids))
    if spec.kind == "routed":
        alive = decisions
        if segment_ids is not None:
            alive = decisions & at_places(real_tokens(segment_ids, shape), places)
        order = compact(alive)
        before = (_before(alive, spec, places),)
        return plan._replace(index=order.index, rank=order.rank, count=order.count, before=before)
    if spec.kind == "mixed":
        order = align_groups(partition(decisions), decisions, ALIGN, spec.rows)
        start = -(-order.first // ALIGN) * ALIGN
        before = (_before(decisions, spec, places), _before(~decisions, spec, places) + start[:, None])
        return plan._replace(index=order.index, rank=order.rank, count=order.count, before=before)
    if places is not None:
        plan = plan._replace(before=(_before(jnp.ones_like(places, bool), spec, places),))
    return plan


def _before(member: Bool[Array, "B Q"], spec: Spec, places: Places | None) -> Int[Array, "B S"]:
    """How many members come before each token, and before the end."""
    if places is not None:
        member = jnp.zeros((member.shape[0], spec.length), bool).at[
            jnp.arange(member.shape[0])[:, None], places].set(member, mode="drop", unique_indices=True)
    total = jnp.cumsum(member, axis=1, dtype=jnp.int32)
    return jnp.pad(total, ((0, 0), (1, 0)))


def segment_ends(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """One past the last token of each token's document."""
    length = segment_ids.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    is_last = jnp.concatenate([segment_ids[:, 1:] != segment_ids[:, :-1], jnp.ones_like(segment_ids[:, :1], bool)], 1)
    return jax.lax.cummin(jnp.where(is_last, index + 1, length), axis=1, reverse=True)


def row_ranges(spec: Spec, plan: Plan, batch: int, keys: int) -> Int[Array, "B M C"] | None:
    """For every block of `keys` keys, which rows of the working order may see it: per group the numbers
    (begin, full_begin, full_end, end); rows full_begin..full_end - 1 see all of it. None: follows from numbers alone.
    """
    if not spec.explicit and not spec.ordered:
        return None
    first = jnp.arange(0, spec.length, keys)
    last = jnp.minimum(first + keys, spec.length) - 1
    if plan.end is None:
        first_end = last_end = jnp.full((batch, first.size), spec.length, jnp.int32)
    else:
        first_end, last_end = plan.end[:, first], plan.end[:, last]
    columns = []
    windows = {"all": (spec.window,), "routed": (None,), "mixed": (None, spec.window)}[spec.kind]
    for group, window in enumerate(windows):
        full_end, end = first_end, last_end
        if window is not None:
            full_end, end = jnp.minimum(full_end, first + window), jnp.minimum(end, last + window)
        tokens = jnp.stack(jnp.broadcast_arrays(first, last, full_end, end), axis=-1)
        if plan.before is None:
            columns.append(tokens)
        else:
            columns.append(take(plan.before[group], tokens.reshape(batch, -1)).reshape(tokens.shape))
    return jnp.concatenate(columns, axis=-1).astype(jnp.int32)
