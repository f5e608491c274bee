"""What a rebuild must not change: losses of every regime, logits of every wiring, counts, and the names of rows.

Bit for bit on the machines that the values were taken on (`cases.machine`), to the last digits of a float32 elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np

from tests import compiler
from tests.frozen import cases

FROZEN = json.loads(cases.VALUES.read_text())


def same(found: dict, wanted: dict, name: str, bits: bool) -> None:
    assert found.keys() == wanted.keys()
    for key, values in found.items():
        if bits:
            assert values == wanted[key], (name, key)
        else:
            np.testing.assert_allclose(values, wanted[key], rtol=2e-3, atol=2e-3, err_msg=f"{name}: {key}")


def test_losses_and_logits(tmp_path):
    """In a process of its own, whose programs are compiled as those were that gave the values."""
    file = tmp_path / "found.json"
    done = subprocess.run([sys.executable, "-m", "tests.frozen.make_frozen", str(file)], cwd=cases.ROOT, text=True,
                          capture_output=True, env={**os.environ, **compiler.flags(quick=False)})
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
    found, machines = json.loads(file.read_text()), FROZEN["machines"]
    bits = cases.machine() in machines
    wanted = machines[cases.machine()] if bits else next(iter(machines.values()))
    assert found["losses"].keys() == cases.RUNS.keys() and found["logits"].keys() == cases.LAYERS.keys()
    for kind, runs in found.items():
        for name, values in runs.items():
            same(values, wanted[kind][name], name, bits)


def test_trained_parameters():
    assert cases.counts() == FROZEN["counts"]


def test_rows_of_the_study_are_known_by_the_same_hashes():
    assert cases.hashes() == FROZEN["hashes"]
