"""Time the backward pass for keys with 1 to 4 programs on every block of them; `backward_kv.SHARED` is what won."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from l2a_jax.attention.kernels.blocks import loop_of, table
from l2a_jax.research import tables
from l2a_jax.research.speed.block_sizes import calls, spec_of
from l2a_jax.research.speed.cases import HEADS, SpeedCase
from l2a_jax.research.speed.timing import compile_jax, time_compiled

PARTS = (1, 2, 3, 4)
_WINDOWS = {(2_048, 1): (512,), (2_048, 2): (512,), (2_048, 4): (512,), (4_096, 2): (1_024,), (4_096, 4): (2_048,),
            (4_096, 8): (512,), (8_192, 1): (512,), (65_536, 1): (4_096,),
            (16_384, 1): (512, 1_024, 2_048, 3_072, 4_096, 8_192, 12_288, 14_336),
            (32_768, 1): (256, 512, 1_024, 4_096, 8_192, 16_384, 24_576)}
_FULL = ((2_048, 4), (2_048, 8), (4_096, 1), (4_096, 8), (8_192, 1), (16_384, 1), (32_768, 1))
_ROUTED = ((2_048, 1, 0.2), (2_048, 4, 0.2), (2_048, 4, 1.0), (4_096, 8, 0.2), (8_192, 1, 0.2), (32_768, 1, 0.2),
           (131_072, 1, 0.2))
CASES = [case for width in HEADS for case in (
    *(SpeedCase("local", length, width, batch, window) for (length, batch), windows in _WINDOWS.items()
      for window in windows),
    *(SpeedCase("full", length, width, batch) for length, batch in _FULL),
    *(SpeedCase("routed", length, width, batch, rate=rate) for length, batch, rate in _ROUTED),
    *(SpeedCase("mixed", length, width, batch, window=512, rate=0.2) for length, batch in ((2_048, 4), (8_192, 1))))]


def sweep(case: SpeedCase, rounds: int = 2, workers: int = 4) -> list[float]:
    """Milliseconds for each of `PARTS`, the least of `rounds` taken in turn."""
    prepare, run = calls(case)
    spec = spec_of(case)
    block = table("sm_90", case.width, 2, loop_of(spec)).backward_kv
    sets = [jax.jit(prepare)(*inputs) for inputs in case.inputs(2)]
    with ThreadPoolExecutor(workers) as pool:
        compiled = list(pool.map(lambda parts: compile_jax(run("backward_kv", block, parts=parts), sets), PARTS))
    times = [[time_compiled(one, sets, repeats=5) for one in compiled] for _ in range(rounds)]
    return [min(column) for column in zip(*times, strict=True)]


def main(out: Path | None, only: str) -> None:
    """Print every case's times, and write them to `out`."""
    rows = []
    for case in tables.chosen(CASES, only):
        rows.append({"case": case.name, "ms": [round(ms, 4) for ms in sweep(case)]})
        print(json.dumps(rows[-1]), flush=True)
    tables.write(out, "shares", rows)
