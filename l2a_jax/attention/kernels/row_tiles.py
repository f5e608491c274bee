"""Tiles of rows, for the kernels that work row by row: which is a program's own, and the walk over the keys it sees.

The forward kernel and that of the queries' gradients are one program per tile of rows and query head; they differ in
what they make of a block of scores. Routed rows are gathered where they are loaded and scattered where they are stored;
programs beyond the number of routed rows return at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from l2a_jax.attention.kernels import split
from l2a_jax.attention.kernels import tile as t
from l2a_jax.attention.kernels.launch import launch, pl
from l2a_jax.attention.kernels.plan import Block, Plan, Spec
from l2a_jax.attention.kernels.tile import Exist, HeadsRef, KeysRef, Number, Tokens
from l2a_jax.attention.reference import Heads, Keys
from l2a_jax.attention.rows import Rows

Numbers = tuple[Number, Number, Number, Number]


class RowTile(NamedTuple):
    """A program's tile: rows start.. of the working order (which has `count`) and a query head.

    `share`: the program's number, and which part of how many it takes of the tile's keys (None: tiles are never
    shared). `tokens`: whose rows they are, and `exist`: which there are. `extremes` of `limits`, what each row sees:
    every live one sees low_max..high_min, none sees outside low_min..high_max but the sinks.
    """

    spec: Spec
    block: Block
    plan: Plan
    k: KeysRef
    v: KeysRef
    batch: Number
    start: Number
    head: Number
    kv_head: Number
    count: Number | int
    share: tuple[Number, Number, Number] | None
    tokens: Tokens
    exist: Exist
    limits: Rows
    extremes: Numbers

    @property
    def numbers(self) -> Tokens:
        """Of the rows, in the working order."""
        return self.start + jnp.arange(self.block.rows)

    def view(self, ref: HeadsRef) -> Any:
        """The tile's tokens and head of `ref`, to be used under the mask `exist`."""
        if self.plan.index is None:
            return ref.at[self.batch, pl.ds(self.start, self.block.rows), self.head, :]
        return t.gathered(ref, self.batch, self.tokens, self.head)

    def walk(self, query: Float[Array, "rows H"], visit: Callable, carry: Any) -> Any:
        """carry = visit(scores, keys, load_values, carry) for blocks of keys: the sinks, then the program's share of
        what the rows see beside them. Invisible scores are -inf."""
        spec, block, limits = self.spec, self.block, self.limits
        ragged = spec.length % block.keys != 0

        def look(first, size, limit, visible, edge, carry):
            keys, values = (functools.partial(t.load_tokens, ref, self.batch, first, size, self.kv_head, limit)
                            for ref in (self.k, self.v))
            keys = keys()
            return visit(t.hide(t.dot(query, keys, trans_b=True), visible, edge), keys, values, carry)

        def step(i, carry, edge):
            first = i * block.keys
            number = first + jnp.arange(block.keys)[None, :]
            low = None if limits.low is None else limits.low[:, None]
            limit = spec.length if ragged and edge is not False else None
            return look(first, block.keys, limit, lambda: t.see(low, limits.high[:, None], number), edge, carry)

        def sink_step(first, carry):
            number = first + jnp.arange(_sink_block(spec))[None, :]
            visible = t.see(limits.sink_low[:, None], limits.sink_high[:, None] - 1, number)
            return look(first, _sink_block(spec), spec.length, lambda: visible, True, carry)

        if spec.sinks:
            carry = _sink_sweep(spec, limits, sink_step, carry)
        bounds = _key_bounds(self.extremes, block.keys)
        if self.share is not None:
            bounds = split.part_bounds(bounds, *self.share[1:])
        return _sweep(bounds, step, carry, flat=block.flat, bounded_below=spec.bounded_below)

    def store(self, whole: Callable[[], None], *shares: tuple[Any, Float[Array, "rows ..."]]) -> None:
        """`whole()` where the tile is this program's alone, else each of its `shares`, (ref, value), in its place."""
        if self.share is None:
            whole()
            return
        number, _, parts = self.share
        pl.when(parts == 1)(whole)

        @pl.when(parts > 1)
        def _():
            place = pl.ds(number * self.block.rows, self.block.rows)
            for ref, value in shares:
                ref[self.batch, self.head, place] = value


def over_row_tiles(
    run: Callable[..., None], name: str, spec: Spec, block: Block, plan: Plan, q: Heads, k: Keys, v: Keys,
    inputs: tuple[Array, ...], shapes: list[jax.ShapeDtypeStruct], shared: int,
) -> tuple[Array, ...]:
    """Arrays of `shapes`, which `run(tile, q, *inputs, *outputs)` fills for every tile of rows and every head.

    Where tiles are shared, `shared` more outputs take the shares, of which `split.join` completes the first two.
    """
    batch, room = q.shape[0], split.places(spec, q.shape[0])
    # Only routed calls leave rows unwritten: these start as zeros.
    blank = jnp.zeros_like(q) if spec.kind == "routed" else None
    outputs = launch(
        functools.partial(_kernel, run=run, spec=spec, block=block, room=room),
        name, shapes + (split.part_shapes(spec, block, batch)[:shared] if room else []),
        t.grid(spec.heads, max(pl.cdiv(spec.rows, block.rows), room), batch, interleave=spec.ordered),
        warps=block.num_warps, stages=block.num_stages, interpret=spec.interpret,
        aliases={} if blank is None else {0: 0},
    )(blank, q, k, v, plan.for_rows, *inputs)
    (whole, numbers, *others), parts = outputs[:len(shapes)], outputs[len(shapes):]
    if room > 1:
        whole, numbers = split.join(spec, block, plan, whole, numbers, tuple(parts))
    return whole, numbers, *others


