"""Checkpoints: every damaged byte is refused by name, the one before is offered, and a failed write breaks nothing."""

import errno
import json
import logging
import os
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from l2a_jax.errors import UserError
from l2a_jax.training.checkpoints import BEST, LATEST, SUMS, Checkpoints
from l2a_jax.training.step import TrainState


def state(step):
    trainable = {"a": jnp.arange(3_000.0) * step, "b": {"c": jnp.full((10, 10), step, jnp.float32)}}
    return TrainState(jnp.int32(step), trainable, (jnp.full(50, -step, jnp.float32), jnp.int32(step)),
                      jnp.ones((), bool))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for step in (4, 8, 12):
        Checkpoints(folder).save(LATEST, state(step), {"best": 1.5})
    Checkpoints(folder).save(BEST, state(8), {"best": 1.5})
    return folder


@pytest.fixture
def run(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def newest(run):
    return run / "checkpoints" / LATEST / "12"


def refusal(run, kind=LATEST):
    with pytest.raises(UserError) as caught:
        Checkpoints(run).load(kind, state(0))
    said = str(caught.value)
    assert "\n" not in said and len(said) < 700
    return said


def test_two_are_kept_and_read_back(run):
    checkpoints = Checkpoints(run)
    assert checkpoints.steps(LATEST) == [8, 12] and checkpoints.steps(BEST) == [8]
    found = checkpoints.load(LATEST, state(0))
    jax.tree.map(np.testing.assert_array_equal, found, state(12))
    step, trainable = checkpoints.load_trainable(LATEST, state(0).trainable, 8)
    assert step == 8
    jax.tree.map(np.testing.assert_array_equal, trainable, state(8).trainable)
    assert checkpoints.metadata(BEST) == {"best": 1.5, "checksums": SUMS, "step": 8}
    assert sorted(path.name for path in (run / "checkpoints" / LATEST).iterdir()) == ["12", "8"]


def test_twelve_of_twelve_flipped_bits_are_refused_by_name(run):
    draw = random.Random(0)
    files = sorted(path for path in newest(run).glob("*/**/d/*"))
    assert files
    for _ in range(12):
        path = draw.choice(files)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        said = refusal(run)
        assert path.relative_to(newest(run)).as_posix() in said
        assert f"remove that folder, and the one before it, {newest(run).parent / '8'}, is the newest" in said
        path.write_bytes(whole)
    Checkpoints(run).load(LATEST, state(0))


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "trainable/_METADATA", "trainable/manifest.ocdbt",
                                  "optimizer/_sharding"])
def test_flipped_bits_beside_the_arrays_are_refused_too(run, name):
    path = newest(run) / name
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert name in refusal(run)


def test_evaluation_needs_the_trained_part_alone(run):
    path = newest(run) / "optimizer" / "manifest.ocdbt"
    path.write_bytes(b"\0" * path.stat().st_size)
    Checkpoints(run).load_trainable(LATEST, state(0).trainable)
    assert "optimizer/manifest.ocdbt" in refusal(run)


def _cut(folder):
    path = next(iter((folder / "trainable" / "d").iterdir()))
    path.write_bytes(path.read_bytes()[:20])


