"""lm-eval's tasks over local files and a tiny model: prompts, metrics, few-shot examples, and what is refused."""

import json
import math

import jax
import numpy as np
import pytest
from tokenizers import AddedToken

from l2a_jax.config import ModelConfig
from l2a_jax.errors import UserError
from l2a_jax.evaluation.task_files import read_task
from l2a_jax.evaluation.tasks import evaluate_tasks
from l2a_jax.models.params import init_params
from l2a_jax.sources import Pretrained
from l2a_jax.weights.tokenizer import byte_level_bpe
from tests.evaluation.byte_tokenizer import byte_tokenizer

CONFIG = ModelConfig(260, 16, 24, 1, 2, 1, 8, max_positions=512)

HELLASWAG = [{"activity_label": "Baking", "ctx_a": "A cook stands [title] there.", "ctx_b": "she", "label": 1,
              "endings": ["sings  loudly.", "[step] bakes.", "runs off.", "waits."]},
             {"activity_label": "Rowing", "ctx_a": "Two men row.", "ctx_b": "they", "label": 3,
              "endings": ["stop.", "sink [x] fast.", "row on and on.", "win."]}]
PIQA = [{"goal": "open a jar", "sol1": "twist the lid", "sol2": "paint the lid"},
        {"goal": "dry a cup", "sol1": "drop it", "sol2": "wipe it with a cloth"},
        {"goal": "cool tea", "sol1": "wait", "sol2": "boil it"}]
ARC = [{"id": "a", "question": "What is wet?", "choices": ["sand", "rain", "air"], "label": 1},
       {"id": "b", "question": "What is hot?", "choices": ["ice", "snow", "fire", "mud", "dew"], "label": 2}]


@pytest.fixture(scope="module")
def model():
    params = jax.tree.map(lambda x: x * 3, init_params(CONFIG, jax.random.key(0)))
    return Pretrained(CONFIG, None, params, byte_tokenizer(), "")


def write(folder, hellaswag=HELLASWAG, piqa=PIQA, labels=("0", "1", "0"), arc=ARC):
    for name, records in (("hellaswag_val", hellaswag), ("piqa_valid", piqa), ("arc_challenge_validation", arc)):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "piqa_valid-labels.lst").write_text("\n".join(labels) + "\n")
    return folder


def samples(folder, name):
    return [json.loads(line) for line in (folder / f"samples_{name}.jsonl").read_text().splitlines()]


def test_prompts_scores_and_metrics(model, tmp_path):
    out = tmp_path / "out"
    results = evaluate_tasks(model, ("piqa", "hellaswag", "arc_challenge"), limit=None, num_fewshot=None,
                             task_data=write(tmp_path), log_samples=out)
    assert list(results) == ["piqa", "hellaswag", "arc_challenge"]
    assert json.loads(json.dumps(results)) == results
    piqa, hellaswag, arc = (samples(out, name) for name in results)
    assert piqa[1]["context"] == "Question: dry a cup\nAnswer:"
    assert piqa[1]["continuations"] == [" drop it", " wipe it with a cloth"] and piqa[1]["target"] == 1
    assert hellaswag[0]["context"] == "Baking: A cook stands. there. She"  # the brackets are HellaSwag's own debris
    assert hellaswag[0]["continuations"] == [" sings loudly.", "  bakes.", " runs off.", " waits."]
    assert arc[0]["context"] == "Question: What is wet?\nAnswer:" and arc[0]["target"] == 1
    assert [len(one["continuations"]) for one in arc] == [3, 5]
    # the metrics once more, by hand: acc_norm divides by characters of the choice, without the space before it
    for name, rows in zip(results, (piqa, hellaswag, arc), strict=True):
        best = [int(np.argmax(one["log_likelihoods"])) == one["target"] for one in rows]
        normed = [int(np.argmax([score / (len(text) - 1) for score, text in
                                 zip(one["log_likelihoods"], one["continuations"], strict=True)])) == one["target"]
                  for one in rows]
        found = results[name]
        assert found["correct"] == best and found["correct_norm"] == normed
        for metric, values in (("acc", best), ("acc_norm", normed)):
            assert found[metric] == pytest.approx(np.mean(values))
            error = np.std(values, ddof=1) / math.sqrt(len(values))
            assert found[f"{metric}_stderr"] == pytest.approx(error)
        assert (found["n"], found["num_fewshot"], found["limit"], found["version"]) == (len(rows), 0, None, 1.0)
        assert found["split"] == "validation" and found["source"].endswith(".jsonl")
        assert found["prefix_token"] == {"id": 256, "text": "<|endoftext|>"}
        assert found["requests_cut_from_the_left"] == 0
        assert all(math.isfinite(score) and score < 0 for one in rows for score in one["log_likelihoods"])


