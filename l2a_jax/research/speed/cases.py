"""The attention calls whose speed is measured, and what they cost.

`authors` are the figures of the L2A release's own Triton kernel on an H100.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

HEADS = {64: (14, 2), 128: (12, 2)}  # Qwen2.5-0.5B and 1.5B


@dataclass(frozen=True)
class SpeedCase:
    """One call. `authors`: milliseconds of (forward, forward and backward), None where none is reported."""

    operation: str
    length: int
    width: int = 64
    batch: int = 1
    window: int | None = None
    rate: float | None = None
    authors: tuple[float | None, float | None] = (None, None)

    @property
    def name(self) -> str:
        """Operation, size, and option, as in the tables."""
        heads = "/".join(map(str, (*HEADS[self.width], self.width)))
        rate = "" if self.rate is None else f" {self.rate:.0%}"
        window = "" if self.window is None else f" W={self.window:,}"
        return f"{self.operation} {self.batch} x {self.length:,}{rate}{window}, {heads}"

    def inputs(self, count: int) -> list[tuple]:
        """`count` sets of bfloat16 (q, k, v, cotangent, decisions); decisions are None without a `rate`."""
        heads, kv_heads = HEADS[self.width]

        @jax.jit
        def draw(key):
            keys = jax.random.split(key, 5)
            size = self.batch, self.length
            arrays = [jax.random.normal(k, (*size, n, self.width), jnp.bfloat16)
                      for k, n in zip(keys, (heads, kv_heads, kv_heads, heads), strict=False)]
            decisions = None if self.rate is None else jax.random.bernoulli(keys[4], self.rate, size)
            return (*arrays, decisions)

        return [draw(jax.random.key(i)) for i in range(count)]

    @property
    def sets(self) -> int:
        """Input sets that fit beside their gradients in a few GB."""
        return int(np.clip(2**18 // (self.batch * self.length), 2, 4))

    def teraflops(self, backward: bool) -> float:
        """10^12 operations: 4 N H for each visible (query, key) pair, and 2.5 times that for a backward pass."""
        everything = np.arange(1, self.length + 1, dtype=np.float64)
        near = 0.0 if self.window is None else np.minimum(everything, self.window).sum()
        far = everything.sum() * (self.rate if self.rate is not None else float(self.window is None))
        pairs = self.batch * (far + near * (1.0 - (self.rate or 0.0)))
        return 4 * HEADS[self.width][0] * self.width * pairs * (3.5 if backward else 1.0) / 1e12


_AUTHORS = {  # by head width, length and share routed
    (64, 8_192, 0.2): (1.39, 2.37), (64, 32_768, 0.2): (2.32, 7.71), (64, 32_768, 0.05): (1.45, 3.46),
    (64, 131_072, 0.2): (18.7, 91.9), (128, 32_768, 0.2): (2.65, 10.0), (128, 131_072, 0.2): (29.3, 122.0)}


def standard_cases() -> list[SpeedCase]:
    """Every operation, at head widths 64 and 128."""
    return [case for width in HEADS for case in (
        SpeedCase("local", 32_768, width, window=1_024), SpeedCase("local", 4_096, width, 8, window=512),
        *(SpeedCase("routed", length, width, rate=rate, authors=_AUTHORS.get((width, length, rate), (None, None)))
          for length, rate in ((8_192, 0.2), (32_768, 0.2), (32_768, 0.05), (131_072, 0.2))),
        SpeedCase("mixed", 32_768, width, rate=0.2, window=1_024),
        *(SpeedCase("full", length, width) for length in ((8_192, 32_768) if width == 64 else (32_768,))))]


def window_cases() -> list[SpeedCase]:
    """Ratios of length to window from 32 down to 1: the windowed path must never be slower than the full one."""
    windows = (512, 1_024, 2_048, 4_096, 8_192, 12_288, 14_336, 16_384)
    return [case for width in HEADS for case in (
        *(SpeedCase("local", 16_384, width, window=window) for window in windows), SpeedCase("full", 16_384, width))]