def _zero(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0" * path.stat().st_size)


DAMAGES = {
    "cut": (_cut, "trainable/d/"),
    "zeroed": (_zero, "_CHECKPOINT_METADATA is not what was written"),
    "emptied": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "_CHECKPOINT_METADATA is missing"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "_CHECKPOINT_METADATA is missing"),
    "a part gone": (lambda folder: (folder / "optimizer" / "manifest.ocdbt").unlink(), "manifest.ocdbt is missing"),
    "sums gone": (lambda folder: (folder / SUMS).unlink(), f"{SUMS} is missing"),
    "sums cut": (lambda folder: (folder / SUMS).write_text('{"step": 12'), f"{SUMS} is not what was written"),
    "sums a list": (lambda folder: (folder / SUMS).write_text("[]"), f"{SUMS} is not what was written"),
    "renamed": (lambda folder: folder.rename(folder.with_name("13")), "it was written as step 12"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line_that_offers_another(run, name):
    damage, expected = DAMAGES[name]
    damage(newest(run))
    said = refusal(run)
    assert expected in said and str(newest(run).parent / "8") in said
    assert f"{run / 'checkpoints' / BEST / '8'} is another" in said


def test_the_advice_leads_on(run):
    _zero(newest(run))
    shutil.rmtree(newest(run))
    assert int(Checkpoints(run).load(LATEST, state(0)).step) == 8
    _zero(newest(run).with_name("8"))
    assert "there is none before it: without that folder --resume begins from the start" in refusal(run)
    _zero(run / "checkpoints" / BEST / "8")
    with pytest.raises(UserError, match="--resume finds another best"):
        Checkpoints(run).metadata(BEST)


def test_what_cannot_be_read_is_not_called_missing_or_damaged(run, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"latest/12/.* cannot be read: Permission denied"):
        Checkpoints(run).load(LATEST, state(0))
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(PermissionError, match="latest"):
        Checkpoints(run).metadata()


def test_a_checkpoint_of_an_older_version_is_read_and_said_to_have_no_sums(tmp_path, caplog):
    """As it was written before there were sums: by Orbax's own checkpointer."""
    parts = {"trainable": state(5).trainable,
             "optimizer": {f"{i:05d}": leaf for i, leaf in enumerate(state(5).optimizer)}}
    with ocp.training.Checkpointer(tmp_path / "checkpoints" / LATEST) as writer:
        writer.save_checkpointables(5, parts, custom_metadata={"best": float("inf")})
    caplog.set_level(logging.INFO, "l2a_jax")
    assert Checkpoints(tmp_path).metadata() == {"best": float("inf"), "step": 5}
    assert not caplog.records
    jax.tree.map(np.testing.assert_array_equal, Checkpoints(tmp_path).load(LATEST, state(0)), state(5))
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/checkpoints/latest/5 was written without checksums: damage to its numbers would not be noticed"]
    Checkpoints(tmp_path).save(LATEST, state(6), {})
    assert Checkpoints(tmp_path).steps(LATEST) == [5, 6]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   ValueError("RESOURCE_EXHAUSTED: page\nNo space left on device\nafter page")])
@pytest.mark.parametrize("where", ["arrays", "sums"])
def test_a_full_disk_is_one_sentence_and_leaves_a_whole_checkpoint(run, monkeypatch, error, where):
    from l2a_jax.training import checkpoints

    def fail(path, *args, **kwargs):
        Path(path).mkdir(parents=True, exist_ok=True)
        raise error

    monkeypatch.setattr(*((ocp, "save_checkpointables") if where == "arrays" else (checkpoints, "write_json")), fail)
    with pytest.raises(UserError, match=r"latest/16 cannot be written: No space left on device \(.*/12\)$"):
        Checkpoints(run).save(LATEST, state(16), {})
    monkeypatch.undo()
    assert [path.name for path in (run / "checkpoints" / LATEST).iterdir()] == ["12"]
    assert int(Checkpoints(run).load(LATEST, state(0)).step) == 12


def test_what_killed_processes_left_is_removed_by_the_next_save_and_by_no_reader(run):
    left = [newest(run).parent / name for name in (".partial", "16.orbax-checkpoint-tmp", ".4.partial")]
    for folder in left:
        (folder / "16").mkdir(parents=True)
    Checkpoints(run).metadata()
    Checkpoints(run).load(LATEST, state(0))
    assert all(folder.exists() for folder in left)  # a run in progress may be writing them
    Checkpoints(run).sweep(LATEST)
    assert sorted(path.name for path in newest(run).parent.iterdir()) == ["12", "8"]
    left[0].mkdir()
    Checkpoints(run).save(LATEST, state(16), {})
    assert sorted(path.name for path in newest(run).parent.iterdir()) == ["12", "16"]


def test_the_sums_cover_every_file(run):
    sums = json.loads((newest(run) / SUMS).read_text())["sha256"]
    files = {path.relative_to(newest(run)).as_posix() for path in newest(run).rglob("*") if path.is_file()}
    assert set(sums) == files - {SUMS}
