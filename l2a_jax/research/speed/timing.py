"""Times on an accelerator, once for all tables: the median of repeats, each of which waits for the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def median_ms(run: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready, *, repeats: int = 7,
              each: int = 1) -> float:
    """Milliseconds of one `run()`: the median over `repeats` of `each` calls; `wait` then gets the last result."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(each):
            out = run()
        wait(out)
        seconds.append((time.perf_counter() - began) / each)
    return statistics.median(seconds) * 1e3


def torch_ms(run: Callable[[], Any], *, repeats: int = 7, each: int = 1) -> tuple[float, float]:
    """The same of PyTorch on CUDA after three calls that warm up, and the seconds that those took."""
    import torch

    began = time.perf_counter()
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    warming = time.perf_counter() - began
    return median_ms(run, lambda _: torch.cuda.synchronize(), repeats=repeats, each=each), warming


def compile_jax(function: Callable, sets: Sequence[tuple]):
    """The executable that `time_compiled` runs, `function(*inputs)` for several sets of inputs.

    All sets go through one executable, so the host's dispatch is not in the time; different inputs keep XLA from
    merging the calls, and keep the cache from holding one call's data for the next. Compiling releases the interpreter,
    so threads can share the work.
    """
    return jax.jit(lambda sets: [function(*inputs) for inputs in sets]).lower(sets).compile()


def time_compiled(compiled, sets: Sequence[tuple], repeats: int = 7) -> float:
    """Milliseconds of one set. A repeat launches the executable several times before it waits, so that the device never
    does."""
    start = time.perf_counter()
    jax.block_until_ready(compiled(sets))
    jax.block_until_ready(compiled(sets))
    launches = int(min(8, max(1, 0.1 / (time.perf_counter() - start))))
    return median_ms(lambda: compiled(sets), repeats=repeats, each=launches) / len(sets)


def matmul_ceiling(size: int = 8192) -> float:
    """Measured TFLOP/s of a bfloat16 matrix product on random data: what no attention can exceed by much."""
    keys = jax.random.split(jax.random.key(0), 4)
    sets = [tuple(jax.random.normal(k, (size, size), jnp.bfloat16) for k in pair) for pair in (keys[:2], keys[2:])]
    return 2 * size**3 / time_compiled(compile_jax(jnp.matmul, sets), sets) / 1e9
