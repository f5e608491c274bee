"""Training over a mesh: the numbers of one device, whatever the mesh; and no device holds what another one does."""

from __future__ import annotations

import pytest

from l2a_jax.errors import UserError
from l2a_jax.sharding.axes import parse
from l2a_jax.training.tables import REGIMES
from tests.sharding.steps import CASES, DEVICES, MESHES, STEPS

WHOLE = ("layers/router/hidden/bias", "layers/router/hidden/out")
"""Of three hidden units, which eight devices cannot be given equal parts of."""


MEASURED = "tests.sharding.steps"


def test_every_regime_that_trains_is_compared_under_every_mesh():
    wholly = {case.regime for case in CASES.values() if case.meshes == MESHES}
    assert wholly == {regime for regime, groups in REGIMES.items() if groups} and STEPS == 20


@pytest.mark.parametrize(("name", "axes"), [(name, axes) for name, case in CASES.items() for axes in case.meshes])
def test_a_mesh_trains_what_one_device_trains(found, name, axes):
    told = found["cases"][name][axes]
    assert told["told"] < 1e-6 and told["gradient"] < 1e-6
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
        told, devices = found["cases"][name][axes], parse(axes).devices
        assert {path for path, parts in told["parts"].items() if parts != devices} <= {*WHOLE}
        whole = sum(path in WHOLE for path in told["parts"])
        assert [parts for parts in told["parts of moments"] if parts != devices] == [1] * 2 * whole


def test_no_device_ever_holds_the_model(found):
    """Arguments are masters and two moments; weights gathered for one layer do not stay for the backward pass."""
    told = found["program"]
    assert told["arguments"] < 3.05 * told["model"] / DEVICES
    assert told["temporaries"] < told["model"] / 3


def test_shapes_alone_tell_what_a_device_holds(found):
    """What is stored exactly; what lives for a while on the high side."""
    told = found["program"]
    held = told["estimated"]
    stored = held["frozen"] + held["masters"] + held["optimizer"]
    assert abs(stored / told["arguments"] - 1) < 0.02
    assert told["temporaries"] < sum(held.values()) - stored < 4 * told["temporaries"]


def test_only_weights_keys_and_values_are_gathered(found):
    """The weights of one layer at a time, keys and values in stripes, and ids of documents; gradients come back in
    parts, and only a step's few numbers as a whole."""
    told = found["program"]
    weights = {tuple(shape[path.startswith("layers/"):]) for path, shape in told["shapes"].items()}
    moved = {(name, dtype): {tuple(shape) for kind, of, shape in told["moved"] if (kind, of) == (name, dtype)}
             for name, dtype, _ in told["moved"]}
    keys = {shape for shape in moved["all-gather", "f32"] - weights if shape[-2:] == (2, 64)}
    assert moved.pop(("all-gather", "f32")) == weights | keys and len(keys) == 1
    assert {len(shape) for shape in moved.pop(("all-gather", "s32"))} == {4}
    assert max(len(shape) for shape in moved.pop(("all-reduce", "f32"))) <= 1
    moved.pop(("all-reduce", "s32"), None)
    assert [*moved] == [("reduce-scatter", "f32")]


def test_gradients_of_masters_are_summed_in_float32(found):
    """Weights still come in bfloat16, all but the router's."""
    told = found["sums"]
    assert told["scattered"] == ["f32"] and told["sum"] == [256.0 + DEVICES - 1] * DEVICES
    assert told["gathered"] == ["bf16", "f32"]


def test_held_out_rows_are_scored_alike_and_nobody_sees_the_future_or_another_document(found):
    told = found["scored"]
    (row, token), document = told["at"], told["document"]
    assert told["nll"] < 1e-6 and told["same"]
    assert told["moved"] == [[row, later] for later in document if later >= token] and min(document) < token


def test_a_state_is_read_onto_another_mesh_bit_for_bit(found):
    assert found["restored"] == {"data=2,context=4": [True, 8], "data=1": [True, 1], "None": [True, 1]}


def test_a_run_goes_on_over_another_mesh(found):
    told = found["resumed"]
    assert told["recorded"] == "data=2,context=4" and len(told["before"]) == 4
    assert told["after"][:2] == told["before"][:2]
    assert told["after"] == pytest.approx(told["before"], rel=1e-6)


def test_a_mesh_that_does_not_fit_is_refused(found):
    assert found["refused"] == {
        "data=16": "--mesh data=16,context=1 takes 16 devices; this machine has 8",
        "data=3": "--mesh data=3,context=1 deals rows over 3 devices; expected a --batch-size that 3 divides, and it "
                  "is 16",
        "context=5": "--mesh data=1,context=5 deals the tokens of a row over 5 devices; expected a --seq-len that 5 "
                     "divides, and it is 128",
    }


@pytest.mark.parametrize("text", ["", "data", "data=", "data=0", "data=x", "rows=2", "data=2,data=2", "data=2;data=2"])
def test_what_is_no_mesh_is_refused(text):
    with pytest.raises(UserError, match=r"^--mesh is .*; expected data=N, context=N or both, such as data=2,context=4"):
        parse(text)
