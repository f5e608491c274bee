"""What the device is and can do. The one place that asks JAX; everything else asks here."""

from __future__ import annotations

import os
import pathlib
import resource

import jax
from jax._src import xla_bridge  # whether a device is in use has no public name

CPU_BATCH_TOKENS = 4_096
"""Of one forward pass on a CPU, where more of them bring no speed."""


def platform() -> str:
    """`cpu`, `gpu` or another one of JAX's."""
    return jax.default_backend()


def in_use() -> bool:
    """Whether this process has used one already; asking for its platform does."""
    return xla_bridge.backends_are_initialized()


def kind() -> str:
    """The maker's name for it, such as `NVIDIA H100 80GB HBM3`."""
    return jax.devices()[0].device_kind


def described() -> str:
    """How results name it: `1 x NVIDIA H100 80GB HBM3`."""
    return f"{len(jax.devices())} x {kind()}"


def capability(absent: float = 9.0) -> float:
    """Its compute capability: 0 for a GPU that is not NVIDIA's, and `absent` for what is no GPU (by default that of the
    card one lowers for, Hopper)."""
    try:
        return float(getattr(jax.devices()[0], "compute_capability", absent))
    except ValueError:  # "gfx942"
        return 0.0


def default_dtype() -> str:
    """What a forward pass computes in unless told otherwise: a CPU is slower in bfloat16 than in float32."""
    return "float32" if platform() == "cpu" else "bfloat16"


def batch_tokens(accelerator: int) -> int:
    """Tokens of one forward pass: so many on an accelerator, `CPU_BATCH_TOKENS` on a CPU."""
    return CPU_BATCH_TOKENS if platform() == "cpu" else accelerator


def memory_bytes() -> int:
    """Memory that this process may use: the accelerator's limit, or the machine's (or container's) on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return physical if text == "max" else min(physical, int(text))


def peak_memory_gb() -> float:
    """Peak memory of this process in GB: the accelerator's where there is one, else the resident set."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
