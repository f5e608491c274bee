"""Where the time of a training step goes: milliseconds by kernel, from the profiler's own record of the device."""

from __future__ import annotations

import collections
import re
import tempfile
from pathlib import Path

import jax

from l2a_jax.research.speed.training_steps import Step, StepCase


def kernel_times(function, calls: int = 3) -> collections.Counter:
    """(kernel name) -> [milliseconds a call, launches a call] of everything that `function()` runs on the device."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                out = function()
            jax.block_until_ready(out)
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        events = (event for plane in data.planes if "GPU" in plane.name
                  for line in plane.lines if line.name.startswith("Stream") for event in line.events)
        spent = collections.defaultdict(lambda: [0.0, 0.0])
        for event in events:
            entry = spent[event.name, str(dict(event.stats).get("hlo_op", ""))]
            entry[0] += event.duration_ns / 1e6 / calls
            entry[1] += 1 / calls
    return spent


def origins(compiled_text: str) -> dict[str, str]:
    """Instruction name -> the scope of the code that it came from, out of a compiled program's text."""
    found = {}
    for match in re.finditer(r"%?([\w.\-]+) = (\S+) .*?op_name=\"([^\"]*)\"", compiled_text):
        scope = re.sub(r"jit\([^)]*\)/|while/body/|closed_call/|rematted_computation/|checkpoint/", "", match[3])
        found[match[1]] = f"{match[2][:40]} {scope[-70:]}"
    return found


def main(case: StepCase, top: int = 40) -> None:
    """Print the kernels of one training step: grouped by name, then the longest groups of one origin."""
    step = Step(case)
    for _ in range(3):
        jax.block_until_ready(step.run())
    spent = kernel_times(step.run)
    where = origins(step.compiled.as_text())
    print(f"{case.name}: {sum(ms for ms, _ in spent.values()):.1f} ms on the device, compiled in "
          f"{step.compile_seconds:.0f} s, {step.bytes / 1e9:.2f} GB")

    def kernel(name, hlo):
        return re.sub(r"(_\d+|\.\d+)+$", "", name)

    def origin(name, hlo):
        return f"{re.sub(r'_[0-9]+$', '', name)[:34]} | {re.sub(r'[0-9]+/', '', where.get(hlo, hlo))}"

    for title, group in (("by kernel", kernel), ("by origin", origin)):
        totals = collections.defaultdict(lambda: [0.0, 0.0])
        for (name, hlo), (ms, launches) in spent.items():
            key = group(name, hlo)
            totals[key][0] += ms
            totals[key][1] += launches
        print(title)
        for key, (ms, launches) in sorted(totals.items(), key=lambda item: -item[1][0])[:top]:
            print(f"{ms:8.3f} ms {launches:6.0f} x {key}")
