"""Bad input to the training command: one clear line, exit status 2, and nothing half-written."""

import importlib.util
import os
import pathlib

import pytest

from l2a_jax import device
from l2a_jax.errors import UserError
from l2a_jax.runs.train import train
from l2a_jax.training.settings import resolve

ROOT = pathlib.Path(__file__).resolve().parents[2]


def load_command():
    spec = importlib.util.spec_from_file_location("train_run", ROOT / "train" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


CASES = {
    "unknown regime": (["--regime", "l2a"], "--regime is 'l2a'; expected one of baseline"),
    "unknown preset": (["--regime", "l2a_ft", "--preset", "papers"], "--preset is 'papers'; expected one of paper"),
    "unknown topology": (["--regime", "l2a_ft", "--topology", "serial"], "topology is 'serial'; expected one of"),
    "shared and sequential": (["--regime", "l2a_ft", "--topology", "sequential", "--share-attention"],
                              "share_attention needs topology 'parallel'"),
    "no window": (["--regime", "l2a_ft", "--window", "0"], "window is 0; expected at least 1"),
    "unknown rope": (["--regime", "l2a_ft", "--rope", "ntk:4"], "--rope is 'ntk:4'"),
    "too long": (["--regime", "l2a_ft", "--seq-len", "4096"], "longer than max_positions x factor = 1024"),
    "too short": (["--regime", "l2a_ft", "--seq-len", "64"], "--seq-len of at least"),
    "no steps": (["--regime", "l2a_ft", "--steps", "0"], "--steps is 0; expected at least 1"),
    "steps and tokens": (["--regime", "l2a_ft", "--steps", "1", "--tokens", "1M"], "give one of them"),
    "model without data": (["--regime", "l2a_ft", "--model", "x/y"], "--model was given without --data"),
    "data without model": (["--regime", "l2a_ft", "--data", "wikitext"], "--data was given without --model"),
    "missing model": (["--regime", "l2a_ft", "--model", "nowhere.gguf", "--data", "wikitext"], "nowhere.gguf"),
    "unknown backend": (["--regime", "l2a_ft", "--backend", "flash"], "--backend is 'flash'"),
    "unknown dtype": (["--regime", "l2a_ft", "--dtype", "float8"], "--dtype is 'float8'"),
    "unknown backend with a model": (["--regime", "l2a_ft", "--model", "x/y", "--data", "z", "--backend", "flash"],
                                     "--backend is 'flash'; expected one of auto, reference, xla, cudnn, pallas"),
    "no tokens": (["--regime", "l2a_ft", "--tokens", "0"], "--tokens is '0'; expected a whole number above 0"),
    "tokens beyond numbers": (["--regime", "l2a_ft", "--tokens", "1e999999999"], "--tokens is '1e999999999'; expected"),
    "too many tokens": (["--regime", "l2a_ft", "--tokens", "9000000T"], "steps; expected at most 2,147,483,647"),
    "a run folder without a name": (["--regime", "l2a_ft", "--run-dir", ""], "--run-dir is empty; expected a path"),
    "sequential alone": (["--regime", "router_strict", "--topology", "sequential"],
                         "--topology sequential goes with --no-share-attention"),
    "a batch beyond memory": (["--regime", "l2a_ft", "--batch-size", "1000000000"], "--batch-size 1000000000 rows of"),
    "long rows beyond memory": (["--regime", "baseline", "--batch-size", "2147483647", "--seq-len", "1024"],
                                "--batch-size 2147483647 rows of 1024 tokens need at least"),
    "micro-batches beyond memory": (["--regime", "l2a_ft", "--grad-accum", "2147483647"], "--grad-accum 2147483647"),
    "held-out batches beyond memory": (["--regime", "l2a_ft", "--eval-batches", "2147483647"],
                                       "--eval-batches 2147483647 batches of"),
    "negative penalty": (["--regime", "l2a_ft", "--penalty", "-1"], "--penalty is -1.0; expected at least 0"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line_and_nothing_written(name, tmp_path, capsys):
    arguments, expected = CASES[name]
    assert load_command()(["--run-dir", str(tmp_path / "run"), *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and expected in said
    assert not (tmp_path / "run").exists()


def test_missing_regime_and_unknown_flag(capsys):
    for arguments in ([], ["--regime", "l2a_ft", "--windw", "3"]):
        with pytest.raises(SystemExit) as exit_:
            load_command()(arguments)
        assert exit_.value.code == 2


def test_unwritable_run_folder(tmp_path):
    tmp_path.chmod(0o500)
    folder = pathlib.Path("/proc") if os.geteuid() == 0 else tmp_path  # root may write anywhere else
    with pytest.raises(UserError, match="cannot be written"):
        train(resolve("router_strict", {"steps": 1}), folder / "run")


def test_run_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train(resolve("router_strict", {"steps": 1}), tmp_path / "file" / "run")


def test_a_run_that_cannot_fit_is_refused_with_the_estimate(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "memory_bytes", lambda: 1_000_000)
    with pytest.raises(UserError, match=r"needs about .* GB and the device has 0.0 GB: .*--master-dtype bfloat16"):
        train(resolve("l2a_ft", {"steps": 1}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    """A learning rate that blows up: the run stops, says where, and the checkpoint before it is whole."""
    from l2a_jax.training.checkpoints import LATEST, Checkpoints

    settings = resolve("l2a_ft", {"steps": 30, "lr": 1e30, "batch_size": 2, "save_every": 1, "warmup": 0.0,
                                  "clip": 1e9})
    with pytest.raises(UserError, match=r"step \d+: the loss or its gradient is not finite .* withheld; "):
        train(settings, tmp_path / "run")
    saved = Checkpoints(tmp_path / "run").metadata(LATEST)
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert saved is not None and saved["step"] == len(records)
