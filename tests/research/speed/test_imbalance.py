"""How evenly routed rows lie on devices: counted as a step counts it, and the command over a trained router."""

from __future__ import annotations

import json
import pathlib
import runpy

import numpy as np
import pytest

from l2a_jax.data.recall import RecallCorpus
from l2a_jax.research.speed import imbalance
from l2a_jax.sharding import stripes
from l2a_jax.sources import TINY, recall_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[3]
RUN = str(ROOT / "tests/frozen/folders/router_only")


def test_a_device_has_the_tokens_of_its_stripes():
    each = np.random.default_rng(0).random((3, 96))
    wanted = [[each[layer, stripes.places(96, 4, shard)].sum() for shard in range(4)] for layer in range(3)]
    np.testing.assert_allclose(imbalance.of_devices(each, 4), wanted)


def test_the_largest_part_is_taken_layer_by_layer():
    """Evenly in one layer, nothing in another, all on one device in a third; as `tests.sharding.striped` has it."""
    decisions = np.zeros((3, 64), bool)
    decisions[0] = True
    decisions[2, stripes.places(64, 4, 1)] = True
    found = imbalance.measure(decisions, 4)
    assert found["rows"] == pytest.approx((16 + 16) / (16 + 4)) and found["layer"] == 4
    assert found["rows_per_layer"] == [1, 0, 4] and found["stripe"] == 16
    keys = np.arange(1, 65)[stripes.places(64, 4, 3)].sum(), np.arange(1, 65)[stripes.places(64, 4, 1)].sum()
    assert found["keys"] == pytest.approx(4 * (keys[0] + keys[1]) / (64 * 65 / 2 + keys[1]))
    assert imbalance.measure(np.zeros((2, 64), bool), 2)["rows"] == 1


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setattr(imbalance, "LENGTHS", (64,))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    tokens = next(iter(RecallCorpus(128, 2).held_out(1))).tokens
    (tmp_path / "text.txt").write_text(" ".join(recall_tokenizer().decode(row.tolist()) for row in tokens))
    return lambda *flags: runpy.run_path(str(ROOT / "eval" / "speed.py"))["main"](["--imbalance", *flags])


def test_the_command_reads_a_text_with_a_trained_router(command, tmp_path):
    assert command(RUN, "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path)) == 0
    found = json.loads((tmp_path / "imbalance.json").read_text())["cases"]["router_only, text.txt, 64"]
    assert 0 < found["routed"] < 1 and [*found["devices"]] == ["2", "4", "8"]
    assert all(1 <= one["rows"] <= int(devices) for devices, one in found["devices"].items())
    assert "| router_only, text.txt, 64 |" in (tmp_path / "imbalance.md").read_text()


def test_what_cannot_be_measured_is_said(command, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("copper .")
    for flags, said in (((RUN,), "--imbalance needs --text FILE"),
                        ((RUN, "--text", str(tmp_path / "short.txt")), "tokens; expected more than 64"),
                        ((TINY, "--text", str(tmp_path / "text.txt")), "--imbalance: this is a plain model")):
        assert command(*flags) == 2
        assert said in capsys.readouterr().err


def test_what_was_measured_is_cheaper_than_dealing_rows_anew():
    """What `sharding/attention.py` and SCALE.md say: dealing costs a hundredth of what every token's global attention
    takes at 131,072 tokens, and of shorter rows more, for each row costs as much and does less."""
    cases = json.loads((ROOT / "eval/results/imbalance.json").read_text())["cases"]
    for name, case in cases.items():
        length = int(name.rsplit(",", 1)[1])
        for found in case["devices"].values():
            assert case["routed"] * (max(found["keys"], found["rows"]) - 1) < 0.01 * 131_072 / length / 2, name
            assert found["keys"] < (1.15 if length == 32_768 else 1.31), name
    long = cases["ask-32k, novel.txt, 32768"]
    assert [round(long["devices"]["8"][name], 2) for name in ("rows", "keys")] == [1.09, 1.13]
    assert round(long["routed"] * (long["devices"]["8"]["keys"] - 1), 3) == 0.013 and round(long["routed"], 2) == 0.11
