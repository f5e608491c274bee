"""Rows from start to end on the tiny model: files, skipping, shared programs, the time limit, findings."""

import dataclasses
import io
import json
import os
import shutil
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation import needle
from l2a_jax.evaluation.perplexity import score_windows
from l2a_jax.research import deadline
from l2a_jax.research.replication import report, runner, trained
from l2a_jax.research.replication.measures import EvaluatedRow, measure
from l2a_jax.runs.plan import compile_run, dials_of, program_key
from l2a_jax.runs.train import train
from l2a_jax.sources import TINY, load_pretrained
from tests.research.replication.conftest import LAYER, QUICK, make_row


@pytest.fixture(scope="module")
def rows():
    return [make_row("plain", "baseline", dataclasses.replace(QUICK, tasks=("perplexity", "needle"))),
            make_row("one", penalty=0.3, router_lr=1e-2),
            make_row("two", measures=dataclasses.replace(QUICK, tasks=("perplexity", "absorption")), penalty=0.1,
                     router_lr=3e-3, seed=1),
            # A rate that no model survives.
            make_row("broken", measures=dataclasses.replace(QUICK, tasks=("perplexity",)), lr=1e30, warmup=0.0)]


OTHER = make_row("attention", "l2a_ft")
"""A row of another program, which is never run."""


@pytest.fixture(scope="module")
def compiled():
    """Regimes of the runs that were compiled."""
    return []


@pytest.fixture(scope="module")
def done(rows, session, compiled, tmp_path_factory):
    def counting(plan, compile_run=compile_run):
        compiled.append(plan.settings.regime)
        return compile_run(plan)

    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("l2a_jax.research.replication.session.compile_run", counting)
        assert runner.run_rows(rows, session, out) == ([], [])
    return out


def load(out, name):
    return json.loads((out / f"{name}.json").read_text())


def test_every_row_has_its_file(done, rows):
    for row in rows:
        found = load(done, row.name)
        assert found["status"] == "done" and found["training_hash"] == row.training_hash
        assert set(found["evaluations"]) == set(row.measures.tasks)
        assert str(done) not in json.dumps(found) and "data0" not in json.dumps(found["commands"])
    one = load(done, "one")
    assert one["training"]["steps"] == 6 and one["training"]["trained_parameters"] == 2 * 3 * 64
    assert [record["step"] for record in one["training"]["curve"]] == [1, 2, 3, 4, 5, 6]
    assert one["training"]["non_finite"] is None and one["training"]["memory"]["compiled_gb"] > 0
    assert one["evaluations"]["needle"]["result"]["lengths"]["64"]["controls"]["none"]["n"] == 4
    absorbed = load(done, "two")["evaluations"]["absorption"]["result"]
    assert absorbed["after"]["nll"]["learned"] != absorbed["before"]["nll"]["learned"] and absorbed["windows"] == 4
    assert {path.suffix for path in done.iterdir() if path.is_file()} == {".json", ".npz"}


def test_processes_that_share_a_folder_share_the_rows(session, rows, done, tmp_path, caplog):
    plain = rows[0]
    with runner.claimed(plain, done) as mine, runner.claimed(plain, done) as second:
        assert mine and not second
    tmp_path.joinpath(".locks").mkdir()
    caplog.set_level("INFO", "l2a_jax.research.replication")
    with runner.claimed(plain, tmp_path):  # as another process would
        assert runner.run_rows([plain], session, tmp_path) == ([], [])
        assert caplog.text.count("plain is run by another process") == 2 and not (tmp_path / "plain.json").exists()
    caplog.clear()
    began = time.time()
    runner._write_failure(tmp_path / "plain.json", plain, "no memory")
    assert runner._failed_since(began - 1, tmp_path / "plain.json")
    assert not runner._failed_since(began + 60, tmp_path / "plain.json"), "an earlier run's failure is tried again"
    os.utime(tmp_path / "plain.json", (began + 60, began + 60))  # while this process runs
    assert runner.run_rows([plain], session, tmp_path) == ([], []) and "plain failed in another" in caplog.text
    assert load(tmp_path, "plain")["status"] == "failed"
    os.utime(tmp_path / "plain.json", (began - 60, began - 60))
    assert runner.run_rows([plain], session, tmp_path) == ([], []) and load(tmp_path, "plain")["status"] == "done"


def test_a_measurement_says_where_it_was_made_when_not_where_the_row_was_trained(session, rows, done, tmp_path):
    row, found = rows[1], load(done, "one")
    found["environment"]["device"] = "1 x another card"
    del found["evaluations"]["audit"]
    (tmp_path / "one.json").write_text(json.dumps(found))
    shutil.copy(done / "one.npz", tmp_path)
    assert runner.run_rows([row], session, tmp_path) == ([], [])
    again = load(tmp_path, "one")
    assert again["environment"] == found["environment"] and again["training"] == found["training"]
    assert again["evaluations"]["audit"]["environment"]["device"] == runner.environment()["device"]
    assert [task for task, entry in again["evaluations"].items() if "environment" in entry] == ["audit"]
    report.write(tmp_path, tmp_path, [row])
    said = f"Measured elsewhere than trained: one: audit on {runner.environment()['device']}."
    assert said in (tmp_path / "replication.md").read_text()


