"""The log-likelihood of continuations: many short requests packed into a few static shapes.

Requests stand side by side in rows of T tokens, kept apart by segment ids, so that little is padding and a benchmark
compiles one or two shapes. Logits exist only where a continuation is predicted. The host lays out the next batch
while the device works on the last.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int64

from l2a_jax import device
from l2a_jax.config import L2AConfig, ModelConfig, position_limit
from l2a_jax.data.counts import format_count
from l2a_jax.data.packing import best_fit_rows
from l2a_jax.errors import UserError
from l2a_jax.models.params import Tree
from l2a_jax.models.transformer import check_tokens, hidden_states
from l2a_jax.nn.shard import ALONE
from l2a_jax.progress import progress
from l2a_jax.sharding import whole
from l2a_jax.sharding.axes import Axes
from l2a_jax.sharding.mesh import NAMES, ROWS, axes_of
from l2a_jax.sources import Pretrained
from l2a_jax.training.loss import token_nll

ROW = 1_024
"""Tokens in a row of packed requests; a longer request gets a row of the next power of two."""
SMALLEST = 128
"""Tokens in the shortest row, and continuation tokens in a batch: still shorter ones would only add shapes."""
BATCH_TOKENS = 32_768
"""Tokens in a batch, by platform: enough to fill the device, little enough to see progress."""
_IN_FLIGHT = 2
_ALONE = Axes()


class Request(NamedTuple):
    """Token ids: how likely is `continuation` after `context`?"""

    context: Sequence[int]
    continuation: Sequence[int]


class Scores(NamedTuple):
    """One entry a request."""

    log_probabilities: Float[np.ndarray, " R"]
    """Sum over the continuation's tokens, in nats."""
    greedy: Bool[np.ndarray, " R"]
    """Every token of the continuation is the most likely one given those before it: greedy decoding would write it."""
    truncated: Bool[np.ndarray, " R"]
    """The context was cut from the left, because the model's positions do not reach that far."""


class _Table(NamedTuple):
    """What is to be computed. Requests with the same input (answers of one token) share it: `members` of each input.
    `targets`: the continuation of each request."""

    inputs: list[np.ndarray]
    members: dict[int, list[int]]
    targets: list[np.ndarray]
    truncated: Bool[np.ndarray, " R"]
    limit: int


