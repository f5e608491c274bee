"""`--tasks ruler` as a user runs it: answers decoded one by one, controls, what a rerun skips, and what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.errors import UserError
from l2a_jax.evaluation import evaluate, ruler, ruler_source, ruler_text
from l2a_jax.evaluation.options import OPENED, Options
from l2a_jax.evaluation.ruler_text import build
from l2a_jax.models.params import add_routing, init_params, map_with_path
from l2a_jax.models.transformer import forward
from l2a_jax.sources import TINY, load_pretrained
from l2a_jax.weights.export import save_pretrained
from tests.evaluation.ruler_cases import prose, small_tokenizer

CONFIG = ModelConfig(512, 16, 24, 2, 2, 1, 8, max_positions=1_024)
LAYER = L2AConfig(window=16, sinks=2)
TASKS = ("niah_single_1", "niah_multiquery")
SHORT = {"niah_single_1": 6, "niah_multiquery": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A routed model of random weights, whose router sends about half the tokens each way, and a novel beside it."""
    place = tmp_path_factory.mktemp("ruler")
    params = add_routing(init_params(CONFIG, jax.random.key(0)), CONFIG, LAYER)

    def louder(path, leaf):
        noise = jax.random.normal(jax.random.key(sum(map(ord, path))), leaf.shape)
        return noise if "router" in path else leaf * 2 if "kernel" in path else leaf

    save_pretrained(place / "routed", map_with_path(louder, params), CONFIG, LAYER, small_tokenizer())
    save_pretrained(place / "plain", init_params(CONFIG, jax.random.key(0)), CONFIG, None, small_tokenizer())
    (place / "novel.txt").write_text(prose(6_000))
    return place


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """A few tokens to write, not 128."""
    whole = ruler_source.settings

    def settings(task):
        return whole(task)._replace(new_tokens=SHORT.get(task, 6))

    monkeypatch.setattr(ruler_source, "settings", settings)
    monkeypatch.setattr(ruler_text, "settings", settings)


def options(folder, out, **changes):
    given = {"ruler_tasks": TASKS, "ruler_items": 2, "lengths": (700,), "dtype": "float32", "controls": ("learned",),
             "needle": {"haystack": (str(folder / "novel.txt"),)}, "batch_tokens": 1_400}
    return Options(str(folder / "routed"), ("ruler",), out=out, **given | changes)


def literal(model, tokens, new, decisions):
    """Greedy decoding by full passes over the growing row: decisions forced in the prompt, the router's own after, if
    there are none for what is written."""
    tokens, count = list(tokens), len(tokens)
    size = count + new
    fixed = np.zeros((CONFIG.num_layers, 1, size), bool)
    if decisions is not None:
        fixed[:, 0, : decisions.shape[1]] = decisions
    written = []
    for step in range(new):
        row = np.zeros((1, size), np.int32)
        row[0, : len(tokens)] = tokens
        if decisions is None:
            logits = _whole(model, row)[0]
        else:
            place = len(tokens) - 1
            for layer in range(CONFIG.num_layers if step and decisions.shape[1] == count else 0):
                fixed[layer, 0, place] = np.asarray(_whole(model, row, fixed)[1].logits)[layer, 0, place] >= 0
            logits = _whole(model, row, fixed)[0]
        tokens.append(int(np.argmax(np.asarray(logits)[0, len(tokens) - 1])))
        if tokens[-1] in model.tokenizer.end_ids:
            break
        written.append(tokens[-1])
    return model.tokenizer.decode(written, skip_special_tokens=True)


def prompt_decisions(model, chosen, prepared, task):
    """The router's own decisions in the prompts of 700 tokens."""
    items = [build(task, 700, number, 0, prepared.made_of, prepared.units[task, 700]) for number in range(2)]
    return ruler.write(model, items, task, 700, chosen).decisions


def _whole(model, row, decisions=None):
    return _forward(model.params, row, decisions)


_forward = jax.jit(lambda params, row, decisions: forward(params, row, CONFIG, LAYER, decisions=decisions,
                                                          backend="reference"))


