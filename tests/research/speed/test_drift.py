"""How far losses drift apart: literal numbers of made-up run folders, and what of them cannot be compared."""

from __future__ import annotations

import json
import pathlib
import runpy

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
FROZEN = ROOT / "tests/frozen/folders/router_only/config.json"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Write a run folder of these losses and changed settings."""
    monkeypatch.chdir(tmp_path)

    def made(name, losses, source_hash="1", **settings):
        config = json.loads(FROZEN.read_text())
        config |= {"settings": {**config["settings"], **settings}, "source_hash": source_hash, "device": "1 x H200"}
        pathlib.Path(name).mkdir()
        pathlib.Path(name, "config.json").write_text(json.dumps(config))
        pathlib.Path(name, "metrics.jsonl").write_text("".join(
            json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, start=1)))
        return name

    return made


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return lambda *flags: runpy.run_path(str(ROOT / "eval" / "speed.py"))["main"](["--drift", *flags])


def test_runs_stand_beside_the_one_without_a_mesh(make, command):
    names = [make("halves", [4, 3, 2.25, 2] + [1] * 20, batch_size=1, grad_accum=2),
             make("one", [4, 3.5, 2, 2] + [1.5] * 20, remat="layer"),
             make("data", [4, 3, 2, 1], mesh="data=2,context=1"),
             make("again", [4, 3, 2.5, 1.25, 9], mesh="data=2,context=1"),
             make("other", [1, 1], regime="router_strict"),
             make("others", [2, 1], regime="router_strict", mesh="data=2")]
    assert command(*names, "--out", ".") == 0
    result = json.loads(pathlib.Path("drift.json").read_text())
    halves, data, again, other = result["runs"]
    assert {row["base"] for row in result["runs"][:3]} == {"one"} and result["losses"]["data"] == [4, 3, 2, 1]
    assert halves == {"of": "demo router_only, 256 tokens a step", "run": "halves", "device": "1 x H200", "mesh": None,
                      "micro_batches": 2, "steps": 24, "mean": pytest.approx(10.75 / 24), "largest": 0.5,
                      "largest_at": 2, "last": 0.5, "signed": pytest.approx(-10.25 / 24), "base": "one", "same": None}
    assert (data["steps"], data["mean"], data["largest"], data["largest_at"], data["same"]) == (4, 1.5 / 4, 1, 4, None)
    assert again["same"] == {"run": "data", "steps": 2, "of": 4, "largest_later": 0.5} and again["largest"] == 7.5
    assert (other["of"], other["mean"], other["signed"]) == ("demo router_strict, 256 tokens a step", 0.5, 0.5)
    text = pathlib.Path("drift.md").read_text()
    assert "| halves | 1 x H200 | none | 2 | 24 | 0.4479 | 0.5000 | 2 | 0.5000 | -0.4271 |" in text
    assert "- again is data to the last bit for 2 of 4 steps, and at most 0.5000 nats from it later." in text


def test_runs_that_say_different_things_are_refused(make, command, capsys):
    one = make("one", [1.0])
    broken = make("broken", [1.0, 2.0])
    pathlib.Path("broken/metrics.jsonl").write_text('{"step": 2, "loss": 2.0}\n')
    for flags, said in (((one, make("seed", [1.0], seed=3)), "seed: settings.seed is 3; one has 0"),
                        ((one, make("steps", [1.0], steps=5)), "steps: settings.steps is 5; one has 4"),
                        ((one, make("long", [1.0], seq_len=256, batch_size=1)),
                         "long: settings.seq_len is 256; one has 128"),
                        ((one, make("model", [1.0], "2")), "model: source_hash is '2'; one has '1'"),
                        ((one, make("rows", [1.0], batch_size=4)), "--drift has one of demo router_only, 256 tokens"),
                        ((make("mesh", [1.0], mesh="data=2"), "mesh"), "expected one without a mesh"),
                        ((one, make("empty", [])), "empty/metrics.jsonl has losses of 0 steps"),
                        ((one, broken), "broken/metrics.jsonl has losses of 1 steps"),
                        ((one, "nothing"), "nothing/config.json cannot be read")):
        assert command(*flags) == 2
        assert said in capsys.readouterr().err
