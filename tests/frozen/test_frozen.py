"""What a rebuild must not change: losses of every regime, logits of every wiring, counts, and the names of rows.

Bit for bit on the machines that the values were taken on (`cases.machine`), to the last digits of a float32 elsewhere.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.frozen import cases

FROZEN = json.loads(cases.VALUES.read_text())


def same(found: dict, kind: str, name: str) -> None:
    machines = FROZEN["machines"]
    here = machines.get(cases.machine())
    wanted = (here or next(iter(machines.values())))[kind][name]
    assert found.keys() == wanted.keys()
    for key, values in found.items():
        if here is not None:
            assert values == wanted[key], (name, key)
        else:
            np.testing.assert_allclose(values, wanted[key], rtol=2e-3, atol=2e-3, err_msg=f"{name}: {key}")


@pytest.mark.parametrize("name", cases.RUNS)
def test_losses(name, tmp_path):
    same(cases.losses(name, tmp_path / "run"), "losses", name)


@pytest.mark.parametrize("name", cases.LAYERS)
def test_logits(name):
    same(cases.logits(name), "logits", name)


def test_trained_parameters():
    assert cases.counts() == FROZEN["counts"]


def test_rows_of_the_study_are_known_by_the_same_hashes():
    assert cases.hashes() == FROZEN["hashes"]
