"""Time every candidate block size of every kernel, and choose; `kernels/blocks.py` holds what won."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from itertools import product
from pathlib import Path

import jax

from l2a_jax.attention.kernels.backward_kv import backward_kv
from l2a_jax.attention.kernels.backward_q import backward_q
from l2a_jax.attention.kernels.blocks import loop_of, table
from l2a_jax.attention.kernels.forward import forward
from l2a_jax.attention.kernels.plan import Block, Spec, make_plan
from l2a_jax.research import tables
from l2a_jax.research.speed.cases import HEADS, SpeedCase
from l2a_jax.research.speed.timing import compile_jax, time_compiled

_CALLS = (("local", 32_768, {"window": 1_024}), ("local", 4_096, {"batch": 8, "window": 512}),
          *(("local", 16_384, {"window": window}) for window in (2_048, 4_096, 8_192, 14_336)),
          ("full", 16_384, {}), ("routed", 32_768, {"rate": 0.2}), ("routed", 32_768, {"rate": 0.05}),
          ("mixed", 32_768, {"rate": 0.2, "window": 1_024}), ("mixed", 32_768, {"rate": 0.05, "window": 256}),
          ("mixed", 2_048, {"batch": 4, "rate": 0.5, "window": 512}))
CASES = [SpeedCase(operation, length, width, **options) for width in HEADS for operation, length, options in _CALLS]
"""Each tunes the row of the table that its own call takes (`loop_of`)."""
_TILES = {  # (kernel, head width): (rows, keys, warps)
    ("forward", 64): [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)],
    ("backward_q", 64): [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8)],
    ("backward_kv", 64): [(32, 64, 4), (64, 64, 4), (64, 128, 8), (128, 64, 8)],
    ("forward", 128): [(64, 32, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8)],
    ("backward_q", 128): [(64, 32, 4), (64, 64, 4), (64, 64, 8), (64, 128, 8), (128, 32, 8), (128, 64, 8)],
    ("backward_kv", 128): [(32, 64, 4), (64, 64, 4), (32, 64, 8), (64, 64, 8), (128, 64, 8), (32, 128, 8),
                           (64, 128, 8)],
}
KERNELS = ("forward", "backward_q", "backward_kv")


def candidates(kernel: str, width: int) -> list[Block]:
    """Every tile with every depth of the load pipeline; one loop in place of two for the forward pass."""
    tiles = _TILES[kernel, width]
    found = [Block(*tile, stages) for tile, stages in product(tiles, (2, 3))]
    if kernel == "forward":
        found += [Block(*tile, 3, flat=True) for tile in tiles]
        found += [Block(64, 64, 4, 2, flat=True), Block(64, 64 if width == 64 else 32, 4, 4, flat=True),
                  Block(128, 64, 8, 4)]
    return found


def spec_of(case: SpeedCase) -> Spec:
    """What the kernels are told of a case."""
    kind = "all" if case.rate is None else case.operation
    return Spec(kind, case.length, *HEADS[case.width], case.width, case.window)


def choose(results: list[dict]) -> dict[tuple[int, str], dict[str, str]]:
    """(head width, kind of loop) -> kernel -> the block of least mean of time over best time among that row's cases.

    `results`: entries of `sweep`. A block that failed in one of the cases is not taken.
    """
    rows = {}
    for case in CASES:
        rows.setdefault((case.width, loop_of(spec_of(case))), []).append(case.name)
    chosen = {}
    for row, cases in rows.items():
        for kernel in KERNELS:
            times = [{entry["block"]: entry["ms"] for entry in results
                      if (entry["case"], entry["kernel"]) == (case, kernel) and "ms" in entry} for case in cases]
            costs = {block: sum(ms[block] / min(ms.values()) for ms in times)
                     for block in set.intersection(*map(set, times))}
            if costs:
                chosen.setdefault(row, {})[kernel] = min(costs, key=costs.get)
    return chosen


def calls(case: SpeedCase):
    """(prepare, run): `run(kernel, block, **options)` is a function of what `prepare` makes of a case's inputs."""
    spec = spec_of(case)

    def plan(decisions):
        return make_plan(spec, case.batch, decisions, None)

    def prepare(q, k, v, d_out, decisions):
        blocks = table("sm_90", case.width, 2, loop_of(spec))
        out, lse = forward(spec, blocks.forward, q, k, v, plan(decisions))
        _, delta, rows_q, rows_d_out = backward_q(spec, blocks.backward_q, q, k, v, plan(decisions), out, lse, d_out)
        return q, k, v, d_out, decisions, out, lse, delta, rows_q, rows_d_out

    def run(kernel, block, **options):
        def call(q, k, v, d_out, decisions, out, lse, delta, rows_q, rows_d_out):
            p = plan(decisions)
            if kernel == "forward":
                return forward(spec, block, q, k, v, p)
            if kernel == "backward_q":
                return backward_q(spec, block, q, k, v, p, out, lse, d_out)
            return backward_kv(spec, block, rows_q, k, v, p, lse, delta, rows_d_out, **options)
        return call

    return prepare, run


def sweep(case: SpeedCase, kernels=KERNELS, workers: int = 12) -> list[dict]:
    """Milliseconds of each candidate of each kernel, best first; what does not compile carries its reason."""
    prepare, run = calls(case)
    sets = [jax.jit(prepare)(*inputs) for inputs in case.inputs(2)]
    jobs = [(kernel, block) for kernel in kernels for block in candidates(kernel, case.width)]
    results = []
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(compile_jax, run(kernel, block), sets) for kernel, block in jobs]
        wait(futures)  # a compiling thread would disturb the times
        for (kernel, block), future in zip(jobs, futures, strict=True):
            entry = {"case": case.name, "kernel": kernel, "block": str(block)}
            try:
                entry["ms"] = time_compiled(future.result(), sets, repeats=5)
            except Exception as error:
                entry["failed"] = str(error).splitlines()[0][:160]
            results.append(entry)
    return sorted(results, key=lambda entry: (entry["kernel"], entry.get("ms", float("inf"))))


def main(out: Path | None, only: str) -> None:
    """Sweep the cases, print the best of each kernel and what was chosen, write everything to `out`."""
    everything = []
    for case in tables.chosen(CASES, only):
        results = sweep(case)
        everything += results
        for kernel in KERNELS:
            for entry in [entry for entry in results if entry["kernel"] == kernel][:6]:
                print(f"{case.name:40s} {kernel:12s} {entry.get('ms', -1):8.3f} ms {entry['block'][5:]}", flush=True)
    for row, kernels in choose(everything).items():
        print(*row, kernels, flush=True)
    tables.write(out, "blocks", everything)