def test_limit_and_fewshot_examples_from_the_same_file(model, tmp_path):
    write(tmp_path)
    for name, total in (("piqa", 2), ("arc_challenge", 1)):
        result = evaluate_tasks(model, (name,), limit=total, num_fewshot=1, task_data=tmp_path, log_samples=tmp_path)
        assert (result[name]["n"], result[name]["limit"], result[name]["num_fewshot"]) == (total, total, 1)
        for one in samples(tmp_path, name):
            example, question = one["context"].split("\n\n")
            assert question.endswith("\nAnswer:") and example.split("\n")[0] != question.split("\n")[0]
    with pytest.raises(UserError, match="holds 2 items; 2 worked examples beside the question need more"):
        evaluate_tasks(model, ("arc_challenge",), limit=1, num_fewshot=2, task_data=tmp_path)


def test_a_question_longer_than_the_model_is_cut_and_counted(model, tmp_path):
    long = [{**PIQA[0], "goal": "very " * 200}, PIQA[1]]
    result = evaluate_tasks(model, ("piqa",), limit=None, num_fewshot=None,
                            task_data=write(tmp_path, piqa=long, labels=("0", "1")))
    assert result["piqa"]["requests_cut_from_the_left"] == 2


def test_encoding_follows_lm_eval(model):
    """The batch encoder against TemplateLM's own method: spaces at the end of the context, an empty context."""
    from l2a_jax.evaluation.harness import HarnessModel

    harness = HarnessModel(model)
    pairs = [("The end", " is near"), ("The end ", "is near"), ("A\n\n", "b"), ("same", " x"), ("same", " y")]
    for pair, found in zip(pairs, harness.encode_pairs(pairs), strict=True):
        assert (found.context, found.continuation) == harness._encode_pair(*pair)
    (bare, prefixed) = harness.encode_pairs([("", "ab"), ("", "<|endoftext|>ab")])
    assert bare == ([256], harness.tok_encode("ab"))
    assert prefixed == ([256], harness.tok_encode("ab"))


MERGED = {"merged into the context": ("Ans", "wer"), "empty": ("A", ""), "nothing at all": ("", ""),
          "the prefix token alone": ("", "<|endoftext|>"), "a context of spaces": ("  ", "x")}


@pytest.mark.parametrize("case", MERGED)
def test_a_pair_without_a_token_to_score_is_refused_as_lm_eval_does(model, case):
    """HFLM asserts that neither side is empty; a sum over no token would call it certain (0.0, greedy)."""
    from l2a_jax.evaluation.harness import HarnessModel

    letters = {letter: index for index, letter in enumerate(dict.fromkeys("AnswerĠx"))}
    merges, whole = [], "A"
    for letter in "nswer":
        merges.append((whole, letter))
        whole += letter
        letters[whole] = len(letters)
    tokenizer = byte_level_bpe(letters, merges, [AddedToken("<|endoftext|>", special=True, normalized=False)],
                               {"eos_token": "<|endoftext|>"}, normalise=True)
    harness = HarnessModel(model._replace(tokenizer=tokenizer), label="piqa")
    assert harness.encode_pairs([("Ans", "x")]) == [tuple(harness._encode_pair("Ans", "x"))]
    if MERGED[case][0]:
        assert [] in harness._encode_pair(*MERGED[case])
    with pytest.raises(UserError, match=r"piqa: in .* has no token of its own"):
        harness.encode_pairs([("Ans", "x"), MERGED[case]])


