"""What a model writes after many prompts: greedy decoding in a batch that stays full.

A batch is a cache of B rows. Prompts are read a group at a time into rows that are free; all rows then decode a few
tokens; texts that have ended leave their rows to the next prompts. So one long text holds no other, and a benchmark
compiles one decode step and a prefill for each of a few lengths.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from l2a_jax import device
from l2a_jax.config import L2AConfig, ModelConfig, position_limit
from l2a_jax.errors import UserError
from l2a_jax.evaluation.loglikelihood import power_of_two
from l2a_jax.inference.cache import Cache, Layout, cache_bytes, empty_cache, layout_of, spare_bytes
from l2a_jax.inference.forward import DecodeParams, decode_params, decode_step, prefill
from l2a_jax.inference.generate import bucket
from l2a_jax.models.params import Tree
from l2a_jax.models.transformer import check_tokens
from l2a_jax.progress import progress
from l2a_jax.sharding import whole
from l2a_jax.sharding.mesh import ROWS, STACKED, axes_of
from l2a_jax.sources import Pretrained
from l2a_jax.weights import Tokenizer

STEPS = 32
"""Tokens that every row decodes between two looks at the texts."""
PREFILL_TOKENS = 32_768
"""Tokens of the prompts that are read at once, on an accelerator."""
MOST_ROWS = 256
"""Rows of a batch: more of them would only wait for one another's caches."""
CACHE_SHARE = 0.5
"""Of the memory beside the weights: the rest is for what prefill and decoding compute."""
ROUND = 256
"""Prompts are padded to few multiples of this, rows of the cache to any."""
LONGER = 4
"""How many times longer than it needs a prompt's row may be: memory is spent so that fewer decode steps compile."""
NOT_FINITE = -1
"""Stands for a token whose logits were no numbers."""


class Prompt(NamedTuple):
    """Token ids, how many tokens may follow, and the texts of which the first to appear ends what follows."""

    tokens: Sequence[int]
    max_new_tokens: int
    until: tuple[str, ...] = ()


class Continuations(NamedTuple):
    """`texts`: what was written before a stop. `counts`: tokens decoded for it, the stop's included."""

    texts: list[str]
    counts: Int[np.ndarray, " R"]
    truncated: Bool[np.ndarray, " R"]
    """The prompt was cut from the left, because the model's positions do not reach that far."""


class Options(NamedTuple):
    """What is compiled for."""

    config: ModelConfig
    l2a_config: L2AConfig | None
    layout: Layout
    backend: str
    mesh: Mesh | None


class Rows(NamedTuple):
    """A batch under way. `next` has been chosen and not yet fed; it goes to `position`, as many tokens stand before."""

    cache: Cache
    position: Int[Array, " B"]
    next: Int[Array, " B"]


_BY_ROW = Rows(STACKED, ROWS, ROWS)


