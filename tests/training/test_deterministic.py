"""`--deterministic`: asked of XLA before a device is in use, of a resumed run too, and true on a GPU."""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import l2a_jax as l2a
from l2a_jax.errors import UserError
from l2a_jax.runs import plan
from tests.training.test_resume import ENVIRONMENT, FLAGS, ROOT, finish, kill_after, records, same, start

FIRST_USE = """
import os, sys
from l2a_jax import device
from l2a_jax.runs import plan
from train.run import main

def first_use(backend):
    print(os.environ.get("XLA_FLAGS"), device.in_use())
    sys.exit(0)

plan.attention.check = first_use
main(sys.argv[1:])
"""


def flags_at_first_use(*arguments: object) -> list[str]:
    """What XLA_FLAGS holds just before a command first uses a device, and whether one is in use."""
    env = {**ENVIRONMENT, "XLA_FLAGS": "--xla_dump_to=nowhere"}
    return subprocess.run([sys.executable, "-c", FIRST_USE, *map(str, arguments)], env=env, capture_output=True,
                          text=True, check=True, timeout=120).stdout.split()


@pytest.mark.parametrize("deterministic", (True, False))
def test_it_is_asked_before_a_device_is_in_use(deterministic, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(ROOT / "tests" / "frozen" / "folders" / "l2a_ft", run_dir)
    config = json.loads((run_dir / "config.json").read_text())
    config["settings"]["deterministic"] = deterministic
    (run_dir / "config.json").write_text(json.dumps(config))
    asked = [plan.DETERMINISTIC] if deterministic else []
    expected = ["--xla_dump_to=nowhere", *asked, "False"]
    assert flags_at_first_use("--resume", run_dir) == expected
    given = ["--deterministic"] if deterministic else []
    assert flags_at_first_use("--regime", "l2a_ft", "--run-dir", tmp_path / "new", *given) == expected


def test_it_is_refused_where_a_gpu_is_in_use_without_it(monkeypatch):
    jax.devices()
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=nowhere")
    monkeypatch.setattr(plan.device, "platform", lambda: "gpu")
    with pytest.raises(UserError, match=r"^--deterministic has to be known before JAX uses the GPU"):
        plan.set_deterministic()
    monkeypatch.setenv("XLA_FLAGS", f"{plan.DETERMINISTIC} --xla_dump_to=nowhere")
    plan.set_deterministic()


def learned(run_dir: pathlib.Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(l2a.load_pretrained(run_dir, np.float32).params)]


@pytest.mark.gpu
@pytest.mark.parametrize("regime", ("l2a_ft", "full_ft"))
def test_a_gpu_gives_the_same_bits_again_and_when_stopped_and_resumed(regime, tmp_path):
    flags = ["--deterministic", *FLAGS[2:], "--regime", regime]
    first, second, stopped = (tmp_path / name for name in ("first", "second", "stopped"))
    for run_dir in (first, second):
        code, said = finish(start(*flags, "--run-dir", run_dir), 600)
        assert code == 0, said
    code, said = kill_after(start(*flags, "--run-dir", stopped), stopped, 20, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and len(records(stopped)) < len(records(first)), said
    code, said = finish(start("--resume", stopped), 600)
    assert code == 0, said
    for other in (second, stopped):
        assert same(records(first), records(other))
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(learned(first), learned(other), strict=True))
