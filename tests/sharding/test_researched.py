"""Experiments over a mesh: the numbers of one device."""

from __future__ import annotations

import pytest

from l2a_jax.errors import UserError
from l2a_jax.research.replication.session import Session
from l2a_jax.research.rivals.compare import compare
from l2a_jax.research.rivals.options import RivalOptions

MEASURED = "tests.sharding.researched"


def test_a_row_of_the_study_is_what_it_is_on_one_device(found):
    one, other = (found["study"][mesh] for mesh in ("None", "data=2"))
    assert (one["mesh"], other["mesh"]) == (None, "data=2") and len(one["losses"]) == 3
    assert other["hash"] == one["hash"]
    for name in ("losses", "held out", "stream"):
        assert other[name] == pytest.approx(one[name], rel=1e-5), name
    assert other["nats"] == pytest.approx(one["nats"], abs=2e-4)  # they are rounded to four places


def test_rivals_are_what_they_are_on_one_device(found):
    one, other = (found["rivals"][mesh] for mesh in ("None", "data=2"))
    assert other["worth"] == pytest.approx(one["worth"], rel=1e-5)
    assert other["layers"] == one["layers"] and other["heads"] == one["heads"]
    assert [*other["rows"]] == [*one["rows"]] and "oracle 0.1000" in one["rows"]
    for name, sums in one["rows"].items():
        assert other["rows"][name] == pytest.approx(sums, abs=2e-4), name  # they are rounded to four places


def test_a_mesh_that_cannot_be_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match="--mesh data=4096,context=1 takes 4096 devices; this machine has"):
        Session({}, "nowhere", mesh="data=4096,context=1")
    given = {"source": "nowhere", "text": "nowhere", "calibration": "nowhere"}
    with pytest.raises(UserError, match="--mesh data=4096,context=1 takes 4096 devices; this machine has"):
        compare(RivalOptions(**given, mesh="data=4096,context=1"))
    with pytest.raises(UserError, match="--times measures one device, and --mesh is data=2,context=1"):
        compare(RivalOptions(**given, mesh="data=2,context=1", times=True))
