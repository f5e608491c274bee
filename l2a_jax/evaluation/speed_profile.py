"""Where the time of a training step goes: milliseconds by kernel, from the profiler's own record of the device."""

from __future__ import annotations

import collections
import re
import tempfile
from pathlib import Path

import jax

from l2a_jax.evaluation.speed_training import Step, StepCase


def kernel_times(function, calls: int = 3) -> list[tuple[str, float, float]]:
    """(kernel, milliseconds a call, launches a call) of everything that `function()` runs on the device, longest first.

    Kernels that differ only by a trailing number count as one.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                out = function()
            jax.block_until_ready(out)
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        spent, launches = collections.Counter(), collections.Counter()
        for plane in data.planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    name = re.sub(r"[_.]\d+$", "", event.name)
                    spent[name] += event.duration_ns / 1e6 / calls
                    launches[name] += 1 / calls
    return [(name, ms, launches[name]) for name, ms in spent.most_common()]


def main(case: StepCase, top: int = 40) -> None:
    """Print the kernels of one training step."""
    step = Step(case)
    for _ in range(3):
        jax.block_until_ready(step.run())
    rows = kernel_times(step.run)
    print(f"{case.name}: {sum(ms for _, ms, _ in rows):.1f} ms on the device")
    for name, ms, launches in rows[:top]:
        print(f"{ms:9.3f} ms {launches:7.0f} x  {name[:110]}")
