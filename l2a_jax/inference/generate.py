"""Generation: prompts in, continuations out, under one jit.

Prompts of any lengths are padded on the right to one of few sizes, so few shapes are ever compiled. A prefill fills
the cache, then a `while_loop` feeds one token per row and step until every row is done. `start` and `advance` are the
same two parts as separate calls, for whoever wants the text while it comes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from l2a_jax import fields
from l2a_jax.config import L2AConfig, ModelConfig, position_limit
from l2a_jax.errors import Unsupported, UserError
from l2a_jax.inference.cache import Cache, Layout, layout_of
from l2a_jax.inference.forward import DecodeParams, decode_params, decode_step, prefill
from l2a_jax.inference.options import Sampling, check_route_last
from l2a_jax.inference.sampling import sample
from l2a_jax.models.params import Tree, check_layers
from l2a_jax.models.transformer import check_heads, check_tokens
from l2a_jax.sharding import whole
from l2a_jax.sharding.mesh import ROWS, STACKED, axes_of

STOP_SLOTS = 4  # stop tokens are padded to a multiple of this, so that their number is no new shape


class Generation(NamedTuple):
    """What came out, rows as the prompts were.

    Row b's continuation is tokens[b, :lengths[b]]. Where it `stopped`, the stop token follows it (and is not counted);
    after that there are zeros. Log-probabilities are the model's own (natural, before temperature and top-p) of the
    tokens, the stop token's too. `decisions` are by position, prompt first: decisions[l, b, t] is that of row b's t-th
    token in layer l; False after the row's end, and for its last token, which nothing had to read. None for a plain
    model. `finite` is False where a row's logits were not; what it says then means nothing.
    """

    tokens: Int[Array, "B M"]
    lengths: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    log_probabilities: Float[Array, "B M"]
    decisions: Bool[Array, "L B S"] | None
    finite: Bool[Array, " B"]


_BY_ROW = Generation(ROWS, ROWS, ROWS, ROWS, STACKED, ROWS)


class Options(NamedTuple):
    """The static half of a call: what is compiled for."""

    config: ModelConfig
    l2a_config: L2AConfig | None
    layout: Layout
    sampled: bool
    nucleus: bool
    backend: str
    mesh: Mesh | None = None


class Settings(NamedTuple):
    """The other half, plain arrays."""

    limit: Int[Array, ""]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    key: PRNGKeyArray | None
    stop_tokens: Int[Array, " S"]
    decisions: Bool[Array, "L B T"] | Bool[Array, "L B S"] | None
    heads: Bool[Array, "L K"] | None = None
    route_last: Int[Array, ""] | None = None
    cut: Float[Array, " L"] | None = None


class State(NamedTuple):
    """A generation under way. `next` has been chosen and not yet fed; `count` tokens have been chosen per row."""

    cache: Cache
    position: Int[Array, " B"]
    next: Int[Array, " B"]
    done: Bool[Array, " B"]
    count: Int[Array, ""]
    out: Generation


def generate(
    params: Tree,
    config: ModelConfig,
    l2a_config: L2AConfig | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: PRNGKeyArray | None = None,
    stop_tokens: Sequence[int] = (),
    decisions: Bool[Any, "L B T"] | Bool[Any, "L B S"] | None = None,
    heads: Bool[Any, "L K"] | None = None,
    cut: Float[Any, " L"] | None = None,
    route_last: int | None = None,
    room: int | None = None,
    backend: str = "auto",
    mesh: Mesh | None = None,
) -> Generation:
    """Continue each prompt (a list of token ids) by up to `max_new_tokens`, or up to the first of `stop_tokens`.

    `temperature` 0 takes the likeliest token; above 0, tokens are drawn with `key` from the `top_p` nucleus.
    `decisions` override the router by position. [L, B, T], T being the longest prompt, in the prompts; after them it
    decides itself. [L, B, S], S being T plus `max_new_tokens`, in everything. `heads` and `cut` are those of
    `hidden_states`, for prompts and what is written alike.
    `route_last`: so many tokens at the end of each prompt (its question), and all that is written, are routed, whatever
    is decided (0: what is written alone; None: nothing more than is decided).
    `room` (at least `max_new_tokens`): what to compile for; calls of different `max_new_tokens` then share a program.
    `mesh`: deals the rows over its axis "data"; the devices of "context" share the prompts of their rows, then each
    decodes. Every device holds the weights, and the cache of its rows. What is drawn is drawn for all rows together, so
    with a temperature rows are not dealt.
    Raises UserError on an empty batch or prompt, a token outside the vocabulary, a text longer than the rotary
    embedding is meant for, or settings that make no sense.
    """
    tokens, lengths, options, settings = request(
        config, l2a_config, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, key=key,
        stop_tokens=stop_tokens, decisions=decisions, heads=heads, cut=cut, route_last=route_last, room=room,
        backend=backend, params=params, mesh=mesh)
    out = _generate(whole.put(params, mesh), tokens, lengths, settings, options, bucket(room or max_new_tokens, 16))
    last = int(lengths.max()) + max_new_tokens
    out = out._replace(
        tokens=out.tokens[:, :max_new_tokens], log_probabilities=out.log_probabilities[:, :max_new_tokens],
        decisions=None if out.decisions is None else out.decisions[:, :, :last])
    return out if len(lengths) == len(prompts) else Generation(*(
        None if x is None else x[: len(prompts)] if spec == ROWS else x[:, : len(prompts)]
        for x, spec in zip(out, _BY_ROW, strict=True)))


def request(
    config: ModelConfig, l2a_config: L2AConfig | None, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
    temperature: float = 0.0, top_p: float = 1.0, key: PRNGKeyArray | None = None, stop_tokens: Sequence[int] = (),
    decisions: Bool[Any, "L B T"] | Bool[Any, "L B S"] | None = None, heads: Bool[Any, "L K"] | None = None,
    cut: Float[Any, " L"] | None = None, route_last: int | None = None, room: int | None = None, backend: str = "auto",
    params: Tree | None = None, mesh: Mesh | None = None,
) -> tuple[Int[Array, "R W"], Int[Array, " R"], Options, Settings]:
    """The padded prompts, their lengths, and the two halves of the options, checked as `generate` says. Where a mesh
    does not divide the rows, the last one is there several times."""
    axes = axes_of(mesh)
    if len(prompts) == 0:
        raise UserError("there is no prompt to continue")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {number} is empty; a continuation needs at least one token to follow")
    fields.check(Sampling(max_new_tokens, temperature, top_p, route_last, backend), spell=str)
    temperature, top_p = fields.float32(temperature), fields.float32(top_p)
    if temperature > 0 and key is None:
        raise UserError(f"sampling at temperature {temperature} draws at random: give a key")
    if temperature > 0 and axes.data > 1:
        raise Unsupported(f"sampling at temperature {temperature} draws for all rows together; expected temperature 0, "
                          f"or a mesh of data=1 in place of {axes}")
    if l2a_config is not None:
        check_layers(config, l2a_config)
    check_route_last(route_last, l2a_config)
    if params is not None and ("router" in params["layers"]) != (l2a_config is not None):
        raise ValueError(f"l2a_config is {l2a_config}, which does not fit the parameters; see add_routing")
    if missing := -len(prompts) % axes.data:
        prompts = [*prompts, *[prompts[-1]] * missing]
        if decisions is not None:
            decisions = np.concatenate([decisions, np.repeat(np.asarray(decisions)[:, -1:], missing, axis=1)], axis=1)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest, limit = int(lengths.max()), position_limit(config, l2a_config)
    if longest + max_new_tokens - 1 > limit:  # the last token is never fed
        raise UserError(f"a prompt of {longest} tokens and {max_new_tokens} new ones are longer than max_positions x "
                        f"factor = {limit}; shorten them or choose a larger RoPE factor")
    width = -(-min(bucket(longest, 32), limit) // axes.context) * axes.context
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    tokens = jnp.asarray(tokens)
    check_tokens(tokens, config)
    if room is not None and room < max_new_tokens:
        raise ValueError(f"room is {room}; expected at least max_new_tokens = {max_new_tokens}")
    slots = tokens.shape[1] + bucket(room or max_new_tokens, 16)
    if decisions is not None:
        decisions = np.asarray(decisions, bool)
        rows, whole = (config.num_layers, len(prompts)), longest + max_new_tokens
        if l2a_config is None or decisions.shape not in ((*rows, longest), (*rows, whole)):
            raise ValueError(f"decisions are {decisions.shape}; expected [L, B, T] = {(*rows, longest)} or [L, B, S] = "
                             f"{(*rows, whole)} of a routed model")
        size = slots if decisions.shape[2] == whole else tokens.shape[1]
        decisions = jnp.asarray(np.pad(decisions, ((0, 0), (0, 0), (0, size - decisions.shape[2]))))
    check_heads(heads, config, l2a_config)
    if cut is not None and (l2a_config is None or np.shape(cut) != (config.num_layers,)):
        raise ValueError(f"cut is {np.shape(cut)}; expected [L] = {(config.num_layers,)} of a routed model")
    stop_tokens = [stop for stop in stop_tokens if 0 <= stop < config.vocab_size]  # no other can ever be chosen
    stops = np.full((-(-max(len(stop_tokens), 1) // STOP_SLOTS) * STOP_SLOTS,), -1, np.int32)
    stops[: len(stop_tokens)] = stop_tokens
    options = Options(config, l2a_config, layout_of(config, l2a_config, slots), temperature > 0, top_p < 1, backend,
                      mesh)
    settings = Settings(jnp.int32(max_new_tokens), jnp.float32(temperature), jnp.float32(top_p),
                        key if temperature > 0 else None, jnp.asarray(stops), decisions,
                        None if heads is None else jnp.asarray(heads),
                        None if route_last is None else jnp.int32(route_last),
                        None if cut is None else jnp.asarray(cut, jnp.float32))
    return tokens, jnp.asarray(lengths), options, settings


def unpad(tokens: Int[Any, "B T"], mask: Bool[Any, "B T"]) -> list[list[int]]:
    """The prompts in a padded batch, wherever the padding stands: left, right, or both; `mask` is True on tokens."""
    return [np.asarray(row)[np.asarray(real, bool)].tolist() for row, real in zip(tokens, mask, strict=True)]


def bucket(size: int, smallest: int) -> int:
    """The next of `smallest` x 1, 1.5, 2, 3, 4, 6, 8, ...: at most half as much again, and few of them."""
    power = smallest
    while power < size:
        power *= 2
    return power * 3 // 4 if power > smallest and size <= power * 3 // 4 else power


def start(params: Tree, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], settings: Settings, options: Options,
          room: int) -> State:
    """Read the prompts and choose the first token; `room`: how many tokens a row may get in all."""
    batch, width = tokens.shape
    forced = None if settings.decisions is None else settings.decisions[:, :, :width]
    logits, cache, decided = prefill(params, tokens, lengths, options.config, options.l2a_config, options.layout,
                                     decisions=forced, heads=settings.heads, cut=settings.cut,
                                     route_last=settings.route_last, backend=options.backend,
                                     shards=axes_of(options.mesh).context)
    if decided is not None:
        decided = jnp.pad(decided, ((0, 0), (0, 0), (0, options.layout.slots - width)))
    zeros = jnp.zeros((batch,), jnp.int32)
    out = Generation(jnp.zeros((batch, room), jnp.int32), zeros, zeros > 0, jnp.zeros((batch, room), jnp.float32),
                     decided, zeros == 0)
    return _choose(State(cache, lengths, zeros, zeros > 0, jnp.int32(0), out), logits, settings, options)


def advance(params: DecodeParams, state: State, settings: Settings, options: Options,
            until: Int[Array, ""] | int) -> State:
    """Go on until every row is done or has `until` tokens."""
    rows = jnp.arange(state.next.shape[0])
    given = settings.decisions
    if given is not None and given.shape[2] < options.layout.slots:  # they are the prompts' alone
        given = None

    def step(state):
        active = ~state.done
        forced = None if given is None else given[:, rows, state.position]
        if settings.route_last is not None:
            forced = jnp.ones((options.config.num_layers, rows.size), bool)
        logits, cache, decided = decode_step(params, state.next, state.position, active, state.cache, options.config,
                                             options.l2a_config, options.layout, decisions=forced,
                                             heads=settings.heads, cut=settings.cut, backend=options.backend)
        out = state.out
        if decided is not None:
            out = out._replace(decisions=out.decisions.at[:, rows, state.position].set(decided))
        state = state._replace(cache=cache, position=state.position + active, out=out)
        return _choose(state, logits, settings, options)

    until = jnp.minimum(until, settings.limit)
    return jax.lax.while_loop(lambda state: (state.count < until) & ~jnp.all(state.done), step, state)


def _choose(state: State, logits, settings: Settings, options: Options) -> State:
    """Choose the next token of the rows that are not done, and write it down."""
    key = jax.random.fold_in(settings.key, state.count) if options.sampled else None
    chosen, score = sample(logits, key, settings.temperature, settings.top_p if options.nucleus else None)
    active = ~state.done
    chosen, score = jnp.where(active, chosen, 0), jnp.where(active, score, 0.0)
    stops = active & jnp.any(chosen[:, None] == settings.stop_tokens, axis=1)
    out = state.out
    out = out._replace(
        tokens=jax.lax.dynamic_update_slice(out.tokens, chosen[:, None], (0, state.count)),
        log_probabilities=jax.lax.dynamic_update_slice(out.log_probabilities, score[:, None], (0, state.count)),
        lengths=out.lengths + (active & ~stops), stopped=out.stopped | stops,
        finite=out.finite & (~active | jnp.all(jnp.isfinite(logits), axis=-1)))
    return state._replace(next=chosen, done=state.done | stops, count=state.count + 1, out=out)


@functools.partial(jax.jit, static_argnames=("options", "room"))
def _generate(params, tokens, lengths, settings, options, room):
    def of_rows(params, tokens, lengths, settings):
        state = start(params, tokens, lengths, settings, options, room)
        return advance(decode_params(params), state, settings, options, settings.limit).out

    given = params, tokens, lengths, settings
    if options.mesh is None:
        return of_rows(*given)
    # No step asks anything of another device: each goes on until its own rows are done.
    settings_dealt = Settings(*(P(),) * 5, STACKED, P(), P(), P())
    return jax.shard_map(of_rows, mesh=options.mesh, in_specs=(P(), ROWS, ROWS, settings_dealt),
                         out_specs=_BY_ROW, check_vma=False)(*given)
