"""The Pallas kernels in interpret mode: the same code, run step by step on any device. For tests; slow."""

from __future__ import annotations

import functools

from l2a_jax.attention import pallas
from l2a_jax.attention.kernels import blocks

why_not = pallas.why_not
full, local, local_with_lse, routed, mixed, both = (
    functools.partial(operation, interpret=True, table=blocks.INTERPRET)
    for operation in (pallas.full, pallas.local, pallas.local_with_lse, pallas.routed, pallas.mixed, pallas.both)
)