def test_cells_are_literal_decoding_under_each_control(folder, tmp_path):
    controls = ("all", "none", "shuffled", "static", "question", "answer")
    out = tmp_path / "new"
    chosen = options(folder, out, controls=controls, log_samples=True)
    found, _ = evaluate.evaluate(chosen)
    entry = found["tasks"]["ruler"]
    model = load_pretrained(folder / "routed", jnp.float32)
    prepared = ruler.prepare("ruler", chosen, model)
    samples = [json.loads(line) for line in (out / ruler.SAMPLES).read_text().splitlines()]
    assert len(entry["cells"]) == 2 * 7 and len(samples) == 2 * 7 * 2
    for task in TASKS:
        cells = {cell["control"]: cell for cell in entry["cells"] if cell["task"] == task}
        assert next(iter(cells)) == "learned" and len({cell["prompts"] for cell in cells.values()}) == 1
        assert cells["all"]["local_share"] == 0 and cells["none"]["local_share"] == 1
        learned = cells["learned"]["local"]
        assert all(0.05 < one < 0.95 for one in learned)
        assert np.allclose(cells["shuffled"]["local"], learned, atol=1e-4)
        assert cells["static"]["local_share"] == pytest.approx(cells["learned"]["local_share"], abs=0.05)
        own = prompt_decisions(model, chosen, prepared, task)
        for number, share in enumerate(own[:, :, :-OPENED["question"]].sum(axis=(0, 2))):
            routed = CONFIG.num_layers * OPENED["question"] + share
            assert cells["question"]["local"][number] == pytest.approx(1 - routed / own[:, 0].size, abs=1e-4)
        assert cells["answer"]["local"] == learned
        assert "difference" in cells["all"] and "difference" not in cells["learned"]
        for number in range(2):
            item = build(task, 700, number, 0, prepared.made_of, prepared.units[task, 700])
            shape = (CONFIG.num_layers, len(item.tokens))
            written = np.ones((shape[0], SHORT[task]), bool)
            opened = np.concatenate([own[:, number], written], axis=1)
            asked = opened.copy()
            asked[:, shape[1] - 64:] = True
            forced = {"learned": None, "all": np.ones(shape, bool), "none": np.zeros(shape, bool), "answer": opened,
                      "question": asked}
            for control, decisions in forced.items():
                key = task, control, number
                row = next(row for row in samples if (row["task"], row["control"], row["item"]) == key)
                assert row["written"] == literal(model, item.tokens.tolist(), SHORT[task], decisions)
                assert row["answers"] == item.answers
                assert row["score"] == ruler_source.score(task, item.answers, row["written"])
    overall = {row["control"]: row for row in entry["overall"]}
    assert overall["all"]["n"] == 4 and overall["all"]["tasks"] == 2 and len(overall["none"]["difference_95"]) == 2
    assert "% local" in evaluate.summary(found) and "niah_multiquery" in evaluate.summary(found)


def test_a_rerun_skips_what_is_there_and_adds_the_rest(folder, tmp_path, monkeypatch):
    computed = []
    whole = ruler.write

    def write(model, items, task, length, options, **given):
        computed.append((task, length, "decisions" in given))
        return whole(model, items, task, length, options, **given)

    monkeypatch.setattr(ruler, "write", write)
    first, _ = evaluate.evaluate(options(folder, tmp_path, log_samples=True))
    assert [one[:2] for one in computed] == [(task, 700) for task in TASKS]
    computed.clear()
    again, _ = evaluate.evaluate(options(folder, tmp_path, log_samples=True))
    assert not computed and again["tasks"]["ruler"]["cells"] == first["tasks"]["ruler"]["cells"]
    more, _ = evaluate.evaluate(options(folder, tmp_path, lengths=(600,), log_samples=True))
    entry = more["tasks"]["ruler"]
    assert [one[:2] for one in computed] == [(task, 600) for task in TASKS] and entry["lengths"] == [600, 700]
    assert entry["cells"][2:] == first["tasks"]["ruler"]["cells"]
    assert len((tmp_path / ruler.SAMPLES).read_text().splitlines()) == 8
    computed.clear()
    (tmp_path / ruler.SAMPLES).unlink()  # what has no samples is written again where they are asked for
    evaluate.evaluate(options(folder, tmp_path, log_samples=True))
    assert [one[:2] for one in computed] == [(task, 700) for task in TASKS]
    computed.clear()
    other, _ = evaluate.evaluate(options(folder, tmp_path, seed=1))
    assert len(computed) == 2 and other["tasks"]["ruler"]["lengths"] == [700]
    assert other["tasks"]["ruler"]["cells"][0]["prompts"] != entry["cells"][2]["prompts"]


