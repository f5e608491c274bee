"""Rows of several lengths in one run: what each step reads, what is compiled, and that resuming is exact."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.data.batch import TrainingData
from l2a_jax.data.curriculum import make_curriculum, parse_curriculum
from l2a_jax.data.recall import RecallCorpus
from l2a_jax.errors import UserError
from l2a_jax.runs import train as runs
from l2a_jax.runs.about import dry_run
from l2a_jax.runs.plan import Run, RunPlan, estimate, make_plan
from l2a_jax.training.loop import NonFinite, stacked_batch
from l2a_jax.training.settings import resolve
from l2a_jax.training.step import Objective, TrainState


def rows_of(seq_len, batch_size):
    return RecallCorpus(seq_len, batch_size)


def test_a_step_reads_as_many_tokens_at_every_length_and_what_that_length_alone_would():
    data = make_curriculum("112:0.3,224:0.5,448:0.2", rows_of, seq_len=224, batch_size=2, grad_accum=2).over(10)
    assert isinstance(data, TrainingData)
    shapes = [stacked_batch(data, step, 2).tokens.shape for step in range(10)]
    assert shapes == [(2, 4, 112)] * 3 + [(2, 2, 224)] * 5 + [(2, 1, 448)] * 2
    for step, (batch_size, seq_len) in ((2, (4, 112)), (3, (2, 224)), (9, (1, 448))):
        alone = stacked_batch(rows_of(seq_len, batch_size), step, 2)
        np.testing.assert_array_equal(stacked_batch(data, step, 2).tokens, alone.tokens)
    held = next(data.held_out(1))
    np.testing.assert_array_equal(held.tokens, next(rows_of(224, 2).held_out(1)).tokens)
    assert data.tokens_per_batch == 448  # of the two micro-batches that a step would have
    others = ("112:0.4,224:0.4,448:0.2", "448:0.2,112:0.3,224:0.5", "224:1")
    prints = {make_curriculum(text, rows_of, 224, 2, 2).fingerprint for text in others} | {data.fingerprint}
    assert len(prints) == 4


@pytest.mark.parametrize("text", ["", "112", "112:0.5", "112:0.5,224:0.6", "a:1", "112:0,224:1", "1:1", "112:nan"])
def test_what_is_no_curriculum(text):
    with pytest.raises(UserError, match=r"^--curriculum is .*; expected LENGTH:SHARE"):
        parse_curriculum(text)


def test_lengths_fit_the_step_and_shares_the_run():
    with pytest.raises(UserError, match=r"^--curriculum has rows of 300, which do not divide the 448 tokens of a step"):
        make_curriculum("300:1", rows_of, 224, 2, 1)
    with pytest.raises(UserError, match=r"^--curriculum has rows of 896, which do not divide the 448 tokens of a step"):
        make_curriculum("896:1", rows_of, 224, 2, 1)
    with pytest.raises(UserError, match=r"^--curriculum gives rows of 224 a share of 0.01, which is no step of 10"):
        make_curriculum("112:0.99,224:0.01", rows_of, 224, 2, 1).over(10)


GIVEN = {"curriculum": "112:0.5,224:0.5", "seq_len": 224, "batch_size": 2, "steps": 6, "eval_every": 6,
         "eval_batches": 1, "save_every": 1, "target_local": 0.8}


def records(run_dir):
    timing = ("tokens_per_second", "peak_memory_gb")
    return [{name: value for name, value in json.loads(line).items() if name not in timing}
            for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_stopped_in_its_second_stage_goes_on_as_if_it_never_had(tmp_path, monkeypatch, optimised):
    monkeypatch.setattr(RunPlan, "is_demo", False)  # its report says nothing of stages
    settings = resolve("router_strict", GIVEN)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    summary = runs.train(settings, whole)
    assert summary["tokens_seen"] == 6 * 448 and [record["tokens"] for record in records(whole)] == [448] * 6
    assert {*summary["target"]["held_out_by_length"]} == {"112", "224"}
    fit = runs.fit_run

    def stopping(run, *args, record, stop, **kept):
        def noted(found):
            record(found)
            if found["step"] == 3:
                stop.signal_number = 15

        return fit(run, *args, record=noted, stop=stop, **kept)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "fit_run", stopping)
        with pytest.raises(SystemExit):
            runs.train(settings, broken)
    assert 3 < len(records(broken)) < 6
    again = runs.resume(broken)
    assert records(broken) == records(whole)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, again["target"], summary["target"]))


def test_a_row_longer_than_the_model_is_trained_for_is_refused():
    with pytest.raises(UserError, match=r"^--curriculum 2048 is longer than max_positions x factor = 1024"):
        dry_run(resolve("router_strict", {**GIVEN, "curriculum": "2048:1", "batch_size": 16, "seq_len": 128}))


def test_a_step_that_failed_is_looked_at_again_with_the_rows_of_its_stage(monkeypatch):
    given = {**GIVEN, "target_local": None, "forced": (0.5,)}
    plan = make_plan(resolve("l2a_ft", given))
    failing = Run(plan, Objective(plan.config, plan.l2a_config), {}, None, None, None, None, 0)
    state = TrainState(jnp.zeros((), jnp.int32), {}, None, jnp.ones((), bool))

    def fit(*_, **__):
        raise NonFinite(2, float("nan"), state)

    monkeypatch.setattr(runs, "fit", fit)
    monkeypatch.setattr(runs, "first_non_finite",
                        lambda trainable, frozen, batch, key, objective, forced: (batch.tokens.shape, forced.shape))
    with pytest.raises(NonFinite) as failure:
        runs.fit_run(failing, state, {}, [])
    assert failure.value.where == ((1, 4, 112), (plan.config.num_layers, 4, 112))


def test_the_estimate_is_of_the_stage_that_holds_most():
    short = {"seq_len": 112, "batch_size": 2, "grad_accum": 4, "steps": 4, "mesh": "data=1"}
    plain, staged = (estimate(make_plan(resolve("l2a_ft", {**short, **more}), present=False))
                     for more in ({}, {"curriculum": "112:0.5,896:0.5"}))
    assert staged.kept == 4 * plain.kept


def test_what_does_not_go_with_a_curriculum_is_said():
    with pytest.raises(UserError, match=r"^--unique keeps some rows of one length, .* --curriculum"):
        resolve("router_strict", {**GIVEN, "model": "x", "data": ("y",), "unique": 10})
    mesh = {**GIVEN, "curriculum": "112:0.5,448:0.5", "mesh": "data=2"}
    with pytest.raises(UserError, match=r"^--mesh data=2,context=1 deals rows .* --curriculum puts 1 into one"):
        make_plan(resolve("router_strict", mesh), present=False)