class _Batch(NamedTuple):
    """`requests`: which, in the order of their picks; `counts`: continuation tokens of each; `picks`: flat position of
    the input before each continuation token, 0 after the last; `work`: tokens that are no padding."""

    requests: Int64[np.ndarray, " n"]
    counts: Int64[np.ndarray, " n"]
    tokens: Int[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"] | None
    picks: Int[np.ndarray, " M"]
    targets: Int[np.ndarray, " M"]
    work: int


def log_likelihoods(
    model: Pretrained,
    requests: Sequence[Request],
    *,
    backend: str = "auto",
    batch_tokens: int | None = None,
    mesh: Mesh | None = None,
    label: str = "log-likelihoods",
) -> Scores:
    """Teacher-forced scores of every request.

    A context is cut from the left to what the model's positions hold, as lm-eval does. `batch_tokens` is the size of a
    batch (at least one row), on each device of a `mesh`, which deals rows and tokens; `label` names the work in the
    progress report.

    Raises UserError where there is no request, on a request without context or continuation (as lm-eval: a sum over
    no token would make it certain), a continuation longer than the model's positions, token ids outside the
    vocabulary, and log-probabilities that are not finite.
    """
    if not len(requests):
        raise UserError(f"{label}: there is no request to score")
    table = _table(requests, position_limit(model.config, model.l2a_config), model.config)
    total = np.zeros(len(requests))
    greedy = np.ones(len(requests), bool)
    work, done = sum(table.inputs[index].size for index in table.members), 0
    pending: deque[tuple[_Batch, Any]] = deque()

    def collect() -> None:
        nonlocal done
        batch, result = pending.popleft()
        nll, top = (np.asarray(part) for part in result)
        used, first = int(batch.counts.sum()), np.cumsum(batch.counts) - batch.counts
        total[batch.requests] = -np.add.reduceat(nll[:used].astype(np.float64), first)
        greedy[batch.requests] = np.logical_and.reduceat(top[:used], first)
        wrong = batch.requests[~np.isfinite(total[batch.requests])]
        if wrong.size:
            raise UserError(f"the log-probability of request {wrong[0]} is {total[wrong[0]]}: the model's weights or "
                            "activations are not finite")
        done += batch.work
        report(done, f"{format_count(done)} of {format_count(work)} tokens")

    size, params = batch_tokens or device.batch_tokens(BATCH_TOKENS), whole.put(model.params, mesh)
    with progress(label, work) as report:
        for batch in _batches(table, size, axes_of(mesh)):
            result = _score(params, batch.tokens, batch.segment_ids, batch.picks, batch.targets, model.config,
                            model.l2a_config, backend, mesh)
            pending.append((batch, result))
            if len(pending) > _IN_FLIGHT:
                collect()
        while pending:
            collect()
    return Scores(total, greedy, table.truncated)


@functools.partial(jax.jit, static_argnames=("config", "l2a_config", "backend", "mesh"))
def _score(
    params: Tree,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    picks: Int[Array, " M"],
    targets: Int[Array, " M"],
    config: ModelConfig,
    l2a_config: L2AConfig | None,
    backend: str,
    mesh: Mesh | None,
) -> tuple[Float[Array, " M"], Bool[Array, " M"]]:
    """Negative log-likelihood of each target, and whether it is the top token."""

    def scored(params, tokens, segment_ids, picks, targets, shard):
        tokens, segment_ids = jax.tree.map(shard.tokens, (tokens, segment_ids))
        hidden, _ = hidden_states(params, tokens, config, l2a_config, segment_ids=segment_ids, backend=backend,
                                  shard=shard)
        nll, top = token_nll(params, shard.spread(hidden, picks)[None], targets[None], config)
        return nll[0], top[0]

    given = params, tokens, segment_ids, picks, targets
    if mesh is None:
        return scored(*given, ALONE)
    shard = whole.dealt(mesh, config, l2a_config)
    return jax.shard_map(lambda *given: scored(*given, shard), mesh=mesh, in_specs=(P(), ROWS, ROWS, P(), P(NAMES)),
                         out_specs=P(NAMES), check_vma=False)(*given)


def _table(requests: Sequence[Request], limit: int, config: ModelConfig) -> _Table:
    """Inputs are context and continuation without its last token, cut from the left to `limit` tokens."""
    known: dict[bytes, int] = {}
    table = _Table([], {}, [], np.zeros(len(requests), bool), limit)
    for index, (context, continuation) in enumerate(requests):
        if len(context) == 0:
            raise UserError(f"request {index} has an empty context: no token predicts its first one")
        if len(continuation) == 0:
            raise UserError(f"request {index} has an empty continuation: there is no token to score")
        if len(continuation) > limit:
            raise UserError(f"request {index} continues for {len(continuation)} tokens; the model's positions end at "
                            f"{limit}")
        whole = np.concatenate([np.asarray(context, np.int32), np.asarray(continuation, np.int32)])
        check_tokens(whole, config, f"request {index}: ")
        table.truncated[index] = whole.size > limit + 1
        table.targets.append(whole[whole.size - len(continuation) :])
        tokens = whole[-(limit + 1) :][:-1]
        at = known.setdefault(tokens.tobytes(), len(table.inputs))
        if at == len(table.inputs):
            table.inputs.append(tokens)
        table.members.setdefault(at, []).append(index)
    return table


def _batches(table: _Table, batch_tokens: int, axes: Axes = _ALONE) -> Iterator[_Batch]:
    """Long inputs first: if memory runs out, it does so at once."""
    lengths = np.array([tokens.size for tokens in table.inputs], np.int64)
    row = min(ROW, power_of_two(int(lengths.sum()), SMALLEST))
    sizes = np.array([min(power_of_two(length, row), table.limit) for length in lengths.tolist()], np.int64)
    for size in np.unique(sizes)[::-1].tolist():
        yield from _class_batches(table, np.flatnonzero(sizes == size), lengths, size, batch_tokens, axes)


def _class_batches(table, chosen, lengths, size, batch_tokens, axes) -> Iterator[_Batch]:
    """Batches of one shape: the `chosen` inputs packed into rows of `size` tokens, B rows at a time; a little more of
    either where `axes` would not divide them."""
    row = best_fit_rows(lengths[chosen], size)
    order = np.argsort(row, kind="stable")
    chosen, row = chosen[order], row[order]
    per_row = np.bincount(row)
    rows = min(max(1, batch_tokens * axes.devices // size), power_of_two(per_row.size))
    rows, length = -(-rows // axes.data) * axes.data, -(-size // axes.context) * axes.context
    predicted = [sum(table.targets[request].size for request in table.members[one]) for one in chosen.tolist()]
    width = power_of_two(int(np.bincount(row // rows, predicted).max()), SMALLEST)
    width = -(-width // axes.devices) * axes.devices
    packed = bool((per_row > 1).any())  # one input a row needs no segments: what follows it is in its future
    for index in range(-(-per_row.size // rows)):
        mine = row // rows == index
        yield _lay_out(table, chosen[mine].tolist(), (row[mine] % rows).tolist(), (rows, length), width, packed)


def _lay_out(table, chosen, rows, shape, width, packed) -> _Batch:
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    picks, targets = np.zeros(width, np.int32), np.zeros(width, np.int32)
    filled, documents = [0] * shape[0], [0] * shape[0]
    requests, counts, at = [], [], 0
    for one, row in zip(chosen, rows, strict=True):
        begin, end = filled[row], filled[row] + table.inputs[one].size
        filled[row], documents[row] = end, documents[row] + 1
        tokens[row, begin:end], segments[row, begin:end] = table.inputs[one], documents[row]
        for request in table.members[one]:
            count = table.targets[request].size
            picks[at : at + count] = row * shape[1] + np.arange(end - count, end)
            targets[at : at + count] = table.targets[request]
            requests.append(request)
            counts.append(count)
            at += count
    return _Batch(np.asarray(requests), np.asarray(counts), tokens, segments if packed else None, picks, targets,
                  sum(filled))


def power_of_two(n: int, least: int = 1) -> int:
    """The least power of two that is at least n and `least`."""
    return 1 << (max(n, least) - 1).bit_length()