@pytest.mark.parametrize("change, name, message", [
    ({"hellaswag": [HELLASWAG[0], "{not json"]}, "hellaswag", r"hellaswag_val.jsonl, line 2 is not readable JSON"),
    ({"hellaswag": [{**HELLASWAG[0], "endings": "one"}]}, "hellaswag", r"line 1: field 'endings' is str 'one'"),
    ({"hellaswag": [{**HELLASWAG[0], "label": 4}]}, "hellaswag", r"line 1: the label is 4; .* from 0 to 3"),
    ({"piqa": [PIQA[0], {"goal": "x", "sol1": "y"}, PIQA[1]]}, "piqa", r"line 2: field 'sol2' is missing"),
    ({"labels": ("0", "1")}, "piqa", r"piqa_valid-labels.lst holds 2 labels; piqa_valid.jsonl has 3 items"),
    ({"labels": ("0", "one", "1")}, "piqa", r"line 2 of its labels: the label is 'one'"),
    ({"arc": [{**ARC[0], "choices": ["sand", ""]}]}, "arc_challenge", r"line 1: field 'choices' .* none empty"),
    ({"arc": [{**ARC[0], "label": True}]}, "arc_challenge", r"line 1: the label is True"),
])
def test_malformed_files_are_named_by_line(tmp_path, change, name, message):
    with pytest.raises(UserError, match=message):
        read_task(name, write(tmp_path, **change))


def test_missing_files(tmp_path, model):
    with pytest.raises(UserError, match=r"holds no hellaswag\*.jsonl \(also .gz\), which the task 'hellaswag' needs"):
        evaluate_tasks(model, ("hellaswag",), limit=None, num_fewshot=None, task_data=tmp_path)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        read_task("piqa", tmp_path / "nowhere")
    write(tmp_path)
    (tmp_path / "piqa_valid-labels.lst").unlink()
    with pytest.raises(UserError, match=r"piqa_valid-labels.lst is missing"):
        read_task("piqa", tmp_path)
    (tmp_path / "hellaswag_more.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="2 files for the task 'hellaswag'"):
        read_task("hellaswag", tmp_path)
    (tmp_path / "arc_challenge_validation.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"arc_challenge_validation.jsonl is empty"):
        read_task("arc_challenge", tmp_path)
    with pytest.raises(UserError, match="'mmlu' cannot be read from local files"):
        read_task("mmlu", tmp_path)


def test_from_the_hub(model, tmp_path, monkeypatch):
    """The same documents under the hub's splits give the same scores; ARC is asked from its test split there."""
    import datasets

    files = write(tmp_path)
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, name))
        task = "piqa" if "piqa" in path else "arc_challenge"
        rows = datasets.Dataset.from_list(read_task(task, files).documents)
        return {"train": rows.select([0]), "validation": rows, "test": rows.select([1])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = ("piqa", "arc_challenge")
    hub, local = (evaluate_tasks(model, names, limit=None, num_fewshot=None, task_data=data) for data in (None, files))
    assert asked == [("baber/piqa", None), ("allenai/ai2_arc", "ARC-Challenge")]
    assert {**hub["piqa"], "source": "", "seconds": 0} == {**local["piqa"], "source": "", "seconds": 0}
    assert hub["piqa"]["source"] == "baber/piqa" and hub["arc_challenge"]["source"] == "allenai/ai2_arc/ARC-Challenge"
    assert (hub["arc_challenge"]["split"], hub["arc_challenge"]["n"]) == ("test", 1)
    assert hub["arc_challenge"]["correct"] == local["arc_challenge"]["correct"][1:]

    def unreachable(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"data of piqa cannot be loaded from the hub \(ConnectionError: no route\); .*"
                                        r"--task-data"):
        evaluate_tasks(model, ("piqa",), limit=1, num_fewshot=None, task_data=None)
    with pytest.raises(UserError, match=r"data of arc_easy cannot be loaded .* \(ConnectionError: no route\)$"):
        evaluate_tasks(model, ("arc_easy",), limit=1, num_fewshot=None, task_data=None)


@pytest.mark.network
def test_the_hub_itself(model):
    result = evaluate_tasks(model, ("piqa",), limit=2, num_fewshot=None, task_data=None)
    assert result["piqa"]["n"] == 2 and result["piqa"]["source"] == "baber/piqa"


def test_bad_arguments(tmp_path, model):
    write(tmp_path)
    with pytest.raises(UserError, match="limit is 0 items"):
        evaluate_tasks(model, ("piqa",), limit=0, num_fewshot=None, task_data=tmp_path)
    with pytest.raises(UserError, match="num_fewshot is -1"):
        evaluate_tasks(model, ("piqa",), limit=1, num_fewshot=-1, task_data=tmp_path)
    with pytest.raises(UserError, match="has no tokenizer"):
        evaluate_tasks(model._replace(tokenizer=None), ("piqa",), limit=1, num_fewshot=None, task_data=tmp_path)