def test_the_picture_is_of_our_own_text(session, rows, done, tmp_path):
    params = trained.load_masters(session, rows[1], done / "one.npz")
    found = measure(EvaluatedRow(session, rows[1], params, [], tmp_path), "picture")
    assert found["text"] == "sample.txt" and 0 < found["shown"] <= found["tokens"] - found["first"] <= 128
    assert found["first"] == LAYER["window"], "where no decision matters is not shown"
    assert (tmp_path / "one_picture.png").stat().st_size > 2_000 and 0 <= found["share"] <= 1
    out = tmp_path / "report"
    for path in done.glob("*.json"):
        found = json.loads(path.read_text())
        (tmp_path / path.name).write_text(json.dumps(found))
    declared = [row for row in rows if row.name != "broken"]
    made = report.write(tmp_path, out, declared)
    assert out / "one_picture.png" in made and "![picture](one_picture.png)" in (out / "replication.md").read_text()


def test_rows_that_differ_in_numbers_share_a_program(session, rows, done, compiled):
    assert compiled == ["router_only"]
    keys = [program_key(session.plan(row)) for row in (*rows[1:], OTHER)]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert dials_of(session.plan(rows[1])) != dials_of(session.plan(rows[2]))
    mixed = [rows[0], rows[1], OTHER, *rows[2:]]
    assert [row.name for row in runner.order(mixed)] == ["plain", "one", "two", "broken", "attention"]


def test_a_row_trains_as_the_command_does(session, rows, done, data_dir, tmp_path):
    """The same losses as `train/run.py` writes: one program, with this row's numbers and data."""
    row = rows[2]
    train(row.settings(TINY, str(data_dir)), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for record, line in zip(load(done, "two")["training"]["curve"], lines, strict=True):
        assert record["loss"] == line["loss"] and record["sparsity"] == line["sparsity"]
    model = load_pretrained(str(tmp_path / "run"), np.float32)
    kept = trained.load_masters(session, row, done / "two.npz")
    jax.tree.map(np.testing.assert_array_equal, kept, model.params)


def test_needle_as_windows_is_the_needle_task(session, rows, done):
    subject = EvaluatedRow(session, rows[1], trained.load_masters(session, rows[1], done / "one.npz"), [])
    options, prepared = session.needles(rows[1])
    found = needle.evaluate_needle(subject.model, options)
    bits = load(done, "one")["evaluations"]["needle"]["result"]["lengths"]["64"]["bits"]
    assert [bit == "1" for bit in bits] == [prompt["exact_match"] for prompt in found["prompts"]]
    scores = score_windows(subject.model, prepared[64], **session.passes)
    np.testing.assert_allclose(-scores.nll, [p["log_probability"] for p in found["prompts"]], rtol=1e-4, atol=1e-4)


def test_done_rows_are_skipped_and_new_tasks_do_not_train_again(session, rows, done, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in done.iterdir()}
    assert runner.run_rows(rows, session, done) == ([], [])
    assert {path: path.stat().st_mtime_ns for path in done.iterdir()} == before
    monkeypatch.setattr(runner, "train_row", lambda *_: pytest.fail("trained again"))
    more = dataclasses.replace(
        rows[1], measures=dataclasses.replace(QUICK, tasks=(*QUICK.tasks, "flips", "routed")))
    old = load(done, "one")["evaluations"]
    assert runner.run_rows([more], session, done) == ([], [])
    new = load(done, "one")["evaluations"]
    assert {"flips", "routed"} < set(new) and {name: new[name] for name in old} == old
    assert (done / "one_routed.png").stat().st_size > 1000


def test_no_time_starts_nothing_and_a_limit_between_phases_keeps_what_is_done(session, rows, tmp_path, monkeypatch):
    assert runner.run_rows(rows, session, tmp_path / "none", deadline=time.monotonic() + 5) == (
        ["plain", "one", "two", "broken"], [])
    assert not [path for path in (tmp_path / "none").iterdir() if path.is_file()]
    monkeypatch.setattr(runner, "planned_seconds", lambda *_: 0.0)
    clock = [0.0]

    def slow(subject, task, measure=runner.measure):
        clock[0] += 1.0
        return measure(subject, task)

    monkeypatch.setattr(runner, "measure", slow)
    stopped = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter, time=time.time)
    for module in (runner, deadline):
        monkeypatch.setattr(module, "time", stopped)
    assert runner.run_rows([rows[0]], session, tmp_path / "some", deadline=0.5) == (["plain"], [])
    found = load(tmp_path / "some", "plain")
    assert found["status"] == "partial" and list(found["evaluations"]) == ["perplexity"]
    assert not runner.is_done(rows[0], tmp_path / "some")


