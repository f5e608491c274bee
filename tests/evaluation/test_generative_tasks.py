"""lm-eval's generative tasks over local files and a tiny model: prompts, texts, scores as lm-eval counts them."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from l2a_jax.config import ModelConfig
from l2a_jax.errors import UserError
from l2a_jax.evaluation import evaluate, registry, results, tasks
from l2a_jax.evaluation.harness import HarnessModel, greedy
from l2a_jax.evaluation.task_files import read_task
from l2a_jax.evaluation.tasks import evaluate_tasks
from l2a_jax.models.params import init_params
from l2a_jax.sources import TINY, Pretrained
from tests.evaluation.byte_tokenizer import byte_tokenizer

CONFIG = ModelConfig(260, 16, 24, 1, 2, 1, 8, max_positions=1_024)
ITEMS = [{"question": f"What is {a} and {b}?", "answer": f"{a} and {b} make {a + b}.\n#### {a + b}"}
         for a, b in ((1, 2), (10, 20), (700, 500))]
TRAINING = [{"question": f"How much is {a} + 1?", "answer": f"One more.\n#### {a + 1}"} for a in range(7)]
SCORES = ("exact_match,strict-match", "exact_match,flexible-extract")


@pytest.fixture(scope="module")
def model():
    params = jax.tree.map(lambda x: x * 3, init_params(CONFIG, jax.random.key(0)))
    return Pretrained(CONFIG, None, params, byte_tokenizer(), "")


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "gsm8k_test.jsonl", ITEMS)
    return tmp_path


def save(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def ask(model, folder, **options):
    given = {"limit": None, "num_fewshot": 2, "task_data": folder, "log_samples": folder} | options
    found = evaluate_tasks(model, ("gsm8k",), **given)["gsm8k"]
    return found, [json.loads(line) for line in (folder / "samples_gsm8k.jsonl").read_text().splitlines()]


def say(monkeypatch, texts):
    """Let the model write these, whatever it is asked."""
    monkeypatch.setattr(HarnessModel, "generate_until", lambda self, requests, **_: list(texts))


def test_texts_are_asked_and_kept(model, folder):
    found, samples = ask(model, folder)
    assert (found["n"], found["num_fewshot"], found["requests"], found["split"]) == (3, 2, 3, "validation")
    assert json.loads(json.dumps(found)) == found and set(found["scores"]) == set(SCORES)
    assert [len(found["scores"][name]["items"]) for name in SCORES] == [3, 3]
    for item, sample in zip(ITEMS, samples, strict=True):
        *examples, question = sample["context"].split("\n\n")
        assert question == f"Question: {item['question']}\nAnswer:" and len(examples) == 2
        assert not any(item["question"] in example for example in examples)
        assert sample["target"] == item["answer"] and "Question:" not in sample["written"]
        assert set(sample["read"]) == {"strict-match", "flexible-extract"}


def test_scores_are_lm_evals_own(model, folder, monkeypatch):
    """Stored texts through our entry, and through lm-eval's filters and process_results by hand."""
    said = ["1 and 2 make 3.\n#### 3", "I say 30", "#### 1,200 or so 7"]
    say(monkeypatch, said)
    found, samples = ask(model, folder)
    assert [found["scores"][name]["items"] for name in SCORES] == [[1, 0, 1], [1, 1, 0]]
    assert found["scores"][SCORES[0]]["value"] == pytest.approx(2 / 3)
    assert found["scores"][SCORES[0]]["stderr"] == pytest.approx(np.std([1, 0, 1], ddof=1) / 3**0.5)
    assert [sample["written"] for sample in samples] == said
    task = tasks.load(("gsm8k",), folder, 0, None)["gsm8k"].task
    task.build_all_requests(limit=None, rank=0, world_size=1)
    for instance, text in zip(task.instances, said, strict=True):
        instance.resps = [text]
    task.apply_filters()
    for instance, sample in zip(task.instances, samples, strict=True):
        for name, kept in instance.filtered_resps.items():
            assert sample["read"][name] == kept
            assert sample["scores"][f"exact_match,{name}"] == task.process_results(instance.doc, [kept])["exact_match"]


def test_worked_examples_come_from_the_training_file(model, folder, monkeypatch, caplog):
    tasks.load(("gsm8k",), folder, 0, None)
    assert not caplog.records
    tasks.load(("gsm8k",), folder, 2, None)
    assert "there is no *gsm8k_train*.jsonl beside" in caplog.text
    caplog.clear()
    save(folder / "math_gsm8k_train.jsonl", TRAINING)
    say(monkeypatch, [""] * 3)
    found, samples = ask(model, folder, num_fewshot=None)
    assert (found["num_fewshot"], found["split"], found["source"]) == (5, "test", "gsm8k_test.jsonl")
    for sample in samples:
        *examples, _ = sample["context"].split("\n\n")
        assert len(examples) == 5 and all(example.startswith("Question: How much is") for example in examples)
    assert not caplog.records
    say(monkeypatch, [""])
    assert ask(model, folder, limit=1)[0]["n"] == 1
    with pytest.raises(UserError, match=r"gsm8k_train\.jsonl holds 7 items; 8 worked examples need more"):
        ask(model, folder, num_fewshot=8)


