"""Speed of inference beside transformers in the same run: prefill, and one decode step over a filled cache.

Routed: 12 % of the tokens at random, in every layer (`decisions`), window 256, 4 sinks, the shared layer of `repair`.
Dense: the plain model. What the weights are and what stands in the cache changes no speed, so both may be random. Many
decode steps run inside one executable, the loop of `inference.generate.advance` itself.
"""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from l2a_jax.config import MODELS, L2AConfig, ModelConfig
from l2a_jax.inference.cache import cache_bytes, empty_cache, layout_of
from l2a_jax.inference.forward import decode_params, prefill
from l2a_jax.inference.generate import Generation, Options, Settings, State, advance
from l2a_jax.models.params import add_routing, init_params
from l2a_jax.nn import routing
from l2a_jax.research import tables
from l2a_jax.research.speed.scaling import COUNTS
from l2a_jax.research.speed.timing import median_ms
from l2a_jax.sharding import whole
from l2a_jax.sharding.axes import Axes
from l2a_jax.sharding.mesh import make

log = logging.getLogger("l2a_jax.speed")
LAYER = L2AConfig(window=256, sinks=4)
RATE = 0.12
STEPS = 64
KINDS = ("routed", "dense", "transformers")


@dataclass(frozen=True)
class InferenceCase:
    """One prefill of so many tokens, or one decode step after them."""

    operation: str  # prefill or decode
    tokens: int
    batch: int = 1
    context: int = 1  # devices that share the tokens of a prefill

    @property
    def name(self) -> str:
        """Operation, size, and over how many devices."""
        over = "" if self.context == 1 else f", context={self.context}"
        return f"{self.operation} {self.tokens:,} x {self.batch}{over}"


CASES = (*(InferenceCase("prefill", tokens) for tokens in (2_048, 8_192, 32_768, 131_072)),
         InferenceCase("decode", 2_048), InferenceCase("decode", 32_768), InferenceCase("decode", 32_768, 16))


def cases() -> tuple[InferenceCase, ...]:
    """Those of one device, and long prefills over as many as are here."""
    return CASES + tuple(InferenceCase("prefill", tokens, context=count) for tokens in (32_768, 131_072)
                         for count in COUNTS[1:] if count <= len(jax.devices()))


def measure(case: InferenceCase, params, config: ModelConfig, layer: L2AConfig | None, backend: str = "auto",
            repeats: int = 7, steps: int = STEPS) -> float:
    """Milliseconds of one prefill, or of one decode step: the median over `repeats`."""
    if layer is not None and "router" not in params["layers"]:
        params = add_routing(params, config, layer)
    if case.operation == "prefill":
        return _measure_prefill(case, params, config, layer, backend, repeats)
    return _measure_decode(case, params, config, layer, backend, repeats, steps)


def greedy(steps: int, decisions: Bool[Array, "L B S"] | None) -> Settings:
    """So many steps to the likeliest token, under these decisions; no token ends them."""
    return Settings(jnp.int32(steps), jnp.float32(0), jnp.float32(1), None, jnp.full((4,), -1, jnp.int32), decisions)


def _decisions(case, config, layer, length):
    if layer is None:
        return None
    return routing.random(jax.random.key(1), np.full(config.num_layers, RATE), case.batch, length)


def _measure_prefill(case, params, config, layer, backend, repeats):
    layout = layout_of(config, layer, case.tokens)

    def run(params, tokens, lengths, decisions):
        return prefill(params, tokens, lengths, config, layer, layout, decisions=decisions, backend=backend,
                       shards=case.context)[:2]

    if case.context > 1:
        mesh = make(Axes(context=case.context))
        run = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        params = whole.put(params, mesh)
    tokens = jax.random.randint(jax.random.key(0), (case.batch, case.tokens), 0, config.vocab_size)
    inputs = (params, tokens, jnp.full((case.batch,), case.tokens, jnp.int32),
              _decisions(case, config, layer, case.tokens))
    run = jax.jit(run).lower(*inputs).compile()
    _check_finite(case, jnp.isfinite(run(*inputs)[0]))
    return median_ms(lambda: run(*inputs), repeats=repeats)


