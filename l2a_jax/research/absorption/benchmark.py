"""Steps per second: one seed, three seeds vmapped, and the same model in compiled PyTorch, in one process.

All do the same training step (forward, backward, clip, AdamW) of the recipe's batch in the recipe's precision, on
random tokens that already lie on the device.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from l2a_jax.device import peak_memory_gb
from l2a_jax.files import write_json, write_text
from l2a_jax.research.absorption import arms, report, train
from l2a_jax.research.absorption.config import Arm, Preset

log = logging.getLogger("l2a_jax")
ROUNDS = 3


def steps_per_second(arm: Arm, preset: Preset, seeds: int, dense_backend: str | None) -> dict[str, float]:
    """Median over `ROUNDS` dispatches of `preset.scan` steps, after one that compiles."""
    recipe = dataclasses.replace(preset.recipe, steps=preset.scan * (ROUNDS + 1))
    program = train.Program(arm.model(preset.model, preset.experts), arm.attention, recipe, dense_backend)
    numbers = train.member_axis([train.arm_numbers(arm, program.config, recipe, preset.top_k)], seeds)
    names = np.arange(seeds, dtype=np.uint32)
    rng = np.random.default_rng(0)
    stream = jnp.asarray(rng.integers(0, preset.model.vocab_size, 1 << 20).astype(np.uint16))
    starts = rng.integers(0, (1 << 20) - recipe.seq_len - 1, (preset.scan, seeds, recipe.batch_size)).astype(np.int32)
    state = train.init_members(names, numbers.gate_std, config=program.config)
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        state, metrics = train.train_chunk(state, stream, starts, names, numbers, program=program)
        if not np.isfinite(np.asarray(metrics["loss"])).all():
            raise FloatingPointError("the benchmark's loss is not finite")
        times.append(time.perf_counter() - began)
    steady = statistics.median(times[1:]) / preset.scan
    return {"milliseconds_a_step": 1e3 * steady, "steps_per_second": 1 / steady, "compile_seconds": times[0] - times[1],
            "tokens_per_second": seeds * recipe.batch_size * recipe.seq_len / steady}


def run(preset: Preset, dense_backend: str | None, out: pathlib.Path) -> dict:
    """Measure, print, and write `absorption_benchmark.json` and `.md`."""
    report.check_place("benchmark", out)
    if preset.model.vocab_size == 0:
        preset = dataclasses.replace(preset, model=dataclasses.replace(preset.model, vocab_size=256))
    from l2a_jax.research.absorption import benchmark_torch

    rows: dict[str, dict] = {}
    for arm in (arms.soft_learned, arms.dense):
        for seeds in (1, 3):
            rows[f"{arm.name}, {seeds} seed{'s' * (seeds > 1)}"] = steps_per_second(arm, preset, seeds, dense_backend)
            log.info("%s", json.dumps({arm.name: seeds, **rows[next(reversed(rows))]}))
    memory = peak_memory_gb()
    reason = benchmark_torch.why_not()
    for name, gated in (("soft_learned", True), ("dense", False)):
        if reason is None:
            rows[f"{name}, compiled PyTorch, 1 seed"] = benchmark_torch.steps_per_second(preset, gated, ROUNDS)
    ratio = {name: rows[f"{name}, 3 seeds"]["milliseconds_a_step"] / rows[f"{name}, 1 seed"]["milliseconds_a_step"]
             for name in ("soft_learned", "dense")}
    result = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "peak_memory_gb": memory,
              "recipe": dataclasses.asdict(preset.recipe), "model": dataclasses.asdict(preset.model), "rows": rows,
              "three_seeds_over_one": ratio, "torch": reason or benchmark_torch.version()}
    recipe = preset.recipe
    lines = ["# Speed of the absorption suite", "",
             f"{result['device']}, jax {jax.__version__}, torch {result['torch']}; training steps of "
             f"{recipe.batch_size} x {recipe.seq_len} tokens, {recipe.dtype}; medians.", "",
             "| | ms a step | steps/s | tokens/s | compile s |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {row['milliseconds_a_step']:.2f} | {row['steps_per_second']:.1f} | "
              f"{row['tokens_per_second']:,.0f} | {row['compile_seconds']:.1f} |" for name, row in rows.items()]
    lines += ["", *(f"Three seeds cost {value:.2f} x one ({name})." for name, value in ratio.items())]
    if reason is not None:
        lines += [f"PyTorch was not measured: {reason}."]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "absorption_benchmark.json", result)
    write_text(out / "absorption_benchmark.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    return result
