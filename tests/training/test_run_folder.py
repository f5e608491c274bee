"""Run folders: the one reader of what they say, and what `--resume` does with the rest."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from l2a_jax import files
from l2a_jax.config import MODELS, L2AConfig, to_dict
from l2a_jax.errors import UserError
from l2a_jax.evaluation import subject
from l2a_jax.research.absorption import l2a_audit
from l2a_jax.runs import folder as run_folder
from l2a_jax.runs import train as runs
from l2a_jax.runs.plan import RunPlan, compile_run, program_key
from l2a_jax.runs.train import resume, train
from l2a_jax.sources import TINY, load_pretrained, locate, run_source, source_hash, source_tokenizer
from l2a_jax.training import run_files
from l2a_jax.training.checkpoints import BEST, LATEST, Checkpoints
from l2a_jax.training.loop import Stopped
from l2a_jax.training.metrics import read_metrics
from l2a_jax.training.settings import resolve

MODEL = MODELS["qwen2.5-tiny"]


def config(**changes):
    settings = dataclasses.asdict(resolve("l2a_ft", {"steps": 4}))
    return {"settings": settings, "model_source": TINY, "source_hash": "0", "model_config": to_dict(MODEL),
            "l2a_config": to_dict(L2AConfig()), "data": {}, "data_fingerprint": "x", "steps": 4, "dtype": "float32",
            "device": "1 x cpu", **changes}


def without(*path):
    found = config()
    inner = found
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return found


def setting(name, value):
    found = config()
    found["settings"][name] = value
    return found


def model(name, value):
    found = config()
    found["model_config"][name] = value
    return found


WHOLE = json.dumps(config())
DAMAGED = {  # name: (config.json, what is said)
    "empty": ("", "is not readable JSON"),
    "cut": (WHOLE[: len(WHOLE) // 2], "is not readable JSON"),
    "binary": (b"\xff\xfe\x00", "is not readable JSON"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "a list": ("[1]", "holds a list; expected an object"),
    "null": ("null", "holds null; expected an object"),
    "a model's": ({"model_type": "qwen2", "hidden_size": 8}, "is not that of a training run: it has no settings"),
    "no settings": (without("settings"), "settings is missing; expected an object"),
    "no source": (without("model_source"), "model_source is missing; expected null, or a text"),
    "no hash": (without("source_hash"), "source_hash is missing; expected a text"),
    "no model": (without("model_config"), "model_config is missing; expected an object"),
    "no layer": (without("l2a_config"), "l2a_config is missing, but settings.regime is 'l2a_ft'"),
    "no regime": (without("settings", "regime"), "has no settings.regime"),
    "no width": (without("model_config", "hidden_size"), "ModelConfig misses ['hidden_size']"),
    "settings a list": (config(settings=[]), "settings is a list; expected an object"),
    "source a number": (config(model_source=5), "model_source is 5; expected null, or a text"),
    "hash a number": (config(source_hash=5), "source_hash is 5; expected a text"),
    "fingerprint a list": (config(data_fingerprint=[]), "data_fingerprint is a list; expected a text"),
    "entries a text": (config(data_source="a.txt"), "data_source is 'a.txt'; expected a list"),
    "layer a list": (config(l2a_config=[1]), "l2a_config is a list; expected an object"),
    "unknown setting": (setting("lrr", 1), "settings.lrr is not a setting of this version"),
    "rate a text": (setting("lr", "fast"), "settings.lr is 'fast'; expected a number"),
    "steps a fraction": (setting("steps", 1.5), "settings.steps is 1.5; expected a whole number"),
    "seed a truth": (setting("seed", True), "settings.seed is True; expected a whole number"),
    "data numbers": (setting("data", [3]), "settings.data is [3]; expected a list, each a text"),
    "layers a text": (setting("attention_layers", "all"), "settings.attention_layers is 'all'; expected a list"),
    "unknown regime": (setting("regime", "sft"), "settings.regime is 'sft'; expected one of baseline"),
    "unknown masters": (setting("master_dtype", "int8"), "settings.master_dtype is 'int8'; expected one of float32"),
    "no layers": (model("num_layers", 0), "does not describe a model: num_layers is 0"),
    "width a text": (model("hidden_size", "8"), "model_config.hidden_size is '8'; expected a whole number"),
    "rope a text": (model("rope", "yarn"), "model_config.rope is 'yarn'; expected an object"),
    "factor a text": (model("rope", {"factor": "4"}), "model_config.rope.factor is '4'; expected a number"),
    "unknown rope": (model("rope", {"kind": "ntk"}), "does not describe a model: rope kind is 'ntk'"),
    "unknown key": (model("depth", 3), "ModelConfig has no field ['depth']"),
}


def write(folder, content):
    folder.mkdir(exist_ok=True)
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("name", DAMAGED)
def test_every_reader_names_the_file_the_key_and_what_was_expected(name, tmp_path):
    content, expected = DAMAGED[name]
    folder = write(tmp_path / "run", content)
    readers = [lambda: resume(folder)]
    if name != "a model's":  # evaluation, generation and export take that one for a model
        readers += [lambda: load_pretrained(folder, np.float32), lambda: source_tokenizer(folder),
                    lambda: l2a_audit.open_audited(str(folder), (), None, None, None)]
    for read in readers:
        with pytest.raises(UserError) as said:
            read()
        assert str(folder / "config.json") in str(said.value) and expected in str(said.value)
        assert "\n" not in str(said.value)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize(("content", "lacking"), [
    (without("data_fingerprint"), "data_fingerprint"), (without("settings", "lr"), "settings.lr"),
    (without("settings", "seed"), "settings.seed")])
def test_what_repeating_a_run_needs_is_asked_of_resume_alone(content, lacking, tmp_path):
    folder = write(tmp_path / "run", content)
    assert run_files.read_run(folder).settings.regime == "l2a_ft"
    with pytest.raises(UserError, match=f"config.json does not say {lacking}, which the run needs"):
        resume(folder)
    folder = write(folder, setting("lr", -1.0))
    assert run_files.read_run(folder).settings.lr == -1.0
    with pytest.raises(UserError, match=r"config.json: settings.lr is -1.0; expected above 0"):
        resume(folder)


def test_folders_of_older_versions_are_whole(tmp_path):
    found = config()
    for name in run_files.LATER:
        del found["settings"][name]
    found["settings"]["remat"] = True
    del found["data"]
    recorded = run_files.read_run(write(tmp_path / "run", found)).whole()
    assert set(recorded.missing) == run_files.LATER and recorded.settings.given == ()
    assert recorded.settings.remat == "layer" and recorded.settings.echo == 0.0


@pytest.mark.parametrize(("content", "expected"), [
    ("[]", "holds a list"), ("{", "is not readable JSON"), ('{"tokens_seen": "many"}', "tokens_seen is 'many'"),
    ('{"held_out_perplexity": []}', "held_out_perplexity is a list")])
def test_a_damaged_summary_is_named(content, expected, tmp_path):
    assert run_files.read_summary(tmp_path) == {}
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError) as said:
        run_files.read_summary(tmp_path)
    assert str(tmp_path / "summary.json") in str(said.value) and expected in str(said.value)
    (tmp_path / "summary.json").write_text('{"held_out_loss": "nan"}')
    assert np.isnan(run_files.read_summary(tmp_path)["held_out_loss"])


# A real run, small: what it leaves, and how it goes on.

GIVEN = {"batch_size": 2, "seq_len": 64, "window": 4, "sinks": 1, "save_every": 2, "eval_every": 3, "eval_batches": 1}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rows = np.random.default_rng(0).integers(0, 20, (200, 12))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n"
                                            for row in rows))
    return folder


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """One program serves every run of one shape."""
    kept = {}

    def once(plan):
        key = program_key(plan), plan.steps
        kept[key] = kept[key]._replace(plan=plan) if key in kept else compile_run(plan)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("l2a_jax.runs.train.compile_run", once)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    """Six steps on text, from a model and data that are named relative to the folder."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(locate(TINY), folder / "model")
    shutil.copytree(text, folder / "text")
    here = os.getcwd()
    os.chdir(folder)
    try:
        settings = resolve("router_strict", {**GIVEN, "model": "model", "data": ("text", "more=text/*.jsonl"),
                                             "ask": 0.5, "steps": 6}, ("repair-2025",))
        train(settings, Path("run"))
    finally:
        os.chdir(here)
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def change(run, **changes):
    files.write_json(run / "config.json", {**files.read_json(run / "config.json"), **changes})


