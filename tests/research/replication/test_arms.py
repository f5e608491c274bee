"""Arms that wait for a machine: each one's row, at the size of the tiny model, is trained and measured in seconds."""

import dataclasses

import numpy as np
import pytest

from l2a_jax.research.replication import arms, report, runner, trained
from l2a_jax.research.replication.row import BENCHMARKS
from l2a_jax.research.replication.rows import choose
from l2a_jax.training.settings import Settings
from tests.research.replication.conftest import LAYER, QUICK
from tests.research.replication.test_findings import RESULTS

TINY = {name: value for name, value in LAYER.items() if name != "window"}


def tiny(name, **given):
    """The declared row at the sizes of the tests, asked what the packaged model can answer."""
    row = choose((name,))[0]
    own = {key: value for key, value in row.given if key not in ("tokens", *TINY)}
    if "window" in own:
        own["window"] = LAYER["window"]
    measures = dataclasses.replace(QUICK, tasks=tuple(task for task in row.measures.tasks if task not in (
        *BENCHMARKS, "contexts", "collapse")), controls=False)
    return dataclasses.replace(row, size="0.5b", given=tuple({**own, **TINY, **given}.items()),
                               data=("notes={data}/train",), measures=measures, baseline=None)


def test_every_arm_is_declared_in_the_order_of_what_it_decides():
    waiting = choose(groups=tuple(arms.GROUPS))
    assert {row.group for row in waiting} == set(arms.GROUPS)
    shown = {row["name"]: row for row in report.collect(RESULTS / "rows")["rows"]}
    assert not any("device" not in shown[row.name] for row in waiting if row.name in shown)


def test_a_dry_run_says_what_an_arm_costs(session):
    rows = [tiny("norms_only-s0"), tiny("layer-w256-p0.1-l1")]
    *lines, last = runner.dry_run(rows, session).splitlines()
    assert lines[0].startswith("norms_only-s0: 192 trained, 1,") and "a trained parameter" in lines[0]
    assert any("--regime router_only" in line and "--window 12" in line for line in lines)
    assert last.startswith("in all 2 rows, 3,") and last.endswith("about 2 min")


def test_norms_are_trained_without_a_router(session, tmp_path):
    row = tiny("norms_only-s0")
    assert runner.run_rows([row], session, tmp_path) == ([], [])
    found = runner.read_row(tmp_path / f"{row.name}.json")
    assert found["training"]["trained_parameters"] == 3 * 64 and "sparsity_last_step" not in found["training"]
    assert set(found["evaluations"]) == {"perplexity", "needle"} and found["status"] == "done"
    assert "sparsity" not in found["evaluations"]["perplexity"]["result"]
    params = trained.load_masters(session, row, tmp_path / f"{row.name}.npz")
    start = session.base("0.5b").params
    moved = {name: bool((np.asarray(params["layers"][name]["scale"]) != start["layers"][name]["scale"]).any())
             for name in ("norm_attention", "norm_mlp")}
    assert moved == {"norm_attention": True, "norm_mlp": False} and "router" not in params["layers"]


def test_twins_differ_from_the_rows_that_they_explain_in_routing_alone():
    """The same tokens, rate, text and seed; what is routed is not of a plain model."""
    for name, twin in (("norms_only-s0", "repair-w256-p0.3-s0"),
                       ("norms_only-t8192-e1-s1", "repair-t8192-w1024-p0.5-f0.3-e1-s1"),
                       ("norms_only-1.5b", "repair-w256-p0.3-1.5b")):
        one, other = (choose((each,))[0].settings() for each in (name, twin))
        differ = {field.name for field in dataclasses.fields(Settings)
                  if getattr(one, field.name) != getattr(other, field.name)}
        assert differ <= {"regime", "window", "penalty", "router_lr", "flip", "given", "rope"}, name


@pytest.mark.parametrize("rate", ["0.0001", "0.003"])
def test_the_border_is_one_of_rates_alone(rate):
    one, other = (choose((name,))[0].settings() for name in (f"l2a_ft-12M-lr{rate}", "l2a_ft-diverse-0.5b"))
    assert dataclasses.replace(one, lr=other.lr, given=()) == dataclasses.replace(other, given=())
