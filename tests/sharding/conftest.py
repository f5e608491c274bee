"""What several devices compute is computed in a process of its own, which makes them up: the suite's have one each."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """What `python -m MEASURED FILE` of the test's module writes."""
    file = tmp_path_factory.mktemp("found") / "found.json"
    done = subprocess.run([sys.executable, "-m", request.module.MEASURED, str(file)], text=True, capture_output=True,
                          cwd=pathlib.Path(__file__).resolve().parents[2], env=dict(os.environ))
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
    return json.loads(file.read_text())
