"""Steps per second of the suite: one seed, and three side by side.

A step is forward, backward, clip and AdamW of the recipe's batch in the recipe's precision, on random tokens that
already lie on the device.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib

import jax.numpy as jnp
import numpy as np

from l2a_jax import device
from l2a_jax.research import tables
from l2a_jax.research.absorption import arm_training, arms, outcome
from l2a_jax.research.absorption.definitions import Arm, SuiteConfig
from l2a_jax.research.speed.timing import median_ms

log = logging.getLogger("l2a_jax")
ROUNDS = 3


def steps_per_second(arm: Arm, preset: SuiteConfig, seeds: int, dense_backend: str | None) -> dict[str, float]:
    """Median over `ROUNDS` dispatches of `preset.scan` steps, after one that compiles."""
    recipe = dataclasses.replace(preset.recipe, steps=preset.scan * (ROUNDS + 1))
    program = arm_training.Program(arm.model(preset.model, preset.experts), arm.attention, recipe, dense_backend)
    numbers = arm_training.member_axis([arm_training.arm_numbers(arm, program.config, recipe, preset.top_k)], seeds)
    names = np.arange(seeds, dtype=np.uint32)
    rng = np.random.default_rng(0)
    stream = jnp.asarray(rng.integers(0, preset.model.vocab_size, 1 << 20).astype(np.uint16))
    starts = rng.integers(0, (1 << 20) - recipe.seq_len - 1, (preset.scan, seeds, recipe.batch_size)).astype(np.int32)
    state = arm_training.init_members(names, numbers.gate_std, config=program.config)

    def chunk():
        nonlocal state
        state, metrics = arm_training.train_chunk(state, stream, starts, names, numbers, program=program)
        return metrics["loss"]

    def check(loss):
        if not np.isfinite(np.asarray(loss)).all():
            raise FloatingPointError("the benchmark's loss is not finite")

    first, steady = median_ms(chunk, check, repeats=1), median_ms(chunk, check, repeats=ROUNDS)
    ms = steady / preset.scan
    return {"milliseconds_a_step": ms, "steps_per_second": 1e3 / ms, "compile_seconds": (first - steady) / 1e3,
            "tokens_per_second": 1e3 * seeds * recipe.batch_size * recipe.seq_len / ms}


def run(preset: SuiteConfig, dense_backend: str | None, out: pathlib.Path) -> None:
    """Measure, print, and write `absorption_benchmark.json` and `.md`."""
    outcome.check_place("benchmark", out)
    preset = dataclasses.replace(preset, model=dataclasses.replace(
        preset.model, vocab_size=preset.model.vocab_size or 256))
    rows: dict[str, dict] = {}
    for arm in (arms.soft_learned, arms.dense):
        for seeds in (1, 3):
            name = f"{arm.name}, {seeds} seed{'s' * (seeds > 1)}"
            rows[name] = steps_per_second(arm, preset, seeds, dense_backend)
            log.info("%s", json.dumps({name: rows[name]}))
    ratio = {name: rows[f"{name}, 3 seeds"]["milliseconds_a_step"] / rows[f"{name}, 1 seed"]["milliseconds_a_step"]
             for name in ("soft_learned", "dense")}
    recipe = preset.recipe
    result = {**tables.heading(), "peak_memory_gb": device.peak_memory_gb(), "recipe": dataclasses.asdict(recipe),
              "model": dataclasses.asdict(preset.model), "rows": rows, "three_seeds_over_one": ratio}
    text = "\n".join([
        "# Speed of the absorption suite", "",
        f"{tables.said(result)} Training steps of {recipe.batch_size} x {recipe.seq_len} tokens, {recipe.dtype}; "
        "medians.", "",
        *tables.grid(["", "ms a step", "steps/s", "tokens/s", "compile s"], [
            [name, f"{row['milliseconds_a_step']:.2f}", f"{row['steps_per_second']:.1f}",
             f"{row['tokens_per_second']:,.0f}", f"{row['compile_seconds']:.1f}"] for name, row in rows.items()]),
        *(f"Three seeds cost {value:.2f} x one ({name})." for name, value in ratio.items())])
    tables.write(out, "absorption_benchmark", result, text + "\n")
    print(text)