@pytest.mark.parametrize(("name", "record", "message"), [
    ("gsm8k_test.jsonl", {"question": "x", "answer": "no result"}, "line 1: field 'answer' has no '#### '"),
    ("gsm8k_test.jsonl", {"question": "x"}, "line 1: field 'answer' is missing"),
    ("gsm8k_train.jsonl", {"question": 3, "answer": "#### 1"}, "gsm8k_train.jsonl, line 1: field 'question' is int"),
])
def test_damaged_files_are_named(folder, name, record, message):
    save(folder / name, [record])
    with pytest.raises(UserError, match=message):
        read_task("gsm8k", folder)


@pytest.mark.parametrize(("settings", "expected"), [
    ({"until": ["Q:", ""], "do_sample": False, "temperature": 0.0}, (("Q:",), 256)),
    ({"until": "\n", "max_gen_toks": 7, "top_p": 0.95}, (("\n",), 7)), ({"max_tokens": 9}, ((), 9)),
    ({"do_sample": False, "temperature": 0.7}, ((), 256)),  # lm-eval: not sampled is greedy
    ({"do_sample": True, "temperature": 0.2}, "draws its texts at temperature 0.2; only greedy"),
    ({"temperature": 1.0}, "draws its texts at temperature 1.0"), ({"num_beams": 4}, "sets num_beams = 4")])
def test_settings_of_texts_are_read_as_lm_eval_does(settings, expected):
    if isinstance(expected, tuple):
        assert greedy(settings, "gsm8k") == expected
    else:
        with pytest.raises(UserError, match=f"gsm8k {expected}"):
            greedy(settings, "gsm8k")


def test_whole_texts_are_scored_in_windows(model):
    """lm-eval's rolling windows: each token once, given what stands before it in its window."""
    harness = HarnessModel(model)
    text = "the sum of what is said " * 60  # longer than the positions
    (total,) = harness.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert harness.requests == 2 and harness.truncated == 0
    ids = model.tokenizer.encode(text)
    first, rest = model.tokenizer.decode(ids[:1_024]), model.tokenizer.decode(ids[1_024:])
    parts = harness._loglikelihood_tokens([(None, [256], ids[:1_024]), (None, ids[len(ids) - 1_025: 1_024],
                                                                        ids[1_024:])])
    assert first + rest == text and total == pytest.approx(sum(score for score, _ in parts))


def test_tasks_that_cannot_be_run_are_refused():
    def task(**has):
        plain = {"OUTPUT_TYPE": "generate_until", "config": SimpleNamespace(generation_kwargs={})}
        return SimpleNamespace(**plain | has)

    tasks._check_served("x", task())
    for refused, message in ((task(OUTPUT_TYPE="images"), "is of type images; expected one of multiple_choice"),
                             (task(UNSAFE_CODE=True), "runs code that the model writes"),
                             (task(MULTIMODAL=True), "shows pictures"),
                             (task(config=SimpleNamespace(generation_kwargs={"do_sample": True})), "only greedy")):
        with pytest.raises(UserError, match=message):
            tasks._check_served("x", refused)
    known = SimpleNamespace(all_subtasks=["mmlu_law", "niah_single_1"], all_tasks=["mmlu", "mmlu_law", "niah_single_1"])
    for name, message in (("mmlu", "'mmlu' names several tasks of lm-eval's; name one of them: mmlu_law"),
                          ("niah_singel_1", r"no task 'niah_singel_1' \(did you mean niah_single_1\?\)")):
        with pytest.raises(UserError, match=message):
            tasks._check_known(name, known)


def test_the_command_writes_texts_and_reads_its_results_back(folder, monkeypatch):
    """Nothing is read of a model before the task is known to run; what is written can be read, item by item."""
    from l2a_jax.evaluation.options import Options

    say(monkeypatch, ["#### 3", "#### 4", ""])
    options = Options(source=TINY, tasks=("gsm8k",), num_fewshot=0, task_data=folder, out=folder / "out")
    found, path = evaluate.evaluate(options)
    assert found["tasks"]["gsm8k"]["scores"][SCORES[0]]["items"] == [1, 0, 0]
    assert (folder / "out" / "samples_gsm8k.jsonl").is_file()
    assert "gsm8k: exact_match,strict-match 0.333 +- 0.6" in evaluate.summary(found)
    assert results.read_results(path)["tasks"]["gsm8k"]["n"] == 3
    bad = json.loads(path.read_text())
    bad["tasks"]["gsm8k"]["scores"][SCORES[0]]["items"].pop()
    path.write_text(json.dumps(bad))
    with pytest.raises(UserError, match=r"task gsm8k: scores.exact_match,strict-match.items is a list of 2; expected"):
        results.read_results(path)
    monkeypatch.setattr(evaluate, "load_pretrained", lambda *given: pytest.fail("the weights were read"))
    (folder / "gsm8k_test.jsonl").unlink()
    with pytest.raises(UserError, match=r"holds no gsm8k_test\*.jsonl"):
        evaluate.evaluate(options)
    with pytest.raises(UserError, match="--tasks: pruning is asked for by flags of its own"):
        evaluate.set_up(Options(source=TINY, tasks=("pruning",)))


def test_a_task_without_a_name_here_is_lm_evals():
    assert registry.find("mmlu_law") == registry.LM_EVAL and registry.of_lm_eval("gsm8k")
    assert not registry.of_lm_eval("needle")
