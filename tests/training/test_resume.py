"""Kill and resume, as a user meets it: the command, a signal, `--resume`, and the same losses to the last bit."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.training.test_bad_input import load_command

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = ["--regime", "l2a_ft", "--steps", "60", "--batch-size", "2", "--save-every", "7", "--eval-every", "10",
         "--eval-batches", "1", "--leakage", "0.5", "--grad-accum", "2", "--penalty", "0.1"]

# These programs run long enough to be compiled well.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
               "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}


def start(*arguments):
    return subprocess.Popen([sys.executable, str(ROOT / "train" / "run.py"), *map(str, arguments)], cwd=ROOT,
                            env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def finish(process, timeout=300):
    said = process.communicate(timeout=timeout)[1]
    return process.returncode, said


def records(run_dir):
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def kill_after(process, run_dir, step, number):
    deadline = time.monotonic() + 300
    while not any(record["step"] >= step for record in records(run_dir)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    return finish(process)


def same(first, second):
    """Equal in everything but speed and memory."""
    timing = {"tokens_per_second", "peak_memory_gb"}
    return [{k: v for k, v in r.items() if k not in timing} for r in first] == [
        {k: v for k, v in r.items() if k not in timing} for r in second]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    code, said = finish(start(*FLAGS, "--run-dir", run_dir))
    assert code == 0, said
    return run_dir


def test_killed_and_resumed_is_the_run_that_was_never_killed(unbroken, tmp_path):
    run_dir = tmp_path / "killed"
    code, _ = kill_after(start(*FLAGS, "--run-dir", run_dir), run_dir, 11, signal.SIGKILL)
    assert code == -signal.SIGKILL and len(records(run_dir)) < 60

    code, said = kill_after(start("--resume", run_dir), run_dir, 30, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and f"--resume {run_dir}" in said, said
    stopped = len(records(run_dir))
    assert 30 <= stopped < 60
    saved = sorted(int(path.name) for path in (run_dir / "checkpoints" / "latest").iterdir())
    assert len(saved) == 2 and saved[-1] == stopped

    code, said = finish(start("--resume", run_dir))
    assert code == 0 and f"after step {stopped} of 60" in said, said
    broken, whole = records(run_dir), records(unbroken)
    assert [record["step"] for record in broken] == list(range(1, 61))
    assert same(broken, whole)
    results = [json.loads((folder / "summary.json").read_text()) for folder in (run_dir, unbroken)]
    assert results[0]["recall"] == results[1]["recall"]
    assert results[0]["held_out_loss"] == results[1]["held_out_loss"]
    assert (run_dir / "curves.png").stat().st_size > 1000


def test_a_run_folder_holds_what_the_design_says(unbroken):
    assert {path.name for path in unbroken.iterdir()} == {"config.json", "metrics.jsonl", "checkpoints", "summary.json",
                                                          "curves.png"}
    for record in records(unbroken):
        assert {"step", "loss", "sparsity", "grad_norm", "tokens_per_second", "sparsity_per_layer", "penalty",
                "peak_memory_gb"} <= set(record)
        assert all(np.isfinite(record[name]) for name in ("loss", "sparsity", "grad_norm"))
    config = json.loads((unbroken / "config.json").read_text())
    assert {"settings", "source_hash", "versions", "device", "data_fingerprint", "command"} <= set(config)


def test_a_run_is_a_source_and_exports(unbroken, tmp_path):
    """The trained model loads from its run folder; frozen leaves are the source's, bit for bit; export and back."""
    import jax

    from l2a_jax import load_pretrained, regime_mask
    from l2a_jax.models.params import add_routing
    from l2a_jax.sources import TINY
    from l2a_jax.training.regimes import partition

    trained, source = load_pretrained(unbroken, np.float32), load_pretrained(TINY, np.float32)
    start_params = add_routing(source.params, source.config, trained.l2a_config)
    mask = regime_mask(start_params, "l2a_ft")
    (moved, frozen), (before, kept) = partition(trained.params, mask), partition(start_params, mask)
    jax.tree.map(np.testing.assert_array_equal, frozen, kept)
    assert all(bool((a != b).any()) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(before), strict=True))

    out = tmp_path / "exported"
    subprocess.run([sys.executable, str(ROOT / "convert" / "to_hf.py"), str(unbroken), str(out), "--dtype", "float32"],
                   check=True, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    again = load_pretrained(out, np.float32)
    assert again.l2a_config == trained.l2a_config and again.config == trained.config
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)


def test_resume_refuses_what_is_not_the_same_run(unbroken, tmp_path, capsys):
    def refused(*arguments):
        assert load_command()(list(map(str, arguments))) == 2
        return capsys.readouterr().err

    assert "--lr" in refused("--resume", unbroken, "--lr", "1")
    assert "no config.json" in refused("--resume", tmp_path / "nothing")
    other = tmp_path / "other"
    shutil.copytree(unbroken, other)
    config = json.loads((other / "config.json").read_text())
    config["settings"]["seed"] = 5
    (other / "config.json").write_text(json.dumps(config))
    assert "data is not what the run began with" in refused("--resume", other)


def test_a_new_run_never_writes_over_an_old_one(unbroken, capsys):
    before = (unbroken / "metrics.jsonl").read_bytes()
    assert load_command()([*FLAGS, "--run-dir", str(unbroken)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (unbroken / "metrics.jsonl").read_bytes() == before
