"""The laboratory and the command: experiments report, stopping and continuing change nothing, bad input is said."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from l2a_jax import commands
from l2a_jax.errors import UserError
from l2a_jax.research.absorption import arm_training, arms, corpora, outcome, suite
from l2a_jax.research.absorption.definitions import DENSE, PRESETS, Arm, Attention
from l2a_jax.research.absorption.experiments import EXPERIMENTS
from l2a_jax.research.absorption.lab import Lab, OutOfTime
from tests.research.absorption import cases
from train import absorption as command
from train.absorption import STOPPED, main

PRESET = dataclasses.replace(
    PRESETS["tiny"], model=dataclasses.replace(cases.CONFIG, positions=48),
    recipe=dataclasses.replace(cases.RECIPE, seq_len=48, distill_steps=2), top_ks=(2, 3), top_k=3, gate_widths=(),
    experts=3, eval_batches=1, scan=2, together=1)


@pytest.fixture(scope="module")
def corpus():
    return corpora.recall_corpus(48, 24, 4)


class Untrained(Lab):
    """Every arm keeps its initial weights: the experiments are asked what they report, not what is learned."""

    def _train(self, group):
        for arm in group:
            program = self.program(arm)
            numbers = arm_training.member_axis([arm_training.arm_numbers(arm, program.config, self.recipe, 3)],
                                               len(self.seeds))
            state = arm_training.init_members(self.seeds, numbers.gate_std, config=program.config)
            record = {"step": 1, "loss": 1.0, "gate_grad_norm_max": [0.0, 0.0]}
            self._finish(arm, state.trainable, [record], slice(0, 2), np.zeros(2))


def test_every_experiment_reports(corpus, tmp_path):
    lab = Untrained(PRESET, corpus, tmp_path)
    written = suite.run(list(EXPERIMENTS), lab, "tiny", tmp_path / "out")
    assert len(written) == 3 * len(EXPERIMENTS) and all(path.stat().st_size for path in written)
    found = json.loads((tmp_path / "out" / "absorption_soft_gate.json").read_text())
    rows = found["tables"][0]["rows"]
    assert found["tokens_per_arm"] == 6 * 4 * 48 and found["parameters"]["tied"] < found["parameters"]["untied"]
    # Untrained, but not alike: a constant gate halves the logits; a frozen random one is where a learned one starts.
    assert rows["soft_learned"]["perplexity"]["seeds"] == rows["soft_random"]["perplexity"]["seeds"]
    assert rows["soft_constant"]["perplexity"]["seeds"] != rows["dense"]["perplexity"]["seeds"]
    assert rows["soft_constant"]["mean sigmoid(G)"]["mean"] == 0.5
    swap = json.loads((tmp_path / "out" / "absorption_swap.json").read_text())["tables"][0]["rows"]["soft_learned"]
    assert swap["constant 0.5"]["seeds"] == rows["soft_constant"]["perplexity"]["seeds"]
    assert swap["removed (dense)"]["seeds"] == rows["dense"]["perplexity"]["seeds"]
    assert swap["another seed's"]["seeds"] != swap["own"]["seeds"]
    # A second laboratory in the same folder measures nothing again.
    again = Untrained(PRESET, corpus, tmp_path)
    again._numbers = None
    np.testing.assert_array_equal(again.nll(arms.dense, DENSE), np.log(rows["dense"]["perplexity"]["seeds"]))


def test_a_stopped_arm_continues_to_the_same_weights(corpus, tmp_path):
    arm = dataclasses.replace(arms.dense, name="arm")
    whole = Lab(PRESET, corpus, tmp_path / "whole").params(arm)
    stopped = Lab(PRESET, corpus, tmp_path / "parts", deadline=0.0)
    with pytest.raises(OutOfTime):
        stopped.params(arm)
    assert not (tmp_path / "parts").exists(), "a limit that has passed starts nothing"
    stopped.check_time = lambda: None
    with pytest.raises(OutOfTime, match="after step 2"):
        stopped.params(arm)
    continued = Lab(PRESET, corpus, tmp_path / "parts")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(continued.params(arm)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [record["step"] for record in continued.metrics(arm)] == [2, 4, 6]
    assert not list((tmp_path / "parts" / "arms").glob("*.partial"))
    loaded = Lab(PRESET, corpus, tmp_path / "parts").params(arm)
    np.testing.assert_array_equal(loaded["embed"]["embedding"], whole["embed"]["embedding"])


def test_processes_share_the_arms_of_a_folder(corpus, tmp_path):
    lab, other = Untrained(PRESET, corpus, tmp_path), Untrained(PRESET, corpus, tmp_path)
    wanted = suite.arms_of(["soft_gate", "hard_topk", "stochastic"], lab)
    assert len(wanted) == 7 + 4 + 1 and len({lab.key(arm) for arm in wanted}) == 12
    trained = []
    train_arms = Untrained._train
    other._train = lambda group: (trained.append(group[0].name), train_arms(other, group))

    def first(group):  # while one process trains its first arm, the other does everything else
        if not trained:
            other.train_unclaimed(wanted)
        train_arms(lab, group)

    lab._train = first
    lab.train_unclaimed(wanted)
    assert trained == [arm.name for arm in wanted[1:]]
    assert len(list((tmp_path / "arms").glob("*/weights.safetensors"))) == 12
    everything = suite.arms_of(list(EXPERIMENTS), lab)
    # closed_loop's own; mechanism's five pairs (no widths here); experts; sweep's learned and random ones
    assert len(everything) == 12 + 3 + 10 + 3 + 8 + 2


def test_names_carry_what_determines_the_weights(corpus, tmp_path):
    lab = Lab(PRESET, corpus, tmp_path)
    other = Lab(dataclasses.replace(PRESET, recipe=dataclasses.replace(PRESET.recipe, learning_rate=0.5)), corpus,
                tmp_path)
    assert lab.key(arms.dense) != other.key(arms.dense)
    assert lab.key(arms.dense) != lab.key(arms.soft_learned)
    assert lab.key(arms.dense) == lab.key(dataclasses.replace(arms.dense, name="renamed"))
    assert lab.key(arms.dense) == Lab(dataclasses.replace(PRESET, top_k=2), corpus, tmp_path).key(arms.dense)


def test_the_order_of_windows_visits_each_once_an_epoch(corpus):
    windows = corpus.train
    order = windows.order(5, 0, 12, 4).reshape(-1)
    np.testing.assert_array_equal(np.sort(order[:24]), np.sort(windows.starts))
    np.testing.assert_array_equal(np.sort(order[24:]), np.sort(windows.starts))
    np.testing.assert_array_equal(windows.order(5, 3, 2, 4).reshape(-1), order[12:20])
    assert not np.array_equal(order[:24], windows.order(6, 0, 6, 4).reshape(-1))


def test_text_becomes_windows_of_whole_documents(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "?": 1, **{f"w{i}": i + 2 for i in range(40)}}, "?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    lines = "\n".join(json.dumps({"text": " ".join(f"w{(i * j) % 40}" for j in range(9))}) for i in range(40))
    (tmp_path / "text.jsonl").write_text(lines)
    found = corpora.text_corpus([str(tmp_path / "text.jsonl")], corpora.gpt2_tokenizer(str(tmp_path)), 16, 0.2,
                                tmp_path / "cache")
    both = found.train.stream.size + found.held_out.stream.size
    assert both == 400 and found.vocabulary == 42
    assert found.train.starts[-1] + 17 <= found.train.stream.size
    assert found.description["tokens"] == found.train.stream.size
    assert (np.flatnonzero(found.train.stream == 0) % 10 == 9).all(), "documents are whole, each with its end"


def test_report_says_what_was_reported():
    table = outcome.Table("t", {"a": {"x": outcome.Cell([1.0, 2.0], "9.9"), "y": "-"}, "b": {"x": outcome.Cell([3.0])}})
    text = outcome.markdown(outcome.Report("n", "Title", [table], [], ["note"]), {"text": "setting"})
    assert "| a | 1.50 ± 0.71 | 9.9 | - |" in text and "| b | 3.00 |  |  |" in text and "x, reported" in text


@pytest.mark.parametrize("flags, said", (
    (["--experiment", "nothing"], "nothing"), (["--experiment", "all", "--preset", "huge"], "huge"),
    (["--experiment", "all", "--data", "x.txt"], "--tokenizer"), (["--experiment", "all", "--seq-len", "999"], "999"),
    (["--experiment", "all", "--seeds", "1", "1"], "--seeds"), (["--experiment", "l2a_audit"], "run folder"),
    (["--experiment", "all", "--lr", "nan"], "--lr is nan; expected between 0 and 1, both excluded"),
    *((["--experiment", "all", flag, value], f"{flag} is ") for flag, value in (
        ("--lr", "inf"), ("--distill-lr", "0"), ("--weight-decay", "nan"), ("--weight-decay", "-1"), ("--warmup", "-1"),
        ("--dropout", "1"), ("--steps", "0"), ("--steps", str(2**63)), ("--eval-batches", "0"), ("--together", "0"),
        ("--save-every", "-5"), ("--seeds", "-1"), ("--seeds", str(2**32)), ("--top-k", "0"), ("--seq-len", "1"),
        ("--held-out", "0"), ("--held-out", "nan"), ("--time-limit", "-1"), ("--time-limit", "nan"),
        ("--dtype", "int8"), ("--distill-steps", str(2**31)))),
    (["--experiment", "l2a_audit", "RUN", "--eval-batches", "0"], "--eval-batches is 0; expected at least 1"),
    (["--experiment", "l2a_audit", "RUN", "--seq-len", "-1"], "--seq-len is -1"),
    (["--experiment", "all", "--batch-size", "1000000000"], "--batch-size 1000000000 rows of 64 tokens need at least"),
    (["--experiment", "all", "--eval-batches", "1000000000"], "--eval-batches 1000000000 batches of"),
    (["--experiment", "all", "--out", ""], "--out is empty; expected a path"),
    *([] if jax.default_backend() == "gpu" else [
        (["--experiment", "all", "--attention", "cudnn"], "--attention cudnn cannot be used on this machine")]),
    (["--experiment", "all", "--data", "x.txt", "--tokenizer", "tests"], "tokenizer.json")))
def test_bad_input_is_one_line(flags, said, capsys, tmp_path):
    assert main([*flags, "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "idle"), (
    (["--experiment", "all", "--tokenizer", "x", "--held-out", "0.1"], ["--tokenizer", "--held-out"]),
    (["--experiment", "l2a_audit", "RUN", "--lr", "0.1", "--untied"], ["--lr", "--untied"]),
    (["--benchmark", "--seeds", "3"], ["--seeds"]), (["--experiment", "all", "--lr", "0.1"], [])))
def test_flags_without_effect_are_said(flags, idle, caplog):
    options, given = command.read(flags)
    with caplog.at_level("WARNING", "l2a_jax"):
        commands.say_idle(given, command.idle(options))
    assert sorted(line.split()[0] for line in caplog.messages) == sorted(idle)


@pytest.mark.parametrize(("change", "said"), (
    ({"gate_std": float("nan")}, "gate_std of the arm 'a' is nan"), ({"gate_width": 0}, "gate_width of the arm 'a' is"),
    ({"gated_layers": (-1,)}, "gated_layers of the arm 'a' is"), ({"routing": "top"}, "routing of the arm 'a' is")))
def test_an_arm_that_cannot_be(change, said):
    with pytest.raises(UserError, match=said):
        Arm("a", **change)


def test_a_dry_run_says_which_arms_and_how_many_tokens(tmp_path, capsys):
    flags = ["--experiment", "sign", "sweep", "--steps", "5", "--lr", "0.01", "--run-dir", str(tmp_path / "run")]
    assert main([*flags, "--dry-run"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    tokens = 5 * 8 * 64 * 2
    assert len(lines) == 13 and lines[0] == (
        f"dense: 5 steps of 8 x 64 tokens, 2 seeds, learning rate 0.01, of the gate 0.01; {tokens:,} tokens")
    assert any(line.startswith("soft_learned_0.3_10: ") and "rate 0.003, of the gate 0.1;" in line for line in lines)
    assert last == f"in all 13 arms to train, {13 * tokens:,} tokens" and not (tmp_path / "run").exists()


def test_longer_presets_are_the_papers_but_for_their_length():
    paper = PRESETS["paper"]
    for steps in (3_000, 10_000, 20_000):
        preset = PRESETS[f"paper-{steps}"]
        same = dataclasses.replace(preset.recipe, steps=paper.recipe.steps, warmup=paper.recipe.warmup)
        assert dataclasses.replace(preset, recipe=same) == paper and preset.recipe.steps == steps
    assert (paper.recipe.batch_size, paper.recipe.dtype, paper.model.dropout) == (16, "float32", 0.1)


def test_the_command_stops_at_its_time_limit(tmp_path, capsys):
    assert main(["--experiment", "stochastic", "--time-limit", "0", "--run-dir", str(tmp_path / "run")]) == STOPPED
    assert "run the same command again" in capsys.readouterr().err


def test_a_diverging_arm_is_named(corpus, tmp_path, monkeypatch):
    start = arm_training.init_members

    def poisoned(*arguments, **options):
        state = start(*arguments, **options)
        state.trainable["norm_final"]["scale"] = state.trainable["norm_final"]["scale"].at[1, 0].set(np.nan)
        return state

    monkeypatch.setattr(arm_training, "init_members", poisoned)
    with pytest.raises(UserError, match="arm dense, seed 1: the loss or its gradient is not finite at step 1"):
        Lab(PRESET, corpus, tmp_path).params(arms.dense)


def test_attention_choices_have_numbers():
    assert Attention("additive", "oracle", "before", "shuffled").indexed()[:4] == (2, 3, 1, 1)
