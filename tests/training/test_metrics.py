"""`metrics.jsonl`: what is a record, what becomes of lines that are none, and numbers that are not finite."""

import errno
import json
import math

import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.files import native, plain
from l2a_jax.progress import progress
from l2a_jax.runs import folder as run_folder
from l2a_jax.training.metrics import MetricsLog, draw_curves, missing_steps, read_metrics, told


def line(step, **more):
    return json.dumps({"step": step, "loss": 1.0 + step, "tokens": 10, "tokens_per_second": 5.0, **more}).encode()


BAD = {
    "number": b"5", "list": b"[1]", "null": b"null", "text": b'"x"', "no keys": b"{}", "no loss": b'{"step": 2}',
    "no step": b'{"loss": 1}', "step a text": b'{"step": "2", "loss": 1}', "step a truth": b'{"step": true, "loss": 1}',
    "step a fraction": b'{"step": 2.5, "loss": 1}', "step below 0": b'{"step": -2, "loss": 1}',
    "loss a list": b'{"step": 2, "loss": [1]}', "loss a text": b'{"step": 2, "loss": "low"}',
    "speed a text": line(2, tokens_per_second="fast"), "layers a number": line(2, sparsity_per_layer=0.5),
    "cut": line(2)[:-5], "binary": b"\x00\xff\xfe\x80", "deep": b"[" * 5_000,
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_costs_itself_alone_and_is_said(name, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([line(1), BAD[name], line(3), line(4)]) + b"\n")
    assert [record["step"] for record in read_metrics(path)] == [1, 3, 4]
    assert f"{path}: 1 of 4 lines are no records and are left out (line 2)" in caplog.text
    records = MetricsLog(path, start=3)
    records.write({"step": 4, "loss": np.float32(2.0)})
    records.close()
    assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [1, 3, 4]
    assert missing_steps(read_metrics(path), 4) == "1 of 4 steps have no record (the first is step 2, the last 2)"


def test_a_last_line_that_a_killed_process_cut_is_dropped_without_a_word(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(line(1) + b"\n" + line(2)[:-4])
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert not caplog.text


def test_missing_empty_doubled_or_a_folder(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == [] and missing_steps([], 3).startswith("3 of 3 steps")
    assert missing_steps([], 0) is None
    path.write_bytes(b"")
    assert read_metrics(path) == []
    path.write_bytes(line(1) + b"\n" + line(2) + b"\n" + line(2, tokens=99) + b"\n")
    assert [record["tokens"] for record in read_metrics(path)] == [10, 99]
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read: Is a directory"):
        read_metrics(path)


def test_a_full_disk_is_one_sentence_and_the_lines_before_stay_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = MetricsLog(path, 0)
    records.write({"step": 1, "loss": 1.0})

    class Full:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, data):
            self._file.write(data[:7])
            raise OSError(errno.ENOSPC, "No space left on device")

    records._file = Full(records._file)
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left on device"):
        records.write({"step": 2, "loss": 1.0})
    records.close()
    assert path.read_bytes() == b'{"step": 1, "loss": 1.0}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), np.float32("nan")])
def test_a_number_that_is_not_finite_is_shown_drawn_written_and_read_back(value, tmp_path, capsys):
    record = native({"step": 3, "loss": value, "sparsity": value, "tokens_per_second": value, "held_out_loss": value,
                     "grad_norm": value, "sparsity_per_layer": np.array([0.5, value])})
    with progress("training", 3) as report:
        report(3, told(record, 3))
    assert f"held-out {value:.4f}" in capsys.readouterr().err
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write(record)
    log.close()
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)  # strict JSON
    again = read_metrics(tmp_path / "metrics.jsonl")
    assert isinstance(again[0]["held_out_loss"], float) and str(again[0]["held_out_loss"]) == str(float(value))
    draw_curves(again, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1_000
    run_folder.print_summary(tmp_path, {"held_out_loss": value, "held_out_perplexity": value,
                                        "held_out_sparsity": value})
    assert f"held-out loss {value:.4f} (perplexity {value:.2f})" in capsys.readouterr().out


def test_plain_is_native_but_for_numbers_that_are_not_finite():
    value = {"a": np.array([1.0, np.nan]), "b": (np.float32(2.5), [np.int64(3)]), "c": True, "d": None}
    assert plain(value) == {"a": [1.0, "nan"], "b": [2.5, [3]], "c": True, "d": None}
    assert math.isnan(native(value)["a"][1]) and native(value)["b"] == [2.5, [3]]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(figure, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(UserError, match=r"curves.png cannot be written: No space left on device"):
        draw_curves([], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("records", [[], [{"step": 1, "loss": 1.0}],
                                     [{"step": 1, "loss": 1.0, "grad_norm": "x"},
                                      {"step": 2, "loss": 1.0, "grad_norm": 1.0, "sparsity_per_layer": [0.5, 0.5]}]])
def test_curves_are_drawn_from_whatever_records_are_left(records, tmp_path, recwarn):
    draw_curves(records, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists() and not [w for w in recwarn if "legend" in str(w.message)]
