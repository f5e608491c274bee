"""Training under forced decisions: they are what the layer does, the router stays, and everything routed is a plain
model."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation import subject
from l2a_jax.models.transformer import hidden_states
from l2a_jax.nn import routing
from l2a_jax.runs.plan import make_plan
from l2a_jax.sources import read_config
from l2a_jax.training.loss import cross_entropy
from l2a_jax.training.optimizer import OptimizerConfig, make_optimizer
from l2a_jax.training.regimes import partition, regime_mask
from l2a_jax.training.settings import resolve
from l2a_jax.training.step import Objective, compute_params, forced_decisions, initial_state, train_step
from tests.frozen.test_old_folders import FOLDERS
from tests.models.cases import CONFIG, LAYERS, make_params
from tests.training.test_step import DIALS, make_batch

KEY = jax.random.key(3)
RATES = jnp.array([0.0, 0.5, 1.0, 0.25])[: CONFIG.num_layers]


def trained(regime, layer, params, steps=2, **dials):
    rule, dials = OptimizerConfig(regime), DIALS._replace(penalty=0.0, **dials)
    trainable, frozen = partition(params, regime_mask(params, regime))
    step = jax.jit(functools.partial(train_step, dials=dials, objective=Objective(CONFIG, layer), optimizer=rule))
    state, told = initial_state(trainable, make_optimizer(rule, dials), jnp.float32), []
    for _ in range(steps):
        state, metrics = step(state, frozen, make_batch(1), KEY)
        told.append(metrics)
    return compute_params(state.trainable, frozen, jnp.float32)["layers"], told


def test_everything_routed_trains_the_norms_of_a_plain_model():
    """The oracle of the arm without a router: `norms_only` of the plain model is `router_only` with all forced."""
    params = make_params(LAYERS["shared"])
    layers = {name: leaf for name, leaf in params["layers"].items() if name != "router"}
    plain, _ = trained("norms_only", None, {**params, "layers": layers})
    forced, told = trained("router_only", LAYERS["shared"], params, forced=jnp.ones(CONFIG.num_layers))
    np.testing.assert_allclose(forced["norm_attention"]["scale"], plain["norm_attention"]["scale"], rtol=2e-5)
    assert (plain["norm_attention"]["scale"] != params["layers"]["norm_attention"]["scale"]).any()
    jax.tree.map(np.testing.assert_array_equal, forced["router"], params["layers"]["router"])
    assert told[-1]["sparsity"] == 0 and told[-1]["router_grad_norm"] == 0


@pytest.mark.parametrize("name", ["shared", "sequential"])
def test_a_step_runs_the_decisions_that_are_forced(name):
    params, batch = make_params(LAYERS[name]), make_batch(1)
    layers, told = trained("l2a_ft", LAYERS[name], params, forced=RATES)
    decisions = forced_decisions(KEY, RATES, batch.tokens.shape[1:])
    hidden, _ = hidden_states(params, batch.tokens[0], CONFIG, LAYERS[name], segment_ids=batch.segment_ids[0],
                              decisions=decisions)
    summed = cross_entropy(params, hidden, batch.targets[0], batch.weights[0], CONFIG)
    np.testing.assert_allclose(told[0]["loss"], summed.nll / batch.weights.sum(), rtol=1e-5)
    real = batch.segment_ids[0] != 0
    for metrics in told:  # the same in every step
        np.testing.assert_allclose(metrics["sparsity_per_layer"], routing.sparsity(decisions, real), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, layers["router"], params["layers"]["router"])


def test_decisions_are_drawn_once_for_every_place():
    drawn = np.asarray(routing.frozen(KEY, jnp.array([0.0, 0.3, 1.0]), 3, 2_000))
    assert (drawn == drawn[:, :1]).all() and not drawn[0].any() and drawn[2].all()
    assert abs(drawn[1].mean() - 0.3) < 0.05
    assert (routing.frozen(jax.random.key(4), jnp.array([0.3]), 1, 2_000) != drawn[1:2, :1]).any()


@pytest.mark.parametrize(("regime", "given", "message"), [
    ("router_only", {"penalty": 0.3}, "--penalty is of learned decisions"),
    ("norms_only", {}, "runs a plain model"), ("router_only", {"target_local": 0.9}, "moves learned ones"),
    ("l2a_ft", {"objective": "distill"}, "teaches a router"), ("router_strict", {}, "trains nothing else"),
    ("router_only", {"forced": ()}, "not empty"),
    ("router_only", {"forced": (1.5,)}, "--forced")])
def test_what_forced_decisions_leave_no_room_for(regime, given, message):
    with pytest.raises(UserError, match=message):
        resolve(regime, {"forced": (1.0,), **given})


def test_forced_decisions_take_the_place_of_what_a_preset_says_of_learned_ones():
    for preset in ("repair-far", "repair-target"):
        settings = resolve("router_only", {"forced": (0.1,), "model": "m", "data": ("d",)}, (preset,))
        assert settings.penalty == 0 and settings.target_local is None and settings.seq_len == 8_192
    with pytest.raises(UserError, match=r"^--forced .* --objective mixed \(by --preset repair\) teaches a router"):
        resolve("router_only", {"forced": (0.1,), "model": "m", "data": ("d",)}, ("repair",))


def test_a_forced_run_says_that_it_is_scored_under_its_routers_decisions(tmp_path, caplog):
    config = json.loads((FOLDERS / "router_only" / "config.json").read_text())
    for forced, said in ((None, 0), ([0.5], 1)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "settings": {**config["settings"],
                                                                                 "forced": forced}}))
        caplog.clear()
        model, layer = read_config(str(tmp_path))
        subject.layer_of(model, layer, {}, "learned", (), str(tmp_path))
        assert caplog.text.count("was trained under forced decisions") == said


def test_one_share_or_one_for_each_layer():
    settings = resolve("router_only", {"forced": (0.5, 0.5)})
    assert settings.penalty == 0
    with pytest.raises(UserError, match=r"--forced has 2 shares; expected one, or one for each of the 3 layers"):
        make_plan(settings)
