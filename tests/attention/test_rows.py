"""Working orders and row limits, against their definitions in numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.attention import reference
from l2a_jax.attention.kernels.plan import Spec, make_plan, row_ranges, segment_ends
from l2a_jax.attention.rows import align_groups, compact, partition, token_rows

IDS = jnp.asarray([[1, 1, 1, 2, 3, 3, 3, 3, 3, 0, 0], [1] * 11, [0, 0, 4, 4, 4, 4, 4, 4, 4, 4, 4]])


@pytest.mark.parametrize("rate", (0.0, 0.3, 1.0))
def test_orders(rate):
    decisions = np.random.default_rng().random((3, 37)) < rate
    order = compact(jnp.asarray(decisions))
    split = align_groups(partition(jnp.asarray(decisions)), jnp.asarray(decisions), 8, 48)
    for b, row in enumerate(decisions):
        routed, others = np.flatnonzero(row), np.flatnonzero(~row)
        assert order.count[b] == routed.size
        np.testing.assert_array_equal(order.index[b, : routed.size], routed)
        assert np.all(np.asarray(order.index[b, routed.size:]) == -1)
        np.testing.assert_array_equal(order.rank[b][routed], np.arange(routed.size))
        start = -(-routed.size // 8) * 8
        index = np.asarray(split.index[b])
        np.testing.assert_array_equal(index[: routed.size], routed)
        np.testing.assert_array_equal(index[start:start + others.size], others)
        assert np.sum(index == -1) == 48 - 37 and split.count[b] == start + others.size
        np.testing.assert_array_equal(index[np.asarray(split.rank[b])], np.arange(37))


@pytest.mark.parametrize("window, sinks", ((None, 0), (1, 0), (4, 0), (2, 3), (50, 2)))
@pytest.mark.parametrize("segment_ids", (None, IDS), ids=("one document", "packed"))
def test_intervals_are_the_oracles_mask(window, sinks, segment_ids):
    shape = (3, 11)
    seen = token_rows(shape, segment_ids, window=window, sinks=sinks).visible(jnp.arange(11))
    mask = (reference.causal_mask(segment_ids, shape) if window is None
            else reference.local_mask(segment_ids, shape, window=window, sinks=sinks))
    np.testing.assert_array_equal(seen, mask)


@pytest.mark.parametrize("kind, window", (("all", 3), ("routed", None), ("mixed", 3)))
def test_row_ranges_count_the_rows_before_a_token(kind, window):
    """Rows at places of their own: a range begins at the first row whose token is no earlier than the block's."""
    rng = np.random.default_rng()
    places = np.stack([np.sort(rng.choice(11, 5, replace=False)) for _ in range(3)])
    decisions = rng.random((3, 5)) < 0.5
    spec = Spec(kind, 11, 2, 1, 16, window, 0, False, placed=5)
    plan = make_plan(spec, 3, jnp.asarray(decisions), None, jnp.asarray(places, jnp.int32))
    ranges = np.asarray(row_ranges(spec, plan, 3, 4))
    member = decisions if kind != "all" else np.ones_like(decisions)
    for b in range(3):
        for block, first in enumerate((0, 4, 8)):
            assert ranges[b, block, 0] == np.sum(member[b] & (places[b] < first))
            assert ranges[b, block, 1] == np.sum(member[b] & (places[b] < min(first + 3, 10)))


def test_segment_ends():
    np.testing.assert_array_equal(
        segment_ends(IDS), [[3, 3, 3, 4, 9, 9, 9, 9, 9, 11, 11], [11] * 11, [2, 2] + [11] * 9])


@pytest.mark.parametrize("kind, window", (("all", 3), ("all", None), ("routed", None), ("mixed", 3)))
def test_row_ranges_hold_every_row_that_sees_a_block(kind, window):
    decisions = jnp.asarray(np.random.default_rng().random((3, 11)) < 0.5)
    spec, keys = Spec(kind, 11, 2, 1, 16, window, 0, True), 4
    plan = make_plan(spec, 3, decisions, IDS)
    ranges = np.asarray(row_ranges(spec, plan, 3, keys))
    everything = decisions if kind == "mixed" else None
    seen = decisions if kind == "routed" else None
    mask = np.asarray(token_rows((3, 11), IDS, window=window, everything=everything, seen=seen).visible(jnp.arange(11)))
    rank = np.broadcast_to(np.arange(11), (3, 11)) if plan.rank is None else np.asarray(plan.rank)
    dead = ~mask.any(2)
    for b in range(3):
        for block in range(3):
            part = mask[b][:, block * keys:(block + 1) * keys]
            groups = ranges[b, block].reshape(-1, 4)
            inside = lambda row, low, high, groups=groups: any(g[low] <= row < g[high] for g in groups)  # noqa: E731
            for token in range(11):
                if part[token].any():
                    assert inside(rank[b, token], 0, 3)
                member = kind != "routed" or bool(decisions[b, token])
                if member and not dead[b, token] and inside(rank[b, token], 1, 2):
                    assert part[token].all()