def test_a_loss_that_is_not_finite_is_a_finding(done):
    """The step is named, and the weights from before it are measured."""
    found = load(done, "broken")
    failed = found["training"]["non_finite"]
    assert failed["step"] >= 2 and "not finite" in failed["where"]
    assert found["training"]["steps"] == failed["step"] - 1 and len(found["training"]["curve"]) == failed["step"] - 1
    assert found["status"] == "done" and "perplexity" in found["evaluations"]


def test_the_report_reads_what_the_runner_writes(done, rows, tmp_path):
    groups = {"plain": "main", "one": "frontier", "two": "absorption", "broken": "collapse"}
    declared = [dataclasses.replace(row, group=groups[row.name]) for row in rows]
    paths = report.write(done, tmp_path, declared)
    assert {"replication_frontier.png", "replication_layers.png"} <= {path.name for path in paths}
    made = {row["name"]: row for row in json.loads(paths[1].read_text())["rows"]}
    base, one = (load(done, name)["evaluations"]["perplexity"]["result"] for name in ("plain", "one"))
    assert made["one"]["perplexity_ratio"]["nats"] == pytest.approx(one["nll"] - base["nll"], abs=1e-5)
    assert made["one"]["audit"]["ratio"]["learned"] == pytest.approx(made["one"]["perplexity_ratio"]["ratio"])
    text = paths[0].read_text()
    assert "not finite at step" in text and "| two | " in text and "notes" in paths[1].read_text()


def _cut(content):
    return content[: len(content) // 2]


def _rewritten(**changes):
    """The same archive with leaves replaced, or taken out (None)."""
    def damage(content):
        with np.load(io.BytesIO(content)) as file:
            leaves = {name: file[name] for name in file.files} | changes
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: leaf for name, leaf in leaves.items() if leaf is not None})
        return buffer.getvalue()

    return damage


ROUTER = "layers/router/kernel"
DAMAGED = {
    "cut": (_cut, "one.npz is damaged"), "empty": (lambda _: b"", "one.npz is damaged"),
    "no archive": (lambda _: b"weights", "one.npz is damaged"),
    "a bit": (lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:], "one.npz"),
    "a leaf is missing": (_rewritten(**{ROUTER: None}), "layers/router/kernel is missing; expected"),
    "a leaf of another model": (_rewritten(**{ROUTER: np.zeros((3, 5, 2))}), r"layers/router/kernel is \(3, 5, 2\)"),
    "a leaf too many": (_rewritten(other=np.zeros(3)), r"other is \(3,\); expected nothing of that name"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_kept_leaves_that_are_damaged_are_named(case, session, rows, done, tmp_path):
    """Before: leaves that were not there were taken from the untrained model, without a word."""
    damage, said = DAMAGED[case]
    (tmp_path / "one.npz").write_bytes(damage((done / "one.npz").read_bytes()))
    with pytest.raises(UserError, match=f"{said}.*move it away, and the row is trained again"):
        trained.load_masters(session, rows[1], tmp_path / "one.npz")


@pytest.mark.parametrize("place", ["file/out", "n" * 300])
def test_a_folder_that_cannot_be_written_is_found_out_first(place, session, rows, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(runner, "_attempt", lambda *given: pytest.fail("a row was begun"))
    with pytest.raises(UserError, match=r"--out .* cannot be written"):
        runner.run_rows(rows, session, tmp_path / place)
    with pytest.raises(UserError, match=r"--report .* cannot be written"):
        report.write(tmp_path, tmp_path / place, rows)
    assert os.listdir(tmp_path) == ["file"]


def test_what_cannot_run_fails_alone(session, rows, tmp_path):
    missing = dataclasses.replace(rows[1], name="big", size="1.5b")
    assert runner.run_rows([rows[0], missing], session, tmp_path) == ([], ["big"])
    assert "--model-15b" in load(tmp_path, "big")["error"] and load(tmp_path, "plain")["status"] == "done"
    asked = dataclasses.replace(rows[0], measures=dataclasses.replace(rows[0].measures,
                                                                      tasks=("perplexity", "absorption")))
    assert runner.run_rows([asked], session, tmp_path) == ([], ["plain"])  # a plain model routes nothing
    found = load(tmp_path, "plain")
    assert found["status"] == "failed" and set(found["evaluations"]) == {"perplexity", "needle"}
    assert runner.run_rows([rows[0]], session, tmp_path) == ([], [])
    (tmp_path / "plain.json").write_text("{}")
    with pytest.raises(UserError, match=r"plain\.json: format is missing.*Move the file away"):
        runner.run_rows([rows[0]], session, tmp_path)