def _measure_decode(case, params, config, layer, backend, repeats, steps):
    dtype = params["embed"]["embedding"].dtype
    room = case.tokens + steps
    options = Options(config, layer, layout_of(config, layer, room), False, False, backend)
    settings = greedy(steps, _decisions(case, config, layer, room))
    zeros = jnp.zeros((case.batch,), jnp.int32)

    def fresh():
        cache = empty_cache(config, options.layout, case.batch, dtype)
        leaves, tree = jax.tree.flatten(cache)
        leaves = [jax.random.normal(jax.random.key(i), leaf.shape, dtype) for i, leaf in enumerate(leaves)]
        decided = None if layer is None else jnp.zeros((config.num_layers, case.batch, room), bool)
        out = Generation(jnp.zeros((case.batch, steps), jnp.int32), zeros, zeros > 0,
                         jnp.zeros((case.batch, steps), jnp.float32), decided, zeros == 0)
        return State(jax.tree.unflatten(tree, leaves), zeros, zeros, zeros > 0, jnp.int32(0), out)

    @functools.partial(jax.jit, donate_argnums=1)
    def run(params, state, settings):
        state = state._replace(position=zeros + case.tokens, count=jnp.int32(0), done=zeros > 0)
        return advance(params, state, settings, options, steps)

    weights, state = jax.jit(decode_params)(params), jax.jit(fresh)()
    run = run.lower(weights, state, settings).compile()
    state = run(weights, state, settings)
    _check_finite(case, state.out.finite)

    def decode():
        nonlocal state
        state = run(weights, state, settings)
        return state

    return median_ms(decode, repeats=repeats) / steps


def _check_finite(case, finite):
    if not bool(finite.all()):
        raise FloatingPointError(f"{case.name}: logits are not finite")


def load(model: str | None):
    """(params, config, what they are) of a source, or of random weights of a named size."""
    name = model or "qwen2.5-0.5b"
    if name not in MODELS:
        from l2a_jax.sources import load_pretrained

        loaded = load_pretrained(name)
        params = {**loaded.params, "layers": {k: v for k, v in loaded.params["layers"].items() if k != "router"}}
        if "attention" not in params["layers"]:
            raise ValueError(f"{name} has separate attention sets; this measures plain and shared models")
        return params, loaded.config, f"weights of {name}"
    config = MODELS[name]
    params = jax.jit(lambda key: init_params(config, key, dtype=jnp.bfloat16))(jax.random.key(0))
    return params, config, f"random weights of {name}"


def markdown(result: dict) -> str:
    """The result as a short table."""
    rows = [[row["case"], *(f"**{row['ms'][kind]:.3g}**" if kind in row["ms"] else "-" for kind in KINDS),
             f"{row['cache_bytes'] / 1e6:,.0f}"] for row in result["cases"]]
    failures = [f"- not measured, {row['case']}, {name}: {why}" for row in result["cases"]
                for name, why in row["failed"].items()]
    return "\n".join([
        "# Speed of inference", "",
        f"{tables.said(result)} Medians in ms, bfloat16; {result['weights']}. Routed: {RATE:.0%} "
        f"of the tokens at random, window {LAYER.window}, {LAYER.sinks} sinks; dense: the plain model. Decode: one "
        f"step with that many tokens in the cache, {STEPS} steps in one executable. transformers: SDPA, decode with a "
        "static cache, compiled.", "", *tables.grid(["case", *KINDS, "cache MB"], rows), *failures]).rstrip() + "\n"


def main(out: Path | None, model: str | None = None, with_torch: bool = True, only: str = "") -> None:
    """Measure the cases in whose name `only`, a regular expression, is found; print the table, and write it and the
    JSON to `out`."""
    params, config, weights = load(model)
    result = {**tables.heading(), "weights": weights, "cases": []}
    chosen = tables.chosen(cases(), only)
    for case in chosen:
        times, failed = {}, {}
        for kind, layer in (("routed", LAYER), ("dense", None)):
            try:
                times[kind] = measure(case, params, config, layer)
            except jax.errors.JaxRuntimeError as error:  # out of memory, on a smaller card
                failed[kind] = tables.reason(error)
        log.info("%s: %s", case.name, json.dumps(times))
        result["cases"].append({"case": case.name, "ms": times, "failed": failed, "context": case.context,
                                "cache_bytes": cache_bytes(config, LAYER, case.batch, case.tokens)})
    if with_torch:  # last: the two libraries need not share the card's memory then
        del params
        jax.clear_caches()
        for case, row in zip(chosen, result["cases"], strict=True):
            if case.context > 1:
                continue  # the peer has one device
            try:
                from l2a_jax.research.speed.inference_peer import measure_torch

                row["ms"]["transformers"] = measure_torch(case, config, STEPS)
            except Exception as error:
                row["failed"]["transformers"] = tables.reason(error)
    tables.write(out, "speed_inference", result, markdown(result))
    print(markdown(result), flush=True)