def back(run, step):
    """As if the run had been stopped after `step`."""
    for kind in (LATEST, BEST):
        for later in Checkpoints(run).steps(kind):
            if later > step:
                shutil.rmtree(run / "checkpoints" / kind / str(later))
    (run / "summary.json").unlink()
    return run


def test_a_run_named_by_relative_paths_goes_on_from_anywhere(trained, run, tmp_path, monkeypatch):
    whole = json.loads((trained / "summary.json").read_text())
    monkeypatch.chdir(tmp_path)
    found = resume(back(run, 4))
    assert found["held_out_loss"] == whole["held_out_loss"] and found["tokens_seen"] == whole["tokens_seen"]
    recorded = run_files.read_run(run)
    assert recorded.source == str(trained.parent / "model")
    assert recorded.data_source == (str(trained.parent / "text"), f"more={trained.parent}/text/*.jsonl")
    assert recorded.settings.model == "model"


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "a bad line": lambda path: path.write_bytes(path.read_bytes().replace(b"{", b"[", 1)),
    "binary": lambda path: path.write_bytes(b"\x00\xff\n\xfe"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_tokens_stay_right_whatever_became_of_the_records(name, trained, run, caplog):
    """And every good record after a bad line is kept."""
    whole = json.loads((trained / "summary.json").read_text())
    assert whole["tokens_seen"] == sum(record["tokens"] for record in read_metrics(trained / "metrics.jsonl"))
    DAMAGES[name](run / "metrics.jsonl")
    good = [record["step"] for record in read_metrics(run / "metrics.jsonl") if record["step"] <= 4]
    found = resume(back(run, 4))
    for key in ("tokens_seen", "tokens_per_trained_parameter", "held_out_loss", "data_used"):
        assert found[key] == whole[key], key
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [*good, 5, 6]
    assert f"metrics.jsonl: {4 - len(good)} of 4 steps have no record" in caplog.text


def test_another_precision_is_refused_and_another_device_is_said(run, caplog):
    change(run, dtype="bfloat16", device="1 x NVIDIA H100")
    with pytest.raises(UserError, match=r"computes in bfloat16, and on this device .* in float32; resume it where it "
                                        r"began \(1 x NVIDIA H100\), or write \"dtype\": \"bfloat16\" into"):
        resume(run)
    change(run, dtype="float32")
    resume(run)
    assert f"the run began on NVIDIA H100 and goes on on {jax.devices()[0].device_kind}" in caplog.text


def test_another_model_or_data_than_the_run_records_is_refused(run, tmp_path):
    before = files.read_json(run / "config.json")
    change(run, model_config={**before["model_config"], "rope_theta": 5_000.0})
    with pytest.raises(UserError, match="records another model than its settings and source give now"):
        resume(run)
    change(run, **before)
    other = shutil.copytree(before["data_source"][0], tmp_path / "other")
    (other / "a.jsonl").write_text((other / "a.jsonl").read_text() + json.dumps({"text": "w1 w2 w3"}) + "\n")
    change(run, data_source=[str(other), f"more={other}/*.jsonl"])
    with pytest.raises(UserError, match=r"data is not what the run began with: .*a\.jsonl"):
        resume(run)


@pytest.mark.parametrize("kind", [LATEST, BEST])
def test_a_damaged_checkpoint_is_said_before_compiling_and_removing_it_leads_on(run, kind, monkeypatch):
    back(run, 6)
    newest = Checkpoints(run).folder(kind)
    (newest / "_CHECKPOINT_METADATA").write_bytes(b"\0" * 10)
    with monkeypatch.context() as patch:
        patch.setattr("l2a_jax.runs.train.compile_run", lambda plan: pytest.fail("compiled"))
        with pytest.raises(UserError, match=f"{newest} is damaged"):
            resume(run)
    shutil.rmtree(newest)
    assert resume(run)["steps"] == 6 and Checkpoints(run).steps(LATEST)[-1] == 6
    assert not (run / ".lock").exists()


def test_a_checkpoint_of_a_run_is_a_source(run):
    """The newest, the best, and any other, wherever a model is taken."""
    checkpoints = Checkpoints(run)
    (before, newest), (best,) = checkpoints.steps(LATEST), checkpoints.steps(BEST)
    loaded = load_pretrained(run, np.float32)
    for path, kind, step in ((f"latest/{before}", LATEST, before), ("best", BEST, best), (f"best/{best}", BEST, best)):
        where = run / "checkpoints" / path
        found = load_pretrained(where, np.float32)
        router = checkpoints.load_trainable(kind, {"layers": {"router": loaded.params["layers"]["router"]}}, step)[1]
        jax.tree.map(np.testing.assert_array_equal, found.params["layers"]["router"], router["layers"]["router"])
        assert found.config == loaded.config and found.source_hash == source_hash(where)
        facts = subject.run_facts(run_source(where))
        assert facts["steps"] == step and facts["tokens_seen"] is None and facts["seed"] == 0
    assert source_hash(run / "checkpoints" / "latest" / str(before)) != source_hash(run) == loaded.source_hash
    assert source_hash(run / "checkpoints" / "latest") == source_hash(run)
    assert subject.run_facts(run_source(run))["steps"] == newest == 6
    assert run_source(run / "checkpoints") is None and run_source(run / "checkpoints" / "best" / "trainable") is None
    shutil.rmtree(checkpoints.folder(BEST))
    with pytest.raises(UserError, match="best holds no complete checkpoint"):
        load_pretrained(run / "checkpoints" / "best", np.float32)


# One folder, one process; and a run that is stopped or cannot begin leaves nothing.

HOLD = """
import pathlib, sys, time
from l2a_jax import files
with files.owned(pathlib.Path(sys.argv[1]), "--run-dir"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_and_one_whose_process_was_killed_is_not(run):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    before = (run / "metrics.jsonl").read_bytes()
    for begin in (lambda: resume(run), lambda: train(resolve("router_strict", {"steps": 1}), run)):
        with pytest.raises(UserError, match=rf"{run} is in use by process {other.pid} "):
            begin()
    assert (run / "metrics.jsonl").read_bytes() == before
    other.kill()
    other.communicate()
    assert (run / ".lock").exists()
    assert resume(run)["steps"] == 6
    assert not (run / ".lock").exists()


@pytest.mark.parametrize("fault", [KeyboardInterrupt, UserError("no"), RuntimeError("no"), Stopped(None, 15)])
def test_a_run_that_does_not_begin_leaves_no_folder_of_its_own(fault, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for folder in (tmp_path / "a" / "b" / "run", own):
        with contextlib.suppress(type(fault) if isinstance(fault, Exception) else fault), run_folder.new(folder):
            assert (folder / ".lock").exists()
            raise fault
    assert [path.name for path in tmp_path.iterdir()] == ["own"] and not list(own.iterdir())
    with run_folder.new(tmp_path / "kept"):
        (tmp_path / "kept" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["config.json"]
    with pytest.raises(UserError, match="is not empty"), run_folder.new(tmp_path / "kept"):
        pass


@pytest.mark.parametrize("run_dir", ["file/run", "n" * 300, "file"])
def test_a_place_that_cannot_be_is_said_before_anything_else(run_dir, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("l2a_jax.runs.train.make_plan", lambda settings: pytest.fail("planned"))
    with pytest.raises(UserError, match=r"--run-dir .* cannot be written"):
        train(resolve("router_strict", {"steps": 1}), tmp_path / run_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("number", "where"), [(signal.SIGINT, "compile_run"), (signal.SIGTERM, "make_plan"),
                                               (signal.SIGHUP, "load_tree"), (signal.SIGTERM, "compile_run")])
def test_a_stop_before_the_first_step_is_one_line_and_leaves_nothing(number, where, tmp_path, monkeypatch, capfd):
    real = getattr(runs, where)

    def interrupted(*args):
        found = real(*args)
        os.kill(os.getpid(), number)
        return found

    monkeypatch.setattr(f"l2a_jax.runs.train.{where}", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(resolve("router_strict", {"steps": 1, "batch_size": 2}), tmp_path / "runs" / "run")
    assert stopped.value.code == 128 + number and not list(tmp_path.iterdir())
    assert "stopped before the first step; nothing has been trained, so nothing is kept" in capfd.readouterr().err


def test_a_held_out_loss_that_is_not_finite_does_not_end_the_run(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr("l2a_jax.runs.train.held_out_metrics", lambda *_: {"held_out_loss": float("nan")})
    monkeypatch.setattr(RunPlan, "is_demo", False)  # without its report, which compiles three programs more
    settings = resolve("router_strict", {"steps": 2, "batch_size": 2, "grad_accum": 3, "eval_every": 1})
    train(settings, tmp_path / "run")
    assert caplog.text.count("the held-out loss is not finite (nan)") == 2
    assert "held-out loss nan (perplexity nan)" in capsys.readouterr().out
    summary, records = run_files.read_summary(tmp_path / "run"), read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert np.isnan([summary["held_out_loss"], *(record["held_out_loss"] for record in records)]).all()
    assert Checkpoints(tmp_path / "run").steps(LATEST) == [2] and Checkpoints(tmp_path / "run").steps(BEST) == []
    assert subject.run_facts(run_source(tmp_path / "run"))["steps"] == 2
    assert summary["tokens_seen"] == sum(record["tokens"] for record in records) == 2 * 3 * 2 * 128
