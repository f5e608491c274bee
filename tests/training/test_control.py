"""A target of locality: what control does to a weight, and what a run with a target comes to."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.nn import routing
from l2a_jax.runs import calibrate, folder
from l2a_jax.runs.plan import RunPlan
from l2a_jax.runs.train import resume, train
from l2a_jax.sources import load_pretrained, read_config
from l2a_jax.training import control
from l2a_jax.training.checkpoints import LATEST, Checkpoints
from l2a_jax.training.optimizer import Dials
from l2a_jax.training.run_files import read_run
from l2a_jax.training.settings import resolve
from tests import compiler
from tests.models.cases import CONFIG, hidden, make_params
from tests.training.test_step import LAYER, OBJECTIVE, make_batch, read_beyond, set_up

STEPS = 200
DIALS = Dials(1e-2, 1e-2, STEPS, penalty_warmup=10, penalty_ramp=90, target_local=0.9)


def simulate(target, share_of, steps=STEPS):
    """(shares, weights) of a run whose share follows `share_of(weight)` with a lag, noisily."""
    dials, noise = DIALS._replace(target_local=target), np.random.default_rng(0)
    advance = jax.jit(lambda state, share, step: control.updated(state, share, step, dials))
    weigh = jax.jit(lambda state, step: control.penalty_weight(state, step, dials))
    state, share, found = control.initial(), 0.4, []
    for step in range(steps):
        weight = float(weigh(state, step))
        share += (share_of(weight) - share) / 10
        found.append((share, weight))
        state = advance(state, jnp.float32(np.clip(share + 0.01 * noise.normal(), 0, 1)), step)
    return np.array(found).T


@pytest.mark.parametrize("target", [0.7, 0.9, 0.97])
@pytest.mark.parametrize("power", [0.3, 0.6])
def test_a_share_that_answers_to_factors_reaches_its_target(target, power):
    """Routed in proportion to weight^-power, as a router is found to answer."""
    shares, weights = simulate(target, lambda weight: 1 - 0.6 / (1 + (weight / 0.01) ** power))
    assert (weights[:10] == 0).all() and (weights[10:] > 0).all()
    assert abs(shares[-20:].mean() - target) < 0.01


@pytest.mark.parametrize("pace", [0.2, 0.25])
def test_a_short_run_settles(pace):
    """A router under Adam: its log-odds move by `pace` a step at most, with the momentum of ten steps, towards where
    the weight's price is what local attention costs. In the second half of 120 steps they stay about the target."""
    steps, goal = 120, np.log(0.945 / 0.055)
    dials = DIALS._replace(steps=steps, penalty_warmup=steps // 20, penalty_ramp=0.45 * steps, target_local=0.945)
    advance, weigh = jax.jit(control.updated), jax.jit(control.penalty_weight)
    noise, state, odds, moving, found = np.random.default_rng(0), control.initial(), -3.0, 0.0, []
    for step in range(steps):
        weight = float(weigh(state, step, dials))
        pull = 0.8 if weight == 0 else np.tanh(np.log(weight) + 1 - 0.5 * (odds - goal))
        moving += (pull - moving) / 10
        odds += pace * moving
        found.append(odds - goal)
        state = advance(state, jnp.float32(1 / (1 + np.exp(-odds - 0.25 * noise.normal()))), step, dials)
    assert np.sqrt(np.mean(np.square(found[steps // 2:]))) < 0.8


def test_a_target_out_of_reach_winds_nothing_up():
    """Stuck below it for most of the run the weight is at its bound, and leaves it as soon as the share is above."""
    _, weights = simulate(0.9, lambda weight: 0.5)
    assert weights[-1] == pytest.approx(control.MOST)
    state = control.Control(jnp.log(control.MOST), jnp.float32(0.95), jnp.float32(0.5))
    for step in range(150, 156):
        state = control.updated(state, jnp.float32(0.95), jnp.int32(step), DIALS)
    assert float(control.penalty_weight(state, jnp.int32(156), DIALS)) < control.MOST / 3


def test_a_step_in_which_no_token_counts_moves_nothing():
    state = control.Control(*map(jnp.float32, (-1.0, 0.7, 0.5)))
    assert control.updated(state, jnp.float32(jnp.nan), jnp.int32(100), DIALS) == state


@pytest.mark.parametrize(("start", "target"), [(0.895, 0.9), (0.7, 0.95), (0.97, 0.5)])
def test_the_threshold_moves_until_the_share_is_met(start, target):
    """A share that rises with the threshold by the spread of the margins, in steps of one token in ten thousand."""
    margins = np.random.default_rng(0).logistic(-np.log(start / (1 - start)), 1.5, 10_000)
    moved, found = calibrate.meet(lambda x: float(np.mean(margins < x)), float(np.mean(margins < 0)), target)
    assert abs(found - target) <= calibrate.NEAR and found == np.mean(margins < moved)


def test_a_share_that_cannot_be_met_is_left_where_it_is_nearest():
    tried = []
    found = calibrate.meet(lambda x: tried.append(x) or float(x > 1), 0.0, 0.4)
    assert found == (0.0, 0.0) and len(tried) == calibrate.TRIES and all(abs(x) < calibrate.FARTHEST for x in tried)


@pytest.mark.parametrize("tokens", ["all", "beyond"])
def test_the_share_is_of_the_routers_own_decisions_and_of_the_tokens_that_count(tokens):
    """Every decision inverted in training; two micro-batches of packed documents."""
    layer = dataclasses.replace(LAYER, flip=1.0)
    _, state, frozen, step = set_up(objective=OBJECTIVE._replace(l2a_config=layer, target_tokens=tokens),
                                    penalty_warmup=0, target_local=0.9)
    state, batch, key = state._replace(control=control.initial()), make_batch(2), jax.random.key(0)
    after, metrics = step(state, frozen, batch, key)
    local = counted = 0
    for index in range(2):
        ids = batch.segment_ids[index]
        follows = read_beyond(ids, LAYER.window, LAYER.sinks) > 0 if tokens == "beyond" else ids != 0
        _, routed = hidden(make_params(layer), batch.tokens[index], CONFIG, layer, segment_ids=ids, train=True,
                           key=jax.random.fold_in(jax.random.fold_in(key, 0), index))
        own = np.asarray(routing.decide(routed.logits, layer.temperature, layer.threshold))
        assert (own != np.asarray(routed.decisions))[:, np.asarray(ids) != 0].all()
        local += (~own & np.asarray(follows)).sum() / CONFIG.num_layers
        counted += follows.sum()
    local, counted = float(local), float(counted)
    assert float(metrics["local"]) == pytest.approx(local / counted, rel=1e-5)
    assert float(after.control.average) == pytest.approx(local / counted, rel=1e-5)
    assert float(metrics["penalty_weight"]) > 0


@pytest.mark.parametrize(("given", "said"), [
    ({"target_local": 0.9, "penalty": 0.3}, "^--penalty and --target-local both"),
    ({"target_local": 0.9, "penalty": 0.0}, "^--penalty and --target-local both"),
    ({"target_local": 1.0}, "^--target-local is 1.0; expected a share that leaves something to route"),
    ({"target_local": 0.0}, "^--target-local is 0.0; expected a share that leaves something to route"),
    ({"target_tokens": "some"}, "^--target-tokens is 'some'"),
])
def test_what_no_target_is(given, said):
    with pytest.raises(UserError, match=said):
        resolve("router_only", given)


def test_a_target_takes_the_place_of_a_presets_penalty_and_is_not_for_a_plain_model():
    assert resolve("router_only", {"target_local": 0.9}, ("repair-2025",)).penalty == 0
    with pytest.raises(UserError, match=r"^--target-local is of decisions, and --regime baseline"):
        resolve("baseline", {"target_local": 0.9})


def test_a_preset_with_a_target_yields_to_whoever_prices_routing_after_it():
    given = {"model": "x", "data": ("y",)}
    target = resolve("router_strict", given, ("repair-target",))
    assert (target.target_local, target.target_tokens, target.penalty, target.seq_len) == (0.9, "beyond", 0, 8_192)
    for settings in (resolve("router_strict", {**given, "penalty": 0.4}, ("repair-target",)),
                     resolve("router_strict", given, ("repair-target", "repair-far"))):
        assert settings.target_local is None and settings.penalty in (0.4, 0.5)
    again = resolve("router_strict", {**given, "target_local": 0.8}, ("repair-target", "repair-far"))
    assert again.target_local == 0.8 and again.penalty == 0
    own = resolve("router_strict", given)
    assert own.target_local == 0.945 and own.penalty == 0
    assert resolve("router_strict", {**given, "penalty": 0.4}) == dataclasses.replace(
        own, target_local=None, penalty=0.4, given=("data", "model", "penalty"))


def test_a_named_recipe_takes_the_place_of_the_regimes_and_a_size_does_not():
    given = {"model": "x", "data": ("y",)}
    far = resolve("router_strict", given, ("repair-far",))
    assert (far.objective, far.ask, far.answer_weight, far.target_local, far.penalty) == ("next-token", 0, 1, None, 0.5)
    size = resolve("router_strict", given, ("0.5b-24gb",))
    assert (size.objective, size.ask, size.seq_len, size.grad_accum) == ("mixed", 0.5, 2_048, 1)


GIVEN = {"target_local": 0.8, "steps": 100, "seq_len": 112, "batch_size": 8, "eval_every": 100, "eval_batches": 32,
         "save_every": 20}


@pytest.fixture(scope="module", autouse=True)
def without_its_report():
    """The demo's report compiles three programs more, and says nothing of a target."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunPlan, "is_demo", False)
        yield


@pytest.fixture(scope="module")
def reached(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("target") / "run"
    with compiler.well():
        return run_dir, train(resolve("router_strict", GIVEN), run_dir)


def records(run_dir):
    timing = ("tokens_per_second", "peak_memory_gb")
    return [{name: value for name, value in json.loads(line).items() if name not in timing}
            for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_reaches_its_target_on_held_out_rows_and_says_so(reached):
    run_dir, summary = reached
    target, found = summary["target"], records(run_dir)
    assert abs(target["held_out"] - 0.8) <= folder.WITHIN and target["held_out"] == pytest.approx(
        summary["held_out_sparsity"])
    moved = target["calibrated"]
    assert abs(moved["after"] - 0.8) <= calibrate.NEAR or moved["after"] == moved["before"]
    assert load_pretrained(run_dir).l2a_config.threshold == moved["threshold"] == read_run(run_dir).l2a_config.threshold
    assert read_run(run_dir).trained_layer.threshold == 0.5
    before = Checkpoints(run_dir).steps(LATEST)[0]  # the threshold was moved for the last one alone
    assert load_pretrained(run_dir / "checkpoints" / "latest" / str(before)).l2a_config.threshold == 0.5
    assert read_config(run_dir / "checkpoints" / "latest" / "100")[1].threshold == moved["threshold"]
    assert "MISSED" not in folder.told_target(target) and "MISSED" in folder.told_target({**target, "asked": 0.5})
    assert all({"local", "target", "penalty_weight"} <= set(record) for record in found)
    assert found[-1]["penalty_weight"] == target["weight"] and found[-1]["target"] == pytest.approx(0.8)
    assert [record["local"] for record in found] == pytest.approx([record["sparsity"] for record in found])


def test_a_short_run_of_an_earlier_control_does_not_go_on(reached, tmp_path):
    config = json.loads((reached[0] / "config.json").read_text())
    assert config.pop("control") == control.EDITION
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--target-local was controlled in another"):
        resume(tmp_path)


def test_a_run_resumed_in_the_middle_of_control_is_the_unbroken_one(reached, tmp_path, monkeypatch, caplog, optimised):
    """Stopped after 25 steps: the ramp is not over, and the weight is moving."""
    from l2a_jax.runs import train as runs

    whole, run_dir, fit = reached[0], tmp_path / "run", runs.fit_run

    def stopping(run, *args, record, stop, **kept):
        def noted(found):
            record(found)
            if found["step"] == 25:
                stop.signal_number = 15

        return fit(run, *args, record=noted, stop=stop, **kept)

    monkeypatch.setattr(runs, "fit_run", stopping)
    with pytest.raises(SystemExit):
        train(resolve("router_strict", GIVEN), run_dir)
    monkeypatch.setattr(runs, "fit_run", fit)
    assert 25 <= len(records(run_dir)) < 100
    with caplog.at_level(logging.INFO, "l2a_jax"):
        resume(run_dir)
    assert "resuming after step" in caplog.text and records(run_dir) == records(whole)
    assert read_run(run_dir).l2a_config == read_run(whole).l2a_config