def continuations(
    model: Pretrained,
    prompts: Sequence[Prompt],
    *,
    backend: str = "auto",
    batch_tokens: int | None = None,
    mesh: Mesh | None = None,
    label: str = "continuations",
) -> Continuations:
    """The likeliest continuation of every prompt, token by token, to its first stop: an end of text, one of its
    `until`, or `max_new_tokens`.

    A text is decoded without special tokens and cut before the stop, as lm-eval does; of `until`, a special token of
    the tokenizer ends a text as its own end does. A prompt is cut from the left to what the model's positions hold
    beside `max_new_tokens`. `batch_tokens`: slots of the cache (at least a row's; by default what memory holds), on
    each device of a `mesh`, which deals rows over its axis "data" and the tokens of prompts over "context". `label`
    names the work in the progress report.

    Raises UserError where there is no prompt, on an empty one, token ids outside the vocabulary, more new tokens than
    positions, and logits that are not finite.
    """
    if not len(prompts):
        raise UserError(f"{label}: there is no prompt to continue")
    limit = position_limit(model.config, model.l2a_config)
    cut = [_cut(prompt, limit, model.config, f"{label}: prompt {index}")
           for index, prompt in enumerate(prompts)]
    ends = {until: _end_ids(model.tokenizer, until) for until in {prompt.until for prompt in prompts}}
    need = np.array([tokens.size + prompt.max_new_tokens for tokens, prompt in zip(cut, prompts, strict=True)])
    queue = deque(np.argsort(-need, kind="stable").tolist())  # long ones first: if memory runs out, it does so at once
    texts, counts = [""] * len(prompts), np.zeros(len(prompts), int)
    axes, model = axes_of(mesh), model._replace(params=whole.put(model.params, mesh))
    weights, unit = _decode_params(model.params), math.lcm(ROUND, axes.context)
    with progress(label, len(prompts)) as report:
        while queue:
            slots = -(-(need[queue[0]] + STEPS) // unit) * unit
            pool = deque(index for index in queue if LONGER * need[index] >= slots or index == queue[0])
            queue = deque(list(queue)[len(pool):])
            rows = _row_count(model, int(slots), -(-len(pool) // axes.data), batch_tokens)
            options = Options(model.config, model.l2a_config, layout_of(model.config, model.l2a_config, int(slots)),
                              backend, mesh)
            for index, text, count in _pool(model, weights, options, rows, pool, cut, prompts, ends, label):
                texts[index], counts[index] = text, count
                done = int(np.count_nonzero(counts))
                report(done, f"{done:,} of {len(prompts):,} texts")
    return Continuations(texts, counts, np.array([len(prompt.tokens) > tokens.size for tokens, prompt in
                                                  zip(cut, prompts, strict=True)]))


def _pool(model, weights, options, rows, queue, tokens, prompts, ends, label):
    """Yields (prompt, text, tokens of it) as texts end; the prompts in `queue` share one size of rows. `rows` are those
    of each device, `free` the numbers of those that no text has there."""
    axes = axes_of(options.mesh)
    state = _empty(options, rows * axes.data, model.params["embed"]["embedding"].dtype)
    free, held = [list(range(rows)) for _ in range(axes.data)], {}
    written: dict[int, list[int]] = {}
    while queue or held:
        while queue:
            width = -(-bucket(tokens[queue[0]].size, ROUND) // axes.context) * axes.context
            width = min(width, options.layout.slots)
            group = min(rows, max(1, device.batch_tokens(PREFILL_TOKENS) // width))
            group = 1 << group.bit_length() - 1
            if sum(min(group, len(there)) for there in free) < min(group * axes.data, len(queue)):
                break
            parts = _shared(queue, free, group)
            state = _admit(model.params, state, *_padded(parts, tokens, (group, width), rows), options)
            for number, part in enumerate(parts):
                held |= {number * rows + place: index for index, place in part}
                written |= {index: [] for index, _ in part}
        active = np.isin(np.arange(rows * axes.data), list(held))
        state, said = _decode(weights, state, active, options)
        said = np.asarray(said)
        for place, index in list(held.items()):
            seen = len(written[index])
            new = said[:, place].tolist()
            finite = new.index(NOT_FINITE) if NOT_FINITE in new else len(new)
            written[index] += new[:finite]
            ended = ending(written[index], seen, prompts[index], model.tokenizer, ends[prompts[index].until])
            if ended is None and finite == len(new):
                continue
            if ended is None:
                raise UserError(f"{label}: the logits after prompt {index} are not finite: the model's weights or "
                                "activations are not")
            yield index, *ended
            free[place // rows].append(place % rows)
            del held[place], written[index]


def ending(tokens: Sequence[int], seen: int, prompt: Prompt, tokenizer: Tokenizer,
           ends: frozenset[int]) -> tuple[str, int] | None:
    """(text, tokens up to its end) of a continuation that has ended, else None; no stop is in the first `seen` tokens.

    A text of `until` may come in any tokens: the first token that completes one ends the text.
    """
    end = next((place for place in range(seen, len(tokens)) if tokens[place] in ends), None)
    last = min(prompt.max_new_tokens, len(tokens) if end is None else end)

    def read(count: int) -> tuple[str, bool]:
        text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        return text, any(stop in text for stop in prompt.until)

    text, stopped = read(last)
    if stopped:
        last = next(count for count in range(seen + 1, last + 1) if read(count)[1])
        text, _ = read(last)
        for stop in prompt.until:
            text = text.split(stop)[0]
        return text, last
    if last == prompt.max_new_tokens:
        return text, last
    return None if end is None else (text, end + 1)


def _end_ids(tokenizer: Tokenizer, until: tuple[str, ...]) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and what it writes as one special token of `until`."""
    named = {tokenizer.token_id(stop) for stop in until} - {None}
    special = {index for index in named if not tokenizer.decode([index], skip_special_tokens=True)}
    return frozenset({*tokenizer.end_ids, *special})


def _cut(prompt: Prompt, limit: int, config: ModelConfig, where: str) -> Int[np.ndarray, " T"]:
    if prompt.max_new_tokens < 1 or prompt.max_new_tokens >= limit:
        raise UserError(f"{where} asks for {prompt.max_new_tokens} new tokens; the model has {limit} positions for "
                        "them and the prompt")
    tokens = np.asarray(prompt.tokens, np.int32)[prompt.max_new_tokens - limit:]
    if not tokens.size:
        raise UserError(f"{where} is empty; a continuation needs at least one token to follow")
    check_tokens(tokens, config, f"{where}: ")
    return tokens


def _row_count(model: Pretrained, slots: int, prompts: int, batch_tokens: int | None) -> int:
    """A power of two: as many rows as there are prompts, memory and `MOST_ROWS` allow."""
    if batch_tokens is None:
        each = cache_bytes(model.config, model.l2a_config, 1, slots, model.params["embed"]["embedding"].dtype)
        fit = min(MOST_ROWS, int(CACHE_SHARE * spare_bytes(model.params)) // each)
    else:
        fit = batch_tokens // slots
    return min(1 << max(fit, 1).bit_length() - 1, power_of_two(prompts))


def _shared(queue: deque[int], free: list[list[int]], group: int) -> list[list[tuple[int, int]]]:
    """The next prompts, each with a free row: at most `group` for each device, the next to whichever has most room."""
    parts: list[list[tuple[int, int]]] = [[] for _ in free]
    while queue:
        rows, part = max(zip(free, parts, strict=True), key=lambda one: min(len(one[0]), group - len(one[1])))
        if not rows or len(part) == group:
            break
        part.append((queue.popleft(), rows.pop()))
    return parts


def _padded(parts: list[list[tuple[int, int]]], prompts: list[np.ndarray], shape: tuple[int, int], rows: int) -> tuple[
        Int[np.ndarray, "G T"], Int[np.ndarray, " G"], Int[np.ndarray, " G"]]:
    """(tokens, lengths, places) of each device's group, which are of one shape; where prompts are few, the last one is
    read more than once, and where there is none a token, for a place behind all `rows`."""
    tokens = np.zeros((len(parts), *shape), np.int32)
    lengths, places = np.ones(tokens.shape[:2], np.int32), np.full(tokens.shape[:2], rows, np.int32)
    for number, part in enumerate(parts):
        for row in range(shape[0]) if part else ():
            index, places[number, row] = part[min(row, len(part) - 1)]
            lengths[number, row] = prompts[index].size
            tokens[number, row, : lengths[number, row]] = prompts[index]
    return tokens.reshape(-1, shape[1]), lengths.reshape(-1), places.reshape(-1)


def _empty(options: Options, rows: int, dtype: Any) -> Rows:
    """A batch without texts, in which each device makes its own rows."""

    def make():
        return Rows(empty_cache(options.config, options.layout, rows, dtype), *jnp.zeros((2, rows), jnp.int32))

    if options.mesh is None:
        return make()
    return jax.jit(make, out_shardings=jax.tree.map(lambda spec: NamedSharding(options.mesh, spec), _BY_ROW))()


_decode_params = jax.jit(decode_params)


@functools.partial(jax.jit, static_argnames="options", donate_argnums=1)
def _admit(params: Tree, state: Rows, tokens: Int[Array, "G T"], lengths: Int[Array, " G"], places: Int[Array, " G"],
           options: Options) -> Rows:
    """Read prompts into the rows `places` of the batch, and choose the first token of each; over a mesh each device
    into its own."""
    part = functools.partial(_admit_here, options=options)
    if options.mesh is not None:
        part = jax.shard_map(part, mesh=options.mesh, in_specs=(P(), _BY_ROW, ROWS, ROWS, ROWS), out_specs=_BY_ROW,
                             check_vma=False)
    return part(params, state, tokens, lengths, places)


def _admit_here(params: Tree, state: Rows, tokens: Int[Array, "G T"], lengths: Int[Array, " G"],
                places: Int[Array, " G"], options: Options) -> Rows:
    width = tokens.shape[1]
    logits, read, _ = prefill(params, tokens, lengths, options.config, options.l2a_config,
                              options.layout._replace(slots=width), backend=options.backend,
                              shards=axes_of(options.mesh).context)
    count = places.shape[0]
    if options.mesh is not None:  # a device without a prompt writes nothing
        count = jnp.where(places[0] < state.next.shape[0], count, 0)

    def put(store, new):  # a row at a time is written in place; one scatter would move the whole cache
        def one(row, store):
            return jax.lax.dynamic_update_slice(store, jax.lax.dynamic_slice_in_dim(new, row, 1, axis=1),
                                                (0, places[row], 0, 0, 0))

        return jax.lax.fori_loop(0, count, one, store)

    return Rows(jax.tree.map(put, state.cache, read), state.position.at[places].set(lengths),
                state.next.at[places].set(_likeliest(logits)))


@functools.partial(jax.jit, static_argnames="options", donate_argnums=1)
def _decode(weights: DecodeParams, state: Rows, active: Bool[Array, " B"],
            options: Options) -> tuple[Rows, Int[Array, "S B"]]:
    """`STEPS` tokens of every active row: those fed, so that the last one chosen comes with the next call."""
    part = functools.partial(_decode_here, options=options)
    if options.mesh is not None:
        part = jax.shard_map(part, mesh=options.mesh, in_specs=(P(), _BY_ROW, ROWS), out_specs=(_BY_ROW, STACKED),
                             check_vma=False)
    return part(weights, state, active)


def _decode_here(weights: DecodeParams, state: Rows, active: Bool[Array, " B"],
                 options: Options) -> tuple[Rows, Int[Array, "S B"]]:

    def step(state, _):
        logits, cache, _ = decode_step(weights, state.next, state.position, active, state.cache, options.config,
                                       options.l2a_config, options.layout, backend=options.backend)
        return Rows(cache, state.position + active, _likeliest(logits)), state.next

    return jax.lax.scan(step, state, length=STEPS)


def _likeliest(logits: Array) -> Int[Array, " B"]:
    return jnp.where(jnp.all(jnp.isfinite(logits), axis=-1), jnp.argmax(logits, axis=-1), NOT_FINITE).astype(jnp.int32)
