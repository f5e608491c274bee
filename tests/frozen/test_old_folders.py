"""Folders that an earlier version wrote still load, go on to the same end, evaluate and tabulate.

`folders/` holds runs of the tiny model: two stopped after step 3 of 4, one evaluated, one exported, one of a baseline.
"""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest

import l2a_jax as l2a
from tests.frozen import cases

FOLDERS = pathlib.Path(__file__).with_name("folders")
ENDS = {"router_only": {"loss": 1.04450678825, "held_out_loss": 1.08111145906, "sparsity": 0.50911462307},
        "l2a_ft": {"loss": 1.03883528711, "held_out_loss": 1.05953636207, "sparsity": 0.62369793653}}
"""The last record of each run, as the version that began it would have written it."""


@pytest.fixture(params=ENDS)
def resumed(request, tmp_path):
    run_dir = tmp_path / request.param
    shutil.copytree(FOLDERS / request.param, run_dir)
    assert cases.command("train/run")(["--resume", str(run_dir)]) in (0, None)
    return request.param, run_dir


def test_a_stopped_run_goes_on_to_the_same_end_and_is_evaluated(resumed):
    name, run_dir = resumed
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    old = [json.loads(line) for line in (FOLDERS / name / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4] and records[:3] == old
    for key, value in ENDS[name].items():
        assert records[-1][key] == pytest.approx(value, rel=1e-4), key
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["tokens_seen"] == sum(record["tokens"] for record in records)
    flags = ["--tasks", "perplexity", "--max-windows", "2", "--audit-seeds", "1"]
    assert cases.command("eval/run")([str(run_dir), *flags]) in (0, None)
    found = json.loads((run_dir / "eval.json").read_text())
    assert found["regime"] == name and found["tasks"]["perplexity"]["perplexity"] > 1


def test_a_stopped_run_is_a_model():
    model = l2a.load_pretrained(FOLDERS / "l2a_ft", np.float32)
    source = l2a.load_pretrained("qwen2.5-tiny", np.float32)
    kernels = [tree["layers"]["attention"]["q"]["kernel"] for tree in (model.params, source.params)]
    assert model.l2a_config.leakage == 0.5 and float(abs(kernels[0] - kernels[1]).max()) > 0


def test_a_baseline_is_its_source():
    model, source = (l2a.load_pretrained(source, np.float32) for source in (FOLDERS / "baseline", "qwen2.5-tiny"))
    np.testing.assert_array_equal(model.params["embed"]["embedding"], source.params["embed"]["embedding"])
    assert model.l2a_config is None


def test_an_export_is_the_run_it_was_made_from():
    """`exported` was written from the finished `router_only`: its frozen weights are the source's in bfloat16."""
    import jax.numpy as jnp

    model, source = l2a.load_pretrained(FOLDERS / "exported"), l2a.load_pretrained("qwen2.5-tiny", jnp.bfloat16)
    assert model.l2a_config == l2a.load_pretrained(FOLDERS / "router_only").l2a_config
    kernels = [tree["layers"]["mlp"]["up"]["kernel"] for tree in (model.params, source.params)]
    np.testing.assert_array_equal(*kernels)
    assert model.tokenizer.encode("go") == source.tokenizer.encode("go")


def test_results_are_tabulated(capsys):
    assert cases.command("eval/table")([str(FOLDERS / "evaluated")]) in (0, None)
    row = next(line for line in capsys.readouterr().out.splitlines() if "evaluated" in line)
    assert "router_only" in row and "2.95" in row


def test_rows_of_the_study_are_read_and_are_still_those_that_are_declared():
    from l2a_jax.research.replication import arms
    from l2a_jax.research.replication.rows import choose
    from l2a_jax.research.replication.runner import read_row

    rows = [row for row in choose() if row.not_run is None]
    assert len(rows) > 100
    for row in rows:
        found = read_row(cases.ROOT / "eval" / "results" / "rows" / f"{row.name}.json")
        waits = found is None and row.group in arms.GROUPS  # for a machine
        assert waits or found["training_hash"] == row.training_hash, row.name


def test_arms_of_the_absorption_suite_keep_their_names(tmp_path):
    from l2a_jax.research.absorption import suite
    from l2a_jax.research.absorption.definitions import PRESETS
    from l2a_jax.research.absorption.lab import Lab

    corpus = suite.make_corpus(PRESETS["tiny"], (), None, 0.0, None)
    lab = Lab(PRESETS["tiny"], corpus, tmp_path)
    found = {arm.name: lab.key(arm) for arm in suite.arms_of(["swap"], lab)}
    assert found == {"soft_learned": "30d56979f23f", "soft_random": "9aa377e173a5", "soft_random_large": "ed33dd2ffc95",
                     "additive_learned": "3536070f2513"}