def test_an_interruption_keeps_the_lengths_that_are_done(folder, tmp_path, monkeypatch):
    whole = ruler.write

    def write(model, items, task, length, options, **given):
        if length == 700:
            raise KeyboardInterrupt
        return whole(model, items, task, length, options, **given)

    monkeypatch.setattr(ruler, "write", write)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(options(folder, tmp_path, lengths=(700, 600)))
    entry = json.loads((tmp_path / "eval.json").read_text())["tasks"]["ruler"]
    assert entry["lengths"] == [600] and len(entry["cells"]) == 2 and entry["provenance"]["settings"]["seed"] == 0


def test_a_plain_model_has_one_row_of_cells(folder, tmp_path):
    found, _ = evaluate.evaluate(dataclasses.replace(
        options(folder, tmp_path, ruler_tasks=TASKS[:1]), source=str(folder / "plain")))
    (cell,) = found["tasks"]["ruler"]["cells"]
    assert cell["control"] == "plain" and "local_share" not in cell and cell["n"] == 2 == len(cell["written"])


def test_runs_are_compared_item_by_item_in_the_table():
    def entry(control, scores, prompts="same"):
        cells = [{"task": "vt", "length": length, "control": control, "score": sum(scores) / 4, "n": 4,
                  "scores": scores, "prompts": prompts + str(length), "written": []} for length in (4_096, 8_192)]
        return ruler._summary(cells)

    (column,), said = ruler.columns("ruler"), []
    cell = column.cell(entry("learned", [1.0, 0.0, 1.0, 1.0]), entry("plain", [1.0, 1.0, 1.0, 1.0]), said.append)
    assert cell["value"] == 0.75 and cell["n"] == 4 and cell["difference"]["value"] == -0.25 and not said
    text = column.text(cell, True)
    assert text.startswith("75.0 [") and "(n=4, 8,192 tokens; 75.0 at 4,096)<br>Δ -25.0 [" in text
    cell = column.cell(entry("learned", [1.0, 0.0, 1.0, 1.0]), entry("plain", [1.0] * 4, "other"), said.append)
    assert "difference" not in cell and "other prompts than the baseline's at 8192 tokens" in said[0]


@pytest.mark.parametrize(("changes", "message"), [
    ({"lengths": (2_048,)}, r"--lengths names 2048; .* has positions up to 1024"),
    ({"needle": {"haystack": ("recall",)}}, "--haystack recall has no prose"),
    ({"needle": {"haystack": ("/absent/novel.txt",)}}, "/absent/novel.txt is no file, folder or pattern"),
    ({"lengths": (120,)}, "a length of 120 is too short for RULER's niah_single_1"),
    ({"source": TINY}, "speaks the synthetic recall corpus alone"),
    ({"route": "none", "controls": ("all",)}, "--route none leaves no decision"),
    ({"ruler_tasks": ("niah",)}, "--ruler-tasks"), ({"controls": ("most",)}, "--controls"),
])
def test_bad_input_is_one_error_before_weights_are_read(changes, message, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_pretrained", None)
    source = changes.pop("source", None)
    chosen = options(folder, tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(chosen if source is None else dataclasses.replace(chosen, source=source))
    assert not list(Path(tmp_path).iterdir())


def test_a_plain_model_has_no_controls(folder, tmp_path):
    chosen = dataclasses.replace(options(folder, tmp_path, controls=("static",)), source=str(folder / "plain"))
    with pytest.raises(UserError, match=r"--controls static stands beside learned decisions; .* is a plain model"):
        evaluate.evaluate(chosen)


def test_without_a_network_the_published_essays_are_refused(folder, tmp_path, monkeypatch):
    from l2a_jax.data import text

    monkeypatch.setattr(text, "HUB_SECONDS", 1)
    import huggingface_hub

    def unreachable(*given, **more):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(UserError, match=r"paul_graham_essays cannot be read .* give local files: --haystack FILE"):
        evaluate.evaluate(options(folder, tmp_path, needle={}))