def _kernel(blank: HeadsRef | None, q_ref: HeadsRef, k_ref: KeysRef, v_ref: KeysRef, plan: Plan,
            *refs: Float[Any, "B ..."], run: Callable[..., None], spec: Spec, block: Block, room: int) -> None:
    del blank
    head, number, batch = t.program(interleave=spec.ordered)

    def at(start, count, share=None):
        kv_head = head // spec.group_size
        tokens, exist = t.tile_tokens(spec, plan.index, batch, start, block.rows, count)
        limits = t.row_limits(spec, plan.limits, batch, tokens, exist)
        run(RowTile(spec, block, plan, k_ref, v_ref, batch, start, head, kv_head, count, share, tokens, exist, limits,
                    _extremes(spec, limits, start, block.rows)), q_ref, *refs)

    if plan.count is None:
        # The last rows see the most keys: they start first, so that no long program is left at the end.
        at((pl.num_programs(1) - 1 - number) * block.rows, spec.rows)
        return
    count = plan.count[batch]
    if room:
        is_work, tile, part, parts = split.assignment(number, count, block.rows, room)
        pl.when(is_work)(lambda: at(tile * block.rows, count, (number, part, parts)))
    else:
        start = number * block.rows
        pl.when(start < count)(lambda: at(start, count))


def _extremes(spec: Spec, limits: Rows, start: Number, size: int) -> Numbers:
    """(low_min, low_max, high_min, high_max) of a tile's rows."""
    zero = jnp.int32(0)
    if spec.explicit or spec.ordered:
        alive = limits.high >= 0
        low_min = zero if limits.low is None else jnp.min(jnp.where(alive, limits.low, t.FAR))
        low_max = zero if limits.low is None else jnp.max(jnp.where(alive, limits.low, 0))
        return low_min, low_max, jnp.min(jnp.where(alive, limits.high, t.FAR)), jnp.max(limits.high)
    last = start + size - 1
    low_min = low_max = zero
    if spec.window is not None:
        back = spec.window - 1
        low_min, low_max = jnp.maximum(start - back, 0), jnp.maximum(last - back, 0)
    return low_min, low_max, start, jnp.minimum(last, spec.length - 1)


def _key_bounds(extremes: Numbers, keys: int) -> Numbers:
    """Blocks of keys (begin, full_begin, full_end, end) that a tile visits; full ones need no mask."""
    low_min, low_max, high_min, high_max = extremes
    begin, end = low_min // keys, high_max // keys + 1
    full_begin = jnp.clip((low_max + keys - 1) // keys, begin, end)
    return begin, full_begin, jnp.clip((high_min + 1) // keys, full_begin, end), end


def _sweep(bounds: Numbers, step: Callable, carry: Any, *, flat: bool, bounded_below: bool) -> Any:
    """carry = step(block, carry, edge) for the blocks of `bounds`; `edge` says whether a mask is due.

    Blocks without a mask come first, then both edges in one loop: every loop fills the pipeline of loads anew.
    """
    begin, full_begin, full_end, end = (_uniform(bound) for bound in bounds)
    if flat:
        return jax.lax.fori_loop(
            begin, end, lambda i, carry: step(i, carry, (i < full_begin) | (i >= full_end)), carry)
    carry = jax.lax.fori_loop(full_begin, full_end, lambda i, carry: step(i, carry, False), carry)
    if not bounded_below:
        return jax.lax.fori_loop(full_end, end, lambda i, carry: step(i, carry, True), carry)
    return jax.lax.fori_loop(begin, end - (full_end - full_begin), lambda i, carry: step(
        jnp.where(i < full_begin, i, i + (full_end - full_begin)), carry, True), carry)


def _uniform(number: Number) -> Number:
    """`number`, in a form that tells the compiler that all threads agree on it: the maximum over a warp.

    Bounds that come from memory or from a reduction over the tile hide that. The loop then counts in ordinary
    registers, and moves some of them to the matrix unit's before every product.
    """
    return jnp.max(jnp.full((32,), number))


def _sink_sweep(spec: Spec, limits: Rows, step: Callable, carry: Any) -> Any:
    """carry = step(first_key, carry) for blocks of `_sink_block(spec)` keys that cover every sink of the tile."""
    keys = _sink_block(spec)
    if not spec.segmented:
        count = _uniform((jnp.max(limits.sink_high) + keys - 1) // keys)
        return jax.lax.fori_loop(0, count, lambda i, carry: step(i * keys, carry), carry)

    def following(key):  # the first sink of any row at or after `key`
        candidate = jnp.maximum(limits.sink_low, key)
        return jnp.min(jnp.where(candidate < limits.sink_high, candidate, t.FAR))

    def body(state):
        key, carry = state
        return following(key + keys), step(key, carry)

    return jax.lax.while_loop(lambda state: state[0] < t.FAR, body, (following(0), carry))[1]


def _sink_block(spec: Spec) -> int:
    """Sinks visited at a time: a power of two that the matrix unit accepts."""
    return min(64, max(16, pl.next_power_of_2(spec.sinks)))
