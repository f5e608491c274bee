"""Speed of inference beside transformers in the same run: prefill, and one decode step over a filled cache.

Routed: 12 % of the tokens at random, in every layer (`decisions`), window 256, 4 sinks, the shared layer of `repair`.
Dense: the plain model. What the weights are and what stands in the cache changes no speed, so both may be random. Many
decode steps run inside one executable, the loop of `inference.generate.advance` itself.
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from l2a_jax.config import MODELS, L2AConfig, ModelConfig
from l2a_jax.files import write_text
from l2a_jax.inference.cache import cache_bytes, empty_cache, layout_of
from l2a_jax.inference.forward import decode_params, prefill
from l2a_jax.inference.generate import Generation, Options, Settings, State, advance
from l2a_jax.models.params import add_routing, init_params
from l2a_jax.nn import routing
from l2a_jax.research.speed.attention import versions

log = logging.getLogger("l2a_jax.speed")
LAYER = L2AConfig(window=256, sinks=4)
RATE = 0.12
STEPS = 64
KINDS = ("routed", "dense", "transformers")


@dataclass(frozen=True)
class InferenceCase:
    """`must` and `aim`: milliseconds at 12 % routed on one H100; `dense_must`: of the plain model."""

    operation: str  # prefill or decode
    tokens: int
    batch: int = 1
    must: float | None = None
    aim: float | None = None
    dense_must: float | None = None

    @property
    def name(self) -> str:
        """Operation and size."""
        return f"{self.operation} {self.tokens:,} x {self.batch}"


CASES = (
    InferenceCase("prefill", 2_048), InferenceCase("prefill", 8_192),
    InferenceCase("prefill", 32_768, must=110, aim=85), InferenceCase("prefill", 131_072, must=750, aim=480),
    InferenceCase("decode", 2_048), InferenceCase("decode", 32_768, must=1.6, aim=0.8),
    InferenceCase("decode", 32_768, 16, must=8, aim=2.5, dense_must=12),
)


def measure(case: InferenceCase, params, config: ModelConfig, layer: L2AConfig | None, backend: str = "auto",
            repeats: int = 7, steps: int = STEPS) -> float:
    """Milliseconds of one prefill, or of one decode step: the median over `repeats`."""
    if layer is not None and "router" not in params["layers"]:
        params = add_routing(params, config, layer)
    if case.operation == "prefill":
        return _measure_prefill(case, params, config, layer, backend, repeats)
    return _measure_decode(case, params, config, layer, backend, repeats, steps)


def _decisions(case, config, layer, length):
    if layer is None:
        return None
    return routing.random(jax.random.key(1), np.full(config.num_layers, RATE), case.batch, length)


def _measure_prefill(case, params, config, layer, backend, repeats):
    layout = layout_of(config, layer, case.tokens)
    run = jax.jit(lambda *inputs: prefill(params=inputs[0], tokens=inputs[1], lengths=inputs[2], decisions=inputs[3],
                                          config=config, l2a_config=layer, layout=layout, backend=backend)[:2])
    tokens = jax.random.randint(jax.random.key(0), (case.batch, case.tokens), 0, config.vocab_size)
    inputs = (params, tokens, jnp.full((case.batch,), case.tokens, jnp.int32),
              _decisions(case, config, layer, case.tokens))
    run = run.lower(*inputs).compile()
    logits = run(*inputs)[0]
    _check_finite(case, logits)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1e3


def _measure_decode(case, params, config, layer, backend, repeats, steps):
    dtype = params["embed"]["embedding"].dtype
    room = case.tokens + steps
    options = Options(config, layer, layout_of(config, layer, room), False, False, backend)
    settings = Settings(jnp.int32(steps), jnp.float32(0), jnp.float32(1), None, jnp.full((4,), -1, jnp.int32),
                        _decisions(case, config, layer, room))
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
    if not bool(state.out.finite.all()):
        raise FloatingPointError(f"{case.name}: logits are not finite")
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        state = jax.block_until_ready(run(weights, state, settings))
        seconds.append((time.perf_counter() - began) / steps)
    return statistics.median(seconds) * 1e3


def _check_finite(case, logits):
    if not bool(jnp.isfinite(logits).all()):
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
    lines = ["# Speed of inference", "",
             f"{result['date']}, {result['device']}, {', '.join(f'{k} {v}' for k, v in result['versions'].items())}. "
             f"Medians in ms of `{result['command']}`; {result['weights']}, bfloat16. Routed: {RATE:.0%} of the tokens "
             f"at random, window {LAYER.window}, {LAYER.sinks} sinks; dense: the plain model. Decode: one step with "
             f"that many tokens in the cache, {STEPS} steps in one executable. transformers: SDPA, decode with a "
             "static cache, compiled.", "",
             "| case | routed | must / aim | dense | must | transformers | cache MB |", "|---|---|---|---|---|---|---|"]
    for row in result["cases"]:
        cells = [f"**{row['ms'][kind]:.3g}**" if kind in row["ms"] else "-" for kind in KINDS]
        wanted = " / ".join("-" if x is None else f"{x:g}" for x in (row["must"], row["aim"]))
        dense = "no slower" if row["dense_must"] is None else f"{row['dense_must']:g}"
        lines.append(f"| {row['case']} | {cells[0]} | {wanted} | {cells[1]} | {dense} | {cells[2]} | "
                     f"{row['cache_bytes'] / 1e6:,.0f} |")
    lines += [f"\nNot measured: {row['case']}, {name}: {why}" for row in result["cases"]
              for name, why in row["failed"].items()]
    return "\n".join(lines) + "\n"


def main(out: Path | None, model: str | None = None, with_torch: bool = True, only: str = "") -> None:
    """Measure the cases in whose name `only`, a regular expression, is found; print the table, and write it and the
    JSON to `out`."""
    params, config, weights = load(model)
    result = {"date": datetime.date.today().isoformat(), "command": " ".join(["python", *sys.argv]),
              "device": jax.devices()[0].device_kind, "versions": versions(), "weights": weights, "cases": []}
    for case in (case for case in CASES if re.search(only, case.name)):
        times, failed = {}, {}
        for kind, layer in (("routed", LAYER), ("dense", None)):
            try:
                times[kind] = measure(case, params, config, layer)
            except jax.errors.JaxRuntimeError as error:  # out of memory, on a smaller card
                failed[kind] = str(error).splitlines()[0][:200]
        log.info("%s: %s", case.name, json.dumps(times))
        result["cases"].append({"case": case.name, "must": case.must, "aim": case.aim, "dense_must": case.dense_must,
                                "ms": times, "failed": failed,
                                "cache_bytes": cache_bytes(config, LAYER, case.batch, case.tokens)})
    if with_torch:  # last: the two libraries need not share the card's memory then
        del params
        jax.clear_caches()
        for row in result["cases"]:
            case = next(case for case in CASES if case.name == row["case"])
            try:
                from l2a_jax.research.speed.inference_torch import measure_torch

                row["ms"]["transformers"] = measure_torch(case, config, STEPS)
            except Exception as error:
                row["failed"]["transformers"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "speed_inference.json", json.dumps(result, indent=1) + "\n")
        write_text(out / "speed_inference.md", markdown(result))
    print(markdown(result), flush=True)
