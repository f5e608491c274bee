"""What several devices compute is computed in a process of its own, which makes them up: the suite's have one each."""

import fcntl
import json
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """What `python -m MEASURED FILE` of the test's module writes: once, whichever of pytest's workers take its tests.
    The others wait for the first."""
    base, measured = tmp_path_factory.getbasetemp(), request.module.MEASURED
    file = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{measured}.json"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            done = subprocess.run([sys.executable, "-m", measured, str(file)], text=True, capture_output=True,
                                  cwd=pathlib.Path(__file__).resolve().parents[2], env=dict(os.environ))
            assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
    return json.loads(file.read_text())
