"""`eval/run.py` as a user runs it, on the packaged model: results merged, variants apart, bad input in one line."""

import importlib.util
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.config import L2AConfig, to_dict
from l2a_jax.data.recall import RecallCorpus, needs_memory
from l2a_jax.evaluation import evaluate, options, perplexity, pruning_cost, registry
from l2a_jax.fields import declared
from l2a_jax.models.params import add_routing, map_with_path
from l2a_jax.sources import TINY, load_pretrained

ROOT = Path(__file__).parents[2]
LAYER = ["--window", "12", "--sinks", "2"]


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("eval_run", ROOT / "eval" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def plain():
    return load_pretrained(TINY, jnp.float32)


@pytest.fixture
def run_dir(tmp_path, plain):
    """The folder of a run that trained nothing."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "settings": {"regime": "baseline", "data": [], "seed": 0, "model": None, "master_dtype": "float32"},
        "model_source": TINY, "source_hash": plain.source_hash, "model_config": to_dict(plain.config),
        "l2a_config": None}))
    (folder / "summary.json").write_text(json.dumps({"trained_parameters": 0, "tokens_seen": 4_096}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "held_out_loss": 1.1}\n')
    return folder


def read(path):
    return json.loads(path.read_text())


def test_a_run_folder_keeps_the_results_of_every_task(main, run_dir, plain, capsys, caplog):
    caplog.set_level(logging.INFO)
    assert main([str(run_dir), "--tasks", "perplexity"]) == 0
    assert "perplexity 2.768" in capsys.readouterr().out
    assert "no --text: scored on held-out rows of the synthetic recall corpus" in caplog.text
    first = read(run_dir / "eval.json")
    assert first["regime"] == "baseline" and first["run"]["tokens_seen"] == 4_096
    assert main([str(run_dir), "--tasks", "collapse"]) == 0
    assert "verdict: healthy" in capsys.readouterr().out
    found = read(run_dir / "eval.json")
    assert found["tasks"]["perplexity"] == first["tasks"]["perplexity"]
    assert found["tasks"]["collapse"]["training"] == {"steps": 1, "loss": 1.0, "not_finite": 0, "held_out_loss": 1.1}
    origin = found["tasks"]["collapse"]["provenance"]
    assert origin["settings"]["source"] == str(run_dir) and origin["versions"]["jax"] and origin["seconds"] > 0
    assert not list(run_dir.glob(".*"))

    windows = perplexity.batch_windows(list(RecallCorpus(128, 64).held_out(1)), {}, needs_memory)
    scores = perplexity.score_windows(plain, windows, batch_tokens=4_096)
    assert found["tasks"]["perplexity"]["perplexity"] == pytest.approx(
        float(np.exp(scores.nll.sum() / scores.tokens.sum())), rel=1e-6)

    changed = read(run_dir / "eval.json") | {"source_hash": "of earlier weights"}
    (run_dir / "eval.json").write_text(json.dumps(changed))
    assert main([str(run_dir), "--tasks", "perplexity"]) == 0
    assert set(read(run_dir / "eval.json")["tasks"]) == {"perplexity"}
    assert "is about earlier weights" in caplog.text


def test_an_untrained_layer_routed_in_full_is_the_plain_model(main, run_dir, capsys):
    """Parallel and shared: everything routed preserves the function; nothing routed forgets."""
    assert main([str(run_dir), "--tasks", "perplexity"]) == 0
    for route in ("all", "none"):
        assert main([str(run_dir), "--tasks", "perplexity", *LAYER, "--route", route]) == 0
    whole, everything, nothing = (read(run_dir / f"eval{variant}.json")["tasks"] for variant in
                                  ("", "-sinks-2-window-12-route-all", "-sinks-2-window-12-route-none"))
    assert everything["perplexity"]["text"]["hash"] == whole["perplexity"]["text"]["hash"]
    assert everything["perplexity"]["nll"] == pytest.approx(whole["perplexity"]["nll"], abs=1e-5)
    assert everything["perplexity"]["sparsity"] == 0 and nothing["perplexity"]["sparsity"] == 1
    assert nothing["perplexity"]["recall_accuracy"] < 0.3 < 0.95 < everything["perplexity"]["recall_accuracy"]
    assert "audit" not in everything | nothing | whole


def test_a_routed_model_is_audited_and_pruning_is_paid_for(main, tmp_path, capsys):
    flags = [TINY, "--tasks", "perplexity", *LAYER, "--prune-layers", "1", "--audit-seeds", "1", "--max-windows", "32",
             "--out", str(tmp_path)]
    assert main(flags) == 0
    tasks = read(tmp_path / "eval.json")["tasks"]
    assert tasks["audit"]["rows"]["learned"]["perplexity"] == pytest.approx(tasks["perplexity"]["perplexity"])
    pruning = tasks["pruning"]
    assert pruning["newly_pruned"] == [1] and pruning["perplexity_after"] > pruning["perplexity_before"]
    # One of three layers keeps 14 tokens instead of 1,024: 2 kv heads x 16 x (k and v) x 4 bytes a token.
    assert pruning["cache_saved"] == (1_024 - 14) * 2 * 16 * 2 * 4
    assert "routing audit" in capsys.readouterr().out
    before = (tmp_path / "eval.json").read_text()
    assert main([TINY, "--tasks", "perplexity", "--out", str(tmp_path)]) == 2
    assert "holds the results of another model" in capsys.readouterr().err
    assert (tmp_path / "eval.json").read_text() == before


def test_layers_are_pruned_by_what_the_calibration_measures(plain):
    layer = L2AConfig(window=12, sinks=2)
    params = add_routing(plain.params, plain.config, layer)
    router = jax.random.normal(jax.random.key(0), params["layers"]["router"]["kernel"].shape)
    params["layers"]["router"]["kernel"] = router.at[1].set(0.0)  # at zero: everything is routed
    windows = perplexity.batch_windows(list(RecallCorpus(128, 32).held_out(1)), {"name": "recall"})
    model = plain._replace(l2a_config=layer, params=params)
    kept = pruning_cost.by_sparsity(model, windows, 0.05, batch_tokens=4_096)
    assert kept.l2a_config.pruned_layers == (0, 2)
    assert pruning_cost.by_sparsity(model, windows, 0.999, batch_tokens=4_096).l2a_config.pruned_layers == ()


def test_a_broken_model_gets_its_report_and_then_an_error(main, tmp_path, plain, monkeypatch, capsys):
    broken = plain._replace(params=map_with_path(
        lambda path, leaf: leaf.at[0].set(jnp.nan) if path == "layers/mlp/down/kernel" else leaf, plain.params))
    monkeypatch.setattr(evaluate, "load_pretrained", lambda *given: broken)
    assert main([TINY, "--tasks", "perplexity,collapse", "--out", str(tmp_path)]) == 2
    assert "the loss in window 0, first at its token 0, is not finite" in capsys.readouterr().err
    tasks = read(tmp_path / "eval.json")["tasks"]
    assert set(tasks) == {"collapse"} and tasks["collapse"]["verdict"] == "non-finite"


def test_benchmarks_get_the_flags(main, tmp_path, monkeypatch, capsys):
    from l2a_jax.evaluation import tasks

    (tmp_path / "piqa_x.jsonl").write_text(3 * '{"goal": "the", "sol1": "old river", "sol2": "hill"}\n')
    (tmp_path / "piqa_x-labels.lst").write_text(3 * "0\n")
    asked = {}

    def answer(model, names, **options):
        asked.update(options, names=names, config=model.config)
        return {"piqa": {"acc": 1.0, "acc_stderr": 0.0, "n": 1, "num_fewshot": 2, "correct": [1]}}

    monkeypatch.setattr(tasks, "evaluate_tasks", answer)
    assert main([TINY, "--tasks", "piqa", "--limit", "1", "--num-fewshot", "2", "--task-data", str(tmp_path),
                 "--out", str(tmp_path / "out")]) == 0
    assert asked["names"] == ("piqa",) and asked["limit"] == 1 and asked["num_fewshot"] == 2
    assert asked["task_data"] == tmp_path and asked["log_samples"] is None
    assert "piqa: acc 1.000" in capsys.readouterr().out
    assert read(tmp_path / "out" / "eval.json")["tasks"]["piqa"]["correct"] == [1]


def test_the_needle_gets_the_flags_and_a_picture(main, tmp_path, monkeypatch, capsys, caplog):
    from l2a_jax.evaluation import needle

    asked = []

    def answer(model, options, backend, mesh):
        asked.append(options)
        grid = [[0.5] * len(options.lengths) for _ in options.depths]
        return {"lengths": options.lengths, "depths": options.depths, "per_cell": 2, "needles": 1, "distractors": 7,
                "exact_match": grid, "ranked_first": grid,
                "overall": {"exact_match": 0.5, "exact_match_stderr": 0.1, "ranked_first": 0.5, "mean_rank": 2, "n": 8}}

    monkeypatch.setattr(needle, "evaluate_needle", answer)
    assert main([TINY, "--tasks", "needle", "--needle-lengths", "64,128", "--needle-depths", "3", "--needle-seeds", "2",
                 "--out", str(tmp_path)]) == 0
    assert (asked[0].lengths, asked[0].depths, asked[0].seeds) == ((64, 128), (0.0, 0.5, 1.0), (0, 1))
    assert (tmp_path / "needle.png").stat().st_size > 1_000
    assert read(tmp_path / "eval.json")["tasks"]["needle"]["heat_map"] == "needle.png"
    assert "exact match 50.0%" in capsys.readouterr().out
    # Layers can be pruned for a task that reads no text: what that costs in perplexity is then not scored.
    caplog.set_level(logging.INFO)
    assert main([TINY, "--tasks", "needle", "--needle-lengths", "64,128", *LAYER, "--prune-layers", "1",
                 "--out", str(tmp_path / "pruned")]) == 0
    assert [*read(tmp_path / "pruned" / "eval.json")["tasks"]] == ["needle"]
    assert "without --text it is not scored" in caplog.text


BAD = {
    "unknown task": (["--tasks", "perplexity,hellaswg"], "no task 'hellaswg' (did you mean hellaswag?)"),
    "no task": (["--tasks", ","], "--tasks names nothing"),
    "missing text": (["--tasks", "perplexity", "--text", "nowhere.txt"], "--text nowhere.txt: no such file"),
    "empty text": (["--tasks", "perplexity", "--text", "empty.txt"], "--text empty.txt: there is no text"),
    "missing task file": (["--tasks", "hellaswag", "--task-data", "."], "hellaswag"),
    "missing haystack": (["--tasks", "needle", "--haystack", "nowhere", "--needle-lengths", "256"],
                         "the haystack nowhere"),
    "empty haystack": (["--tasks", "needle", "--haystack", "empty.txt", "--needle-lengths", "256"],
                       "the haystack empty.txt holds no text"),
    "too long a needle": (["--tasks", "needle", "--needle-lengths", "4096"], "4096"),
    "too long a context": (["--tasks", "perplexity", "--text", "words.txt", "--context", "2048"], "--context 2048"),
    "no stride": (["--tasks", "perplexity", "--text", "words.txt", "--stride", "0"], "--stride is 0"),
    "stride beyond context": (["--tasks", "perplexity", "--text", "words.txt", "--context", "8", "--stride", "9"],
                              "--stride is 9"),
    "audit of a plain model": (["--tasks", "audit"], "plain model, which routes nothing"),
    "audit of nothing routed": (["--tasks", "audit", *LAYER, "--route", "none"], "leaves no decision to audit"),
    "route of a plain model": (["--tasks", "perplexity", "--route", "none"], "give --window"),
    "unknown route": (["--tasks", "perplexity", *LAYER, "--route", "some"], "--route is 'some'"),
    "missing layer": (["--tasks", "perplexity", *LAYER, "--prune-layers", "3"], "layers 0 to 2"),
    "no layer numbers": (["--tasks", "perplexity", *LAYER, "--prune-layers", "a"], "--prune-layers"),
    "sparsity without calibration": (["--tasks", "perplexity", *LAYER, "--prune-sparsity", "0.9"], "--calibration"),
    "sparsity of a plain model": (["--tasks", "perplexity", "--prune-sparsity", "0.9", "--calibration", "x"],
                                  "--prune-sparsity: qwen2.5-tiny is plain"),
    "unknown backend": (["--tasks", "perplexity", "--backend", "flash"], "--backend is 'flash'"),
    "unknown dtype": (["--tasks", "perplexity", "--dtype", "int8"], "--dtype is 'int8'"),
    "no window": (["--tasks", "perplexity", "--window", "0"], "--window is 0"),
    "context without end": (["--tasks", "perplexity", "--context", str(2**40)], "--context is 1099511627776"),
    "no windows": (["--tasks", "perplexity", "--max-windows", "0"], "--max-windows is 0"),
    "no batch": (["--tasks", "perplexity", "--batch-tokens", "-1"], "--batch-tokens is -1"),
    "too many draws": (["--tasks", "audit", *LAYER, "--audit-seeds", "1000000000"], "--audit-seeds is"),
    "no draws": (["--tasks", "audit", *LAYER, "--audit-seeds", "0"], "--audit-seeds is 0; expected between 1 and 1000"),
    "fewer than no shots": (["--tasks", "piqa", "--num-fewshot", "-1"], "--num-fewshot is -1"),
    "a seed below 0": (["--tasks", "collapse", "--seed", "-1"], "--seed is -1"),
    "a seed beyond 32 bits": (["--tasks", "collapse", "--seed", str(2**64)], "--seed is 18446744073709551616"),
    "no share": (["--tasks", "perplexity", *LAYER, "--prune-sparsity", "nan", "--calibration", "x"],
                 "--prune-sparsity is nan; expected a share of tokens not routed"),
    "no text": (["--tasks", "perplexity", "--text", ""], "--text is ''; expected a text that is not empty"),
    "no task folder": (["--tasks", "piqa", "--task-data", ""], "--task-data is empty; expected a path"),
    "no folder": (["--tasks", "perplexity", "--out", " "], "--out is empty; expected a path"),
    "a temperature of the router": (["--tasks", "perplexity", *LAYER, "--temperature", "inf"], "--temperature is inf"),
    "a threshold of the router": (["--tasks", "perplexity", *LAYER, "--threshold", "1"], "--threshold is 1.0"),
    "a window beyond positions": (["--tasks", "perplexity", "--window", str(2**40)], "--window is 1099511627776"),
    "sinks beyond positions": (["--tasks", "perplexity", *LAYER, "--sinks", str(10**12)], "--sinks is 1000000000000"),
    "rope without end": (["--tasks", "perplexity", "--rope", "yarn:inf"], "--rope is 'yarn:inf'"),
    "layers without end": (["--tasks", "perplexity", *LAYER, "--prune-layers", "0-99999999999"], "--prune-layers"),
    "needle depths": (["--tasks", "needle", "--needle-depths", "-2"], "--needle-depths is -2; expected between"),
    "needle seeds below 0": (["--tasks", "needle", "--needle-seeds", "-1"], "--needle-seeds is -1"),
    "endless needle seeds": (["--tasks", "needle", "--needle-seeds", "10000000000"], "--needle-seeds is 1000"),
    "needle lengths below 0": (["--tasks", "needle", "--needle-lengths=-64"], "needle lengths is (-64,); expected"),
    "needle lengths that are none": (["--tasks", "needle", "--needle-lengths", "64,x"],
                                     "--needle-lengths is '64,x'; expected whole numbers with commas"),
    "a backend of other machines": (["--tasks", "perplexity", "--backend", "cudnn"],
                                    "--backend cudnn cannot be used on this machine"),
    "another backend of other machines": (["--tasks", "perplexity", "--backend", "pallas"], "NVIDIA GPUs"),
    "no limit": (["--tasks", "piqa", "--limit", "0"], "--limit is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_computed(case, main, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("words.txt").write_text("the old river runs near the old bridge .")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(evaluate, "load_pretrained", lambda *given: pytest.fail("the weights were read"))
    flags, message = BAD[case]
    if case == "unknown task":  # lm-eval's own list of thousands takes long to read
        monkeypatch.setattr("lm_eval.tasks.TaskManager",
                            lambda **_: SimpleNamespace(all_subtasks=["hellaswag_xx"], all_tasks=["hellaswag_xx"]))
    assert main([TINY, *flags]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and message in said
    assert sorted(tmp_path.rglob("*")) == before


IDLE = [
    ({"tasks": ("perplexity",), "seed": 1, "limit": 3, "batch_tokens": 64}, {}, ("--seed", "--limit")),
    ({"tasks": ("perplexity",), "audit_seeds": 5, "stride": 8}, {}, ("--audit-seeds", "--stride")),
    ({"tasks": ("needle",), "context": 64, "num_fewshot": 1, "needle": {"lengths": (64,)}}, {},
     ("--context", "--num-fewshot")),
    ({"tasks": ("collapse",), "seed": 1, "batch_tokens": 64, "needle": {"seeds": 2, "haystack": ("x",)}}, {},
     ("--batch-tokens", "--needle-seeds", "--haystack")),
    ({"tasks": ("perplexity",), "route": "all"}, {"window": 8, "threshold": 0.4}, ("--threshold",)),
]


def test_every_flag_of_a_task_is_read_by_one_and_every_flag_read_is_declared():
    own = {name for kind in (options.TextOptions, options.BenchmarkOptions, options.RulerOptions, options.NeedleFlags)
           for name in declared(kind)}
    read = {flag for task in registry.TASKS.values() for flag in task.reads}
    assert own <= read <= own | {*declared(options.Options)}


@pytest.mark.parametrize(("options", "layer", "expected"), IDLE, ids=str)
def test_options_without_effect_are_said(options, layer, expected, monkeypatch, caplog):
    class Enough(Exception):
        pass

    def enough(*given):
        raise Enough

    monkeypatch.setattr(evaluate, "load_pretrained", enough)
    with caplog.at_level(logging.WARNING, "l2a_jax"), pytest.raises(Enough):
        evaluate.evaluate(evaluate.Options(source=TINY, layer=layer, **options))
    assert {line.split()[0] for line in caplog.messages if "has no effect here" in line} == set(expected)


def test_a_model_of_ones_own_words_needs_a_text(main, tmp_path, monkeypatch, capsys, plain):
    class Other:
        def get_vocab(self):
            return {"other": 0}

    monkeypatch.setattr(evaluate, "source_tokenizer", lambda source: Other())
    assert main([TINY, "--tasks", "perplexity", "--out", str(tmp_path)]) == 2
    assert "needs held-out text: give --text" in capsys.readouterr().err


def test_a_text_of_ones_own(main, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("the old river runs near the old bridge . " * 16)
    assert main([TINY, "--tasks", "perplexity", "--text", str(tmp_path / "words.txt"), "--context", "128",
                 "--stride", "32", "--dtype", "float32", "--out", str(tmp_path)]) == 0
    entry = read(tmp_path / "eval.json")["tasks"]["perplexity"]
    assert entry["tokens"] == 16 * 9 - 1 and entry["text"]["windows"] == 2 and entry["text"]["rule"] == "text"
    assert len(entry["text"]["files"]["words.txt"]) == 64
