"""A run of rivals that was interrupted goes on: the same table, and nothing computed twice."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation.ruler_text import Item
from l2a_jax.files import claim
from l2a_jax.research.rivals import choices, compare, rows, search
from l2a_jax.research.rivals.options import RivalOptions
from l2a_jax.research.rivals.unfinished import NAME, Unfinished
from tests.research.rivals.conftest import RUN


class FakeTimes:
    """Times that are the same every time."""

    def __init__(self, *_):
        pass

    def prefill_ms(self, decisions):
        return 10 + decisions.mean()

    decode_ms = prefill_ms


@pytest.fixture(scope="module")
def options(texts, tmp_path_factory):
    """With RULER and times, both made up: the tiny run reads no prompts, and times are never the same."""
    with pytest.MonkeyPatch.context() as patch:
        prepare, item = compare.prepare, Item(np.arange(4, dtype=np.int32), ["a"])
        patch.setattr(compare, "prepare", lambda *given: prepare(*given)._replace(prompts={("niah", 4): [item] * 2}))
        patch.setattr(rows, "_ruler", lambda model, prepared, choice, passes: [
            ("niah 4", {"local": 1 - choice.density, "scores": [choice.density, float(choice.cut is not None)]})])
        patch.setattr(rows, "Times", FakeTimes)
        yield RivalOptions(source=str(RUN), **texts, local=(80.0,), context=128, max_windows=3, calibration_context=128,
                           calibration_windows=2, times=True, out=tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole(options):
    compare.compare(options)
    return found(options)


def found(options):
    """The table, but for when it was made."""
    assert not (options.out / NAME).exists() and not [*options.out.glob(".*")]
    return {key: value for key, value in json.loads((options.out / "rivals.json").read_text()).items()
            if key not in ("date", "command")}


def interrupted(options, patch, place, name, after, error=KeyboardInterrupt):
    """Run until a function of a module has been called so often."""
    real, calls = getattr(place, name), []

    def once(*given, **named):
        calls.append(named.get("label"))
        if len(calls) > after:
            raise error
        return real(*given, **named)

    with patch.context() as here, pytest.raises(error):
        here.setattr(place, name, once)
        compare.compare(options)
    assert not [*options.out.glob(".*")]
    return json.loads((options.out / NAME).read_text())


@pytest.fixture(scope="module")
def cut_off(options, tmp_path_factory):
    """A run that was interrupted four times: in both searches, in a scoring and in the search of a cut."""
    options = dataclasses.replace(options, out=tmp_path_factory.mktemp("parts"))
    patch = pytest.MonkeyPatch
    assert set(interrupted(options, patch, search.Losses, "__call__", 1)) == {"question", "rates", "none", "all",
                                                                               "layers"}
    assert len(interrupted(options, patch, search.Losses, "__call__", 3)["heads"]) >= 1
    rows_ = interrupted(options, patch, rows, "score_windows", 1)["rows"]  # the router's own is scored anew
    assert [row["name"] for row in rows_] == ["learned"]
    rows_ = interrupted(options, patch, choices, "score_windows", 1, RuntimeError)["rows"]
    assert len(rows_) >= 1
    return options


def test_it_goes_on_exactly(options, whole, cut_off, tmp_path, caplog, monkeypatch):
    again = dataclasses.replace(cut_off, out=tmp_path)
    shutil.copy(cut_off.out / NAME, tmp_path)
    done = len(json.loads((tmp_path / NAME).read_text())["rows"])
    monkeypatch.setattr(rows, "greedy", lambda losses, count, label, before, keep: [tuple(unit) for unit in before])
    with caplog.at_level(logging.INFO, "l2a_jax.rivals"):
        result, _ = compare.compare(again)
    assert f"{tmp_path / NAME}: goes on from there; rows that are finished: {done}" in caplog.text
    assert found(again) == whole
    assert result["rows"] == whole["rows"] and "ruler_behind" in whole["rows"][1] and whole["rows"][1]["prefill_ms"]


@pytest.mark.parametrize(("change", "said"), [
    ({"context": 64}, "context is 128 there and 64 here; text is "),
    ({"max_windows": 2}, "text is '.*' there and '.*' here"),
    ({"calibration_windows": 1}, "calibration is "),
    ({"local": (80.0, 90.0)}, r"local is \[80.0\] there and \[80.0, 90.0\] here"),
    ({"dtype": "bfloat16"}, "dtype is 'float32' there and 'bfloat16' here"),
    ({"backend": "reference"}, "backend is 'auto' there and 'reference' here"),
    ({"times": False}, "times is True there and False here"),
])
def test_another_question_is_refused(cut_off, change, said):
    before = (cut_off.out / NAME).read_bytes()
    with pytest.raises(UserError, match=rf"{NAME} is of another question: {said}.*take the file away .* another --out"):
        compare.compare(dataclasses.replace(cut_off, **change))
    assert (cut_off.out / NAME).read_bytes() == before


@pytest.mark.parametrize(("key", "value"), [
    ("source_hash", "another"), ("device", "1 x another"), ("prompts", "others"), ("mesh", [2, 1]),
    ("revision", "another"), ("batch_tokens", 1), ("version of jax", "0.1"), ("more", 1)])
def test_what_was_found_otherwise_is_refused(cut_off, tmp_path, key, value):
    held = json.loads((cut_off.out / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(held | {"question": held["question"] | {key: value}}))
    with pytest.raises(UserError, match=rf"{NAME} is of another question: {key} is {value!r}".replace("[", r"\[")):
        compare.compare(dataclasses.replace(cut_off, out=tmp_path))


@pytest.mark.parametrize(("change", "said"), [
    (lambda held: "{", "is not readable JSON"),
    (lambda held: json.dumps({}), "question is missing"),
    (lambda held: json.dumps(held | {"rows": [held["rows"][0] | {"sums": None}]}), r"rows\[0\].sums is null"),
    (lambda held: json.dumps(held | {"layers": [["a"]]}), r"layers\[0\]"),
])
def test_a_damaged_file_is_refused_before_weights_are_read(cut_off, tmp_path, change, said, monkeypatch):
    monkeypatch.setattr(compare, "load_pretrained", lambda *_: pytest.fail("weights were read"))
    text = change(json.loads((cut_off.out / NAME).read_text()))
    (tmp_path / NAME).write_text(text)
    with pytest.raises(UserError, match=rf"{NAME}.*{said}.*take the file away to begin anew, or give another --out"):
        compare.compare(dataclasses.replace(cut_off, out=tmp_path))
    assert (tmp_path / NAME).read_text() == text


def test_numbers_come_back_as_they_were(tmp_path):
    sums = np.array([[0.1, 1 / 3], [np.nan, 1e-17]])
    row = {"name": "learned", "target": 0.25, "own": True, "density": 0.2, "density_beyond": 0.3, "kept": None,
           "kept_95": None, "sums": sums}
    kept = Unfinished(tmp_path)
    kept.ask({"a": (1, 2)})
    kept.keep(rates=np.array([0.1, 0.7]), rows=[row])
    again = Unfinished(tmp_path)
    again.ask({"a": [1, 2]})
    np.testing.assert_array_equal(np.array(again.rows[0]["sums"]), sums)
    assert again.parts["rates"] == [0.1, 0.7]
    again.expect([("learned", 0.25), ("random", 0.25)])
    with pytest.raises(UserError, match="the rows are not those of its question"):
        again.expect([("random", 0.25)])


def test_one_process_at_a_time(cut_off):
    with claim(cut_off.out / ".rivals.lock"), pytest.raises(UserError, match="are being written by process"):
        compare.compare(cut_off)
