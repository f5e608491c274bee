"""The laboratory's folder: what is damaged is named, two processes keep each other's scores, places are tried first."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from l2a_jax.errors import UserError
from l2a_jax.files import claim
from l2a_jax.research.absorption import arms, suite
from l2a_jax.research.absorption.corpora import recall_corpus
from l2a_jax.research.absorption.lab import Lab, OutOfTime
from tests.research.absorption.test_lab import PRESET, Untrained
from train.absorption import main

ARM = arms.soft_learned


@pytest.fixture(scope="module")
def corpus():
    return recall_corpus(48, 24, 4)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A folder with one arm and one score."""
    folder = tmp_path_factory.mktemp("lab")
    Untrained(PRESET, corpus, folder).nll(ARM, arms.native(ARM))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


def _json(change):
    def damage(path):
        value = json.loads(path.read_text())
        path.write_text(json.dumps(change(value)))

    return damage


def _weights(**changes):
    def damage(path):
        save_file({name: leaf for name, leaf in (load_file(path) | changes).items() if leaf is not None}, path)

    return damage


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


EMBEDDING = "embed/embedding"
DAMAGED = {
    "training cut": ("training.json", _cut, "training.json is not readable JSON"),
    "training missing": ("training.json", lambda path: path.unlink(), "has no training.json"),
    "training an object": ("training.json", _json(lambda value: {}), "holds an object; expected a list"),
    "training empty": ("training.json", _json(lambda value: []), "gate_moved is missing"),
    "a record is a number": ("training.json", _json(lambda value: [3, *value]), r"\[0\] is 3; expected an object"),
    "a record lacks a key": ("training.json", _json(lambda value: [{"step": 1}]), r"\[0\].loss is missing"),
    "another number of seeds": ("training.json", _json(lambda value: [{**value[0], "gate_grad_norm_max": [1.0]}]),
                                "gate_grad_norm_max is a list of 1; expected a list of 2"),
    "weights cut": ("weights.safetensors", _cut, "weights.safetensors is damaged"),
    "weights empty": ("weights.safetensors", lambda path: path.write_bytes(b""), "weights.safetensors is damaged"),
    "a leaf is missing": ("weights.safetensors", _weights(**{EMBEDDING: None}), "embed/embedding is missing; expected"),
    "a leaf of another shape": ("weights.safetensors", _weights(**{EMBEDDING: np.zeros((2, 3), np.float32)}),
                                r"embed/embedding is \(2, 3\); expected"),
    "a leaf too many": ("weights.safetensors", _weights(other=np.zeros(3, np.float32)), "nothing of that name"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_arm_is_named_and_said_how_to_mend(case, corpus, folder):
    name, damage, said = DAMAGED[case]
    (arm,) = (folder / "arms").glob(f"{ARM.name}-*")
    damage(arm / name)
    with pytest.raises(UserError, match=rf"{re.escape(str(arm))}.*{said}.*(M|m)ove .* away"):
        Untrained(PRESET, corpus, folder).metrics(ARM)


@pytest.mark.parametrize(("change", "said"), [
    (lambda value: [], "evaluations.json holds a list"), (lambda value: dict.fromkeys(value, "x"), "is 'x'; expected"),
    (lambda value: {name: [1.0] for name in value}, "is a list of 1; expected a list of 2"),
    (lambda value: {name: [1.0, None] for name in value}, r"\[1\] is null; expected a number")])
def test_damaged_scores_are_named(change, said, corpus, folder):
    _json(change)(folder / "evaluations.json")
    with pytest.raises(UserError, match=said):
        Untrained(PRESET, corpus, folder).nll(ARM, arms.native(ARM))


def test_statistics_and_distillation_of_another_shape_are_named(corpus, folder):
    lab = Untrained(PRESET, corpus, folder)
    lab._distil = lambda arm, native, params: (params["layers"]["gate"], [1.0, 2.0], [0.5, 0.25])
    assert lab.distillation_kl(ARM, arms.native(ARM)) == {"first": [1.0, 2.0], "last": [0.5, 0.25]}
    selector = next((folder / "selectors").iterdir())
    kl = next(name for name in lab._scores if name.startswith("kl"))
    stored = json.loads((folder / "evaluations.json").read_text())
    (folder / "evaluations.json").write_text(json.dumps({**stored, kl: {"first": [1.0, 2.0]}}))
    with pytest.raises(UserError, match=r"evaluations.json: 'kl \w+': last is missing.*Move the file away"):
        Untrained(PRESET, corpus, folder).distillation_kl(ARM, arms.native(ARM))
    _cut(selector)
    (folder / "evaluations.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"selectors.*is damaged.*move it away"):
        Untrained(PRESET, corpus, folder).selector(ARM, arms.native(ARM))
    (folder / "evaluations.json").unlink()  # its scores are gone: the gate is distilled again, to have them again
    again = Untrained(PRESET, corpus, folder)
    again._distil = lab._distil
    assert again.distillation_kl(ARM, arms.native(ARM))["last"] == [0.5, 0.25]


def test_scores_of_two_processes_are_kept(corpus, folder):
    one, two = Untrained(PRESET, corpus, folder), Untrained(PRESET, corpus, folder)
    before = json.loads((folder / "evaluations.json").read_text())
    one._store("first", [1.0, 2.0])
    two._store("second", [3.0, 4.0])
    one._store("third", [5.0, 6.0])
    assert json.loads((folder / "evaluations.json").read_text()) == {
        **before, "first": [1.0, 2.0], "second": [3.0, 4.0], "third": [5.0, 6.0]}
    assert not list(folder.glob(".*"))


def test_an_arm_that_another_process_trains_is_left_or_waited_for(corpus, tmp_path):
    lab = Untrained(PRESET, corpus, tmp_path)
    path = tmp_path / "arms" / f"{lab.key(ARM)}.lock"
    with claim(path) as other:
        assert other is None
        lab.train_unclaimed([ARM])
        assert lab._weights(ARM) is None
    lab.prepare([ARM])
    assert lab._weights(ARM) is not None and not path.exists()


def test_an_interrupted_arm_whose_records_are_lost_is_said(corpus, tmp_path):
    """Its training.json would speak of the last steps alone."""
    stopped = Lab(PRESET, corpus, tmp_path, deadline=0.0)
    stopped.check_time = lambda: None
    with pytest.raises(OutOfTime):
        stopped.params(arms.dense)
    (folder,) = (tmp_path / "arms").glob("*.partial")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl ends at step 0, the checkpoint is of step 2; move the folder"):
        Lab(PRESET, corpus, tmp_path).params(arms.dense)


@pytest.mark.parametrize(("flags", "said"), [
    (["--run-dir", "file/run"], "file is no folder"), (["--run-dir", "n" * 300], "File name too long"),
    (["--run-dir", "run", "--out", "file/out"], "--out file/out/absorption_soft_gate.json cannot be written"),
    (["--run-dir", "taken"], "evaluations.json cannot be written: Is a directory")])
def test_places_are_tried_before_the_corpus_is_made(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "taken" / "evaluations.json").mkdir(parents=True)
    monkeypatch.setattr(suite, "make_corpus", lambda *given: pytest.fail("the corpus was made"))
    before = sorted(tmp_path.rglob("*"))
    assert main(["--experiment", "soft_gate", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --") and said in error and sorted(tmp_path.rglob("*")) == before


def test_what_is_read_back_is_what_was_written(corpus, folder):
    lab = Untrained(PRESET, corpus, folder)
    stored = json.loads((folder / "evaluations.json").read_text())
    np.testing.assert_array_equal(lab.nll(ARM, arms.native(ARM)), next(iter(stored.values())))
    assert lab.metrics(ARM)[-1]["gate_moved"] == [0.0, 0.0]
