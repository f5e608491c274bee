"""A continuation as it comes: a few decode steps per dispatch, each piece of text printed as soon as it is whole."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from l2a_jax import commands, device
from l2a_jax.attention import api as attention
from l2a_jax.data.counts import parse_layers
from l2a_jax.errors import UserError
from l2a_jax.fields import check, float32
from l2a_jax.files import read_text
from l2a_jax.inference.forward import decode_params
from l2a_jax.inference.generate import advance, bucket, request, start
from l2a_jax.inference.options import Asked, check_route_last
from l2a_jax.inference.pruning import cache_saving, check_prunable, pruned
from l2a_jax.models.params import add_routing
from l2a_jax.sources import Pretrained, load_pretrained
from l2a_jax.training.settings import make_layer
from l2a_jax.weights import Tokenizer

CHUNK = 8  # decode steps per dispatch: seldom enough to cost nothing, often enough to read along
SHADES = (250, 229, 221, 214, 208, 202, 196)  # of the 256-colour palette, from grey over yellow to red


_start = jax.jit(start, static_argnames=("options", "room"))
_advance = jax.jit(advance, static_argnames=("options",), donate_argnums=1)
_decode_params = jax.jit(decode_params)


def stream(model: Pretrained, prompt: Sequence[int], *, max_new_tokens: int, temperature: float = 0.0,
           top_p: float = 1.0, key: PRNGKeyArray | None = None, stop_tokens: Sequence[int] = (),
           route_last: int | None = None, backend: str = "auto",
           chunk: int = CHUNK) -> Iterator[list[tuple[int, int | None]]]:
    """The tokens of `generate` for one prompt, some at a time, each with the number of layers that routed it.

    That is decided when a token is read, so the newest waits for the next piece; the very last one, and all of a plain
    model's, have None. The stop token is not among them. Raises UserError as `generate` does, and where the model's
    logits are not finite; all but the last at once, not with the first piece.
    """
    tokens, lengths, options, settings = request(
        model.config, model.l2a_config, [prompt], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        key=key, stop_tokens=stop_tokens, route_last=route_last, backend=backend, params=model.params)
    return _pieces(model, prompt, tokens, lengths, options, settings, max_new_tokens, chunk)


def _pieces(model, prompt, tokens, lengths, options, settings, max_new_tokens, chunk):
    state = _start(model.params, tokens, lengths, settings, options, bucket(max_new_tokens, 16))
    weights = _decode_params(model.params)
    given, ended = 0, False
    while not ended:
        out, read = jax.device_get((state.out, state.position - lengths))
        if not out.finite[0]:
            raise UserError(f"the model's logits are not finite after {given} tokens: its weights hold NaN or "
                            "infinity, or the dtype is too narrow")
        ended = bool(state.done[0]) or int(state.count) >= max_new_tokens
        there = int(out.lengths[0]) if ended else int(read[0])
        routed: list[int | None] = [None] * there
        if out.decisions is not None:
            counts = out.decisions[:, 0, len(prompt) : len(prompt) + int(read[0])].sum(axis=0).tolist()
            routed[: len(counts)] = counts
        yield list(zip(out.tokens[0, given:there].tolist(), routed[given:there], strict=True))
        given = there
        if not ended:
            state = _advance(weights, state, settings, options, state.count + chunk)


class Writer:
    """Prints tokens as text, each once it is whole characters; shaded by how many of `layers` routed it, if given.

    A token's text is what it adds to that of the tokens before it: some tokenizers put a space between two.
    """

    def __init__(self, tokenizer: Tokenizer, out: Any, prompt: Sequence[int], layers: int | None):
        self.tokenizer, self.out, self.layers = tokenizer, out, layers
        self.before, self.held = list(prompt[-1:]), []
        self.shade: int | None = None

    def write(self, token: int, routed: int | None) -> None:
        """One token; `routed`: in how many layers."""
        self.held.append(token)
        self.shade = routed if routed is not None else self.shade
        if not self._text().endswith("\ufffd") or len(self.held) > 8:  # a character has at most four bytes
            self._put()

    def close(self) -> None:
        """The rest, whole characters or not, and the end of the line."""
        if self.held:
            self._put()
        self.out.write("\n")
        self.out.flush()

    def _text(self):
        return self.tokenizer.decode(self.before + self.held)[len(self.tokenizer.decode(self.before)) :]

    def _put(self):
        text = self._text()
        if self.layers is not None and self.shade is not None:
            colour = SHADES[round(self.shade / self.layers * (len(SHADES) - 1))]
            text = f"\033[38;5;{colour}m{text}\033[0m"
        self.out.write(text)
        self.out.flush()
        self.before, self.held, self.shade = self.held, [], None


def prepare(source: str | Path, *, window: int | None = None, sinks: int | None = None,
            prune_layers: str | None = None, dtype: Any = None) -> Pretrained:
    """The model of a source; a plain one with `window` or `sinks` gets an untrained router, which routes everything.

    Raises UserError where it has a layer of its own already, or what `load_pretrained` and `pruned` refuse.
    """
    model = load_pretrained(source, dtype or device.default_dtype())
    given = {name: value for name, value in (("window", window), ("sinks", sinks)) if value is not None}
    if given:
        if model.l2a_config is not None:
            raise UserError(f"{source} has a routed layer of its own (window {model.l2a_config.window}, sinks "
                            f"{model.l2a_config.sinks}); --window and --sinks are for plain models")
        layer = make_layer(given)
        model = model._replace(l2a_config=layer, params=add_routing(model.params, model.config, layer))
    if prune_layers is None:
        return model
    check_prunable(model.l2a_config, "--prune-layers", str(source))
    return pruned(model, parse_layers(prune_layers))


def run(source: str, *, prompt: str | None, prompt_file: Path | None, window: int | None = None,
        sinks: int | None = None, prune_layers: str | None = None, colour: bool = False,
        dtype: str | None = None, seed: int = 0, out: Any = None, **options: Any) -> None:
    """What `eval/generate.py` does: the continuation to `out` (stdout), tokens per second to stderr."""
    out = sys.stdout if out is None else out
    asked = Asked(window=window, sinks=sinks, dtype=dtype, seed=seed, **options)
    check(asked)
    attention.check(asked.backend)
    given = [field.name for field in dataclasses.fields(Asked) if getattr(asked, field.name) != field.default]
    greedy = float32(asked.temperature) == 0
    commands.say_idle(given, [(greedy, ("seed", "top_p"), "at --temperature 0 nothing is drawn")])
    if prompt is None:
        prompt = read_text(prompt_file, "--prompt-file")
    model = prepare(source, window=window, sinks=sinks, prune_layers=prune_layers, dtype=dtype)
    check_route_last(asked.route_last, model.l2a_config, "--route-last", source)
    if model.tokenizer is None:
        raise UserError(f"{source} has no tokenizer, so there is no text to read or write")
    ids = model.tokenizer.encode(prompt)
    if not ids:
        raise UserError("the prompt is empty; a continuation needs at least one token to follow")
    if prune_layers is not None:
        now, whole = cache_saving(model, len(ids) + options["max_new_tokens"])
        print(f"cache: {now / 1e6:.2f} MB, {whole / 1e6:.2f} MB with nothing pruned", file=sys.stderr)
    writer = Writer(model.tokenizer, out, ids, model.config.num_layers if colour and model.l2a_config else None)
    pieces = stream(model, ids, key=jax.random.key(seed) if options["temperature"] > 0 else None,
                    stop_tokens=model.tokenizer.end_ids, **options)
    print(f"compiling for {len(ids)} tokens of prompt ...", file=sys.stderr, flush=True)
    out.write(prompt)
    out.flush()
    times, counts = [time.perf_counter()], []
    for piece in pieces:
        for token, routed in piece:
            writer.write(token, routed)
        times.append(time.perf_counter())
        counts.append(len(piece))
    writer.close()
    # The first piece is the prefill, the second compiles the steps: the rate is that of the others.
    rate = f", {sum(counts[2:]) / (times[-1] - times[2]):.1f} tokens/s after that" if len(counts) > 2 else ""
    print(f"{len(ids)} tokens read and steps compiled in {times[min(2, len(counts))] - times[0]:.1f} s, "
          f"{sum(counts)} tokens written{rate}", file=sys.stderr)
