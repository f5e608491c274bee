"""The calls that every backend must answer as the oracle does: shapes, windows, packings and decisions."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax import attention
from l2a_jax.attention import reference, xla
from l2a_jax.attention.kernels import split
from l2a_jax.sharding import stripes


@dataclass(frozen=True)
class Case:
    """One call. `packing`: None, or document lengths with 0-padding after them; `rate`: share of True decisions.
    `places`: whose queries there are: "random", "one", "all", or "stripes" (another shard's in each sequence)."""

    operation: str
    length: int = 70
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    width: int = 64
    window: int | None = None
    sinks: int = 0
    packing: tuple[tuple[int, ...], ...] | None = None
    rate: float | str | None = None
    places: str | None = None

    def __str__(self):
        parts = [self.operation, f"T{self.length}", f"{self.heads}-{self.kv_heads}-{self.width}"]
        parts += [f"W{self.window}"] * (self.window is not None) + [f"S{self.sinks}"] * (self.sinks > 0)
        parts += ["packed"] * (self.packing is not None) + [f"rate_{self.rate}"] * (self.rate is not None)
        parts += [f"places_{self.places}"] * (self.places is not None)
        return "-".join(parts)

    def inputs(self, seed: int = 0, dtype=jnp.float32):
        """q, k, v, a cotangent for the output, and the options of the call."""
        rng = np.random.default_rng((zlib.crc32(str(self).encode()), seed))
        draw = lambda heads: jnp.asarray(  # noqa: E731
            rng.standard_normal((self.batch, self.length, heads, self.width)), dtype)
        q, k, v, cotangent = draw(self.heads), draw(self.kv_heads), draw(self.kv_heads), draw(self.heads)
        options = {}
        if self.window is not None:
            options |= {"window": self.window, "sinks": self.sinks}
        if self.packing is not None:
            ids = np.zeros((self.batch, self.length), np.int32)
            for row, lengths in zip(ids, self.packing, strict=True):
                ends = np.cumsum(lengths)
                for number, (end, size) in enumerate(zip(ends, lengths, strict=True), 1):
                    row[end - size:end] = number
            options["segment_ids"] = jnp.asarray(ids)
        if self.rate is not None:
            options["decisions"] = jnp.asarray(self._decisions(rng))
        if self.places is not None:
            places = self._places(rng)
            q, cotangent = (reference.take(x, places) for x in (q, cotangent))
            if "decisions" in options:
                options["decisions"] = reference.take(options["decisions"], places)
            options["places"] = places
        return q, k, v, cotangent, options

    def _places(self, rng):
        shards = {"all": 1, "one": self.length, "random": 3, "stripes": 4}[self.places]
        of_row = range(self.batch)
        if self.places == "stripes":
            rows = [stripes.places(self.length, shards, row % shards) for row in of_row]
        else:
            count = -(-self.length // shards)
            rows = [np.sort(rng.choice(self.length, count, replace=False)) for row in of_row]
        return jnp.asarray(np.stack(rows), jnp.int32)

    def _decisions(self, rng):
        shape = (self.batch, self.length)
        if self.rate == "one":
            decisions = np.zeros(shape, bool)
            decisions[0, self.length - 3] = True
            return decisions
        if self.rate == "uneven":  # none in the first row, nearly all in the last
            return rng.random(shape) < np.linspace(0, 0.95, self.batch)[:, None]
        return rng.random(shape) < self.rate

    def call(self, backend, q, k, v, options):
        """The face's answer to this case."""
        return getattr(attention, self.operation)(q, k, v, backend=backend, **options)


def on_gpu(cases) -> list:
    """The cases with the kernels as they are compiled, for a parametrised (backend, case)."""
    return [pytest.param("pallas", case, marks=pytest.mark.gpu, id=f"pallas-{case}") for case in cases]


# On a CPU each program runs once or twice: compiling it well would take most of the suite's time.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.partial(jax.jit, static_argnames=("operation", "backend", "numbers", "patched"),
                   compiler_options=_QUICK if jax.default_backend() == "cpu" else None)
def _run(q, k, v, cotangent, arrays, *, operation, backend, numbers, patched):
    """One program for all cases of one shape. `patched` is what tests change in the modules it is traced from."""
    call = functools.partial(getattr(attention, operation), backend=backend, **dict(numbers), **arrays)
    out, pull = jax.vjp(call, q, k, v)
    return (out, *pull(cotangent))


def compiled(case: Case, backend: str, options):
    """f(q, k, v, cotangent) = (out, dq, dk, dv) of one backend."""
    arrays = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
    numbers = tuple((name, value) for name, value in options.items() if name not in arrays)
    patched = xla.PLAIN_LENGTH, xla.CHUNK, split.PROGRAMS
    return lambda *inputs: _run(*inputs, arrays, operation=case.operation, backend=backend, numbers=numbers,
                                patched=patched)


@functools.cache
def oracle(case: Case):
    """The reference's answer to a case's own inputs."""
    *inputs, options = case.inputs()
    return value_and_gradients(case, "reference", *inputs, options)


def value_and_gradients(case: Case, backend: str, q, k, v, cotangent, options):
    """(out, dq, dk, dv) of one backend."""
    return compiled(case, backend, options)(q, k, v, cotangent)


_packed = ((30, 1, 25), (3, 3, 3, 60))
CASES = (
    Case("full"),
    Case("full", length=1, heads=7, kv_heads=1),
    Case("full", packing=_packed),
    Case("local", window=1),
    Case("local", window=17),
    Case("local", window=100),
    Case("local", length=131, window=4, heads=7, kv_heads=1),
    Case("local", window=9, sinks=4),
    Case("local", length=131, window=33, sinks=20, heads=14, kv_heads=2, batch=1),
    Case("local", window=9, sinks=4, packing=_packed),
    Case("local", window=5, sinks=1, packing=((70,), (1, 1, 1, 1, 40))),
    Case("local", length=67, window=9, sinks=3, width=128, heads=2, kv_heads=1),
    Case("routed", rate=0.2, length=131),
    Case("routed", rate=0.0),
    Case("routed", rate=1.0),
    Case("routed", rate="one"),
    Case("routed", rate="uneven", batch=3),
    Case("routed", rate=0.4, packing=_packed, heads=7, kv_heads=1),
    Case("routed", rate=0.5, length=67, width=128, heads=2, kv_heads=1),
    Case("mixed", rate=0.3, window=9, sinks=4, length=131),
    Case("mixed", rate="uneven", window=17, batch=3),
    Case("mixed", rate=0.0, window=9, sinks=2),
    Case("mixed", rate=1.0, window=9, sinks=2),
    Case("mixed", rate=0.4, window=6, sinks=3, packing=_packed, heads=7, kv_heads=1),
)
# Queries that are a part of the tokens.
PLACED = (
    Case("full", length=67, heads=2, kv_heads=1, places="random"),
    Case("full", length=72, packing=_packed, places="stripes"),
    Case("local", length=131, window=33, sinks=20, heads=14, kv_heads=2, places="random"),
    Case("local", length=72, window=9, sinks=4, packing=_packed, places="random"),
    Case("local", length=144, width=16, heads=2, kv_heads=1, window=5, sinks=1, packing=((70, 71), (20, 1, 50)),
         places="stripes"),
    Case("local", window=100, sinks=2, places="one"),
    Case("routed", length=144, rate="uneven", batch=3, places="stripes"),
    Case("routed", rate=0.4, packing=_packed, heads=7, kv_heads=1, width=16, places="random"),
    Case("mixed", length=144, rate=0.4, window=9, sinks=4, places="stripes"),
    Case("mixed", length=144, width=16, heads=2, kv_heads=1, rate=0.4, window=6, sinks=3,
         packing=((70, 71), (20, 1, 50)), places="random"),
    Case("mixed", rate=0.3, window=9, sinks=4, packing=_packed, places="all"),
)
