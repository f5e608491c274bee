"""Training over a mesh: the numbers of one device, whatever the mesh; and no device holds what another one does."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.sharding.steps import CASES, DEVICES

WHOLE = ("layers/router/hidden/bias", "layers/router/hidden/out")
"""Of three hidden units, which eight devices cannot be given equal parts of."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("mesh") / "found.json"
    done = subprocess.run([sys.executable, "-m", "tests.sharding.steps", str(file)], text=True, capture_output=True,
                          cwd=pathlib.Path(__file__).resolve().parents[2], env=dict(os.environ))
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize(("name", "axes"), [(name, axes) for name, case in CASES.items() for axes in case.meshes])
def test_a_mesh_trains_what_one_device_trains(found, name, axes):
    told = found["cases"][name][axes]
    assert told["told"] < 2e-6 and told["gradient"] < 2e-6
    # Of some leaves it is the difference of far larger terms, above all of the bias of keys, which softmax ignores.
    assert max(told["gradients"].values()) < 4e-6, told["gradients"]
    assert max(told["parameters"].values()) < 1e-6, told["parameters"]


def test_routing_was_uneven_everything_and_nothing(found):
    local = {name: case["local"] for name, case in found["cases"].items()}
    assert {*local["everything routed"]} == {0.0} and min(local["nothing routed"]) > 1 - 1e-6
    assert all(0.2 < share < 0.8 for share in local["everything trained"])


@pytest.mark.parametrize("name", CASES)
def test_each_device_holds_its_part_of_every_leaf(found, name):
    for axes in CASES[name].meshes:
        told, devices = found["cases"][name][axes], int(axes.split("=")[1])
        assert {path for path, parts in told["parts"].items() if parts != devices} <= {*WHOLE}
        whole = sum(path in WHOLE for path in told["parts"])
        assert [parts for parts in told["parts of moments"] if parts != devices] == [1] * 2 * whole


def test_no_device_ever_holds_the_model(found):
    """Arguments are masters and two moments; weights gathered for one layer do not stay for the backward pass."""
    told = found["program"]
    assert told["arguments"] < 3.05 * told["model"] / DEVICES
    assert told["temporaries"] < told["model"] / 3
    assert told["collectives"] == ["all-gather", "reduce-scatter", "all-reduce"]


def test_shapes_alone_tell_what_a_device_holds(found):
    """What is stored exactly; what lives for a while on the high side."""
    told = found["program"]
    held = told["estimated"]
    stored = held["frozen"] + held["masters"] + held["optimizer"]
    assert abs(stored / told["arguments"] - 1) < 0.02
    assert told["temporaries"] < sum(held.values()) - stored < 4 * told["temporaries"]
