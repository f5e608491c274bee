"""Times on an accelerator: many calls over several input sets in one executable, and the median of repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def time_jax(function: Callable, sets: Sequence[tuple], repeats: int = 7) -> float:
    """Milliseconds of one `function(*inputs)`, compiled: the median over `repeats` of the mean over the input sets.

    All sets go through one executable, so the host's dispatch is not in the number; different inputs keep XLA from
    merging the calls, and keep the cache from holding one call's data for the next.
    """
    return time_compiled(compile_jax(function, sets), sets, repeats)


def compile_jax(function: Callable, sets: Sequence[tuple]):
    """The executable that `time_compiled` runs; compiling releases the interpreter, so threads can share the work."""
    return jax.jit(lambda sets: [function(*inputs) for inputs in sets]).lower(sets).compile()


def time_compiled(compiled, sets: Sequence[tuple], repeats: int = 7) -> float:
    """See `time_jax`. A repeat launches the executable several times before it waits, so that the device never does."""
    start = time.perf_counter()
    jax.block_until_ready(compiled(sets))
    jax.block_until_ready(compiled(sets))
    launches = int(min(8, max(1, 0.1 / (time.perf_counter() - start))))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(launches):
            out = compiled(sets)
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - start) / launches)
    return statistics.median(seconds) / len(sets) * 1e3


def matmul_ceiling(size: int = 8192) -> float:
    """Measured TFLOP/s of a bfloat16 matrix product on random data: what no attention can exceed by much."""
    keys = jax.random.split(jax.random.key(0), 4)
    sets = [tuple(jax.random.normal(k, (size, size), jnp.bfloat16) for k in pair) for pair in (keys[:2], keys[2:])]
    return 2 * size**3 / time_jax(jnp.matmul, sets) / 1e9


def time_torch(function: Callable[[int], None], calls: int, repeats: int = 7) -> float:
    """Milliseconds of one PyTorch call by device events; `function(i)` launches it on the i-th input set."""
    import torch

    for i in range(calls):
        function(i)
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(calls):
            function(i)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)
