"""Attention trained in some layers only: what moves, what stays bit for bit, and what counts as trained."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2a_jax import presets, runs
from l2a_jax.config import MODELS, L2AConfig
from l2a_jax.errors import UserError
from l2a_jax.models.params import abstract_params
from l2a_jax.study.layers import changed_layers, evenly_spaced, ratios
from l2a_jax.training.metrics import read_metrics
from l2a_jax.training.optimizer import OptimizerConfig, make_optimizer
from l2a_jax.training.regimes import check_attention_layers, combine, count_parameters, partition, regime_mask
from l2a_jax.training.step import Objective, initial_state, train_step
from tests.models.cases import CONFIG, LAYERS, make_params
from tests.training.test_bad_input import load_command
from tests.training.test_step import make_batch

SEPARATE = L2AConfig(share_attention=False)


def test_evenly_spaced_layers():
    assert evenly_spaced(1, 24) == (12,) and evenly_spaced(3, 24) == (4, 12, 20)
    assert evenly_spaced(6, 24) == (2, 6, 10, 14, 18, 22) and evenly_spaced(12, 24) == tuple(range(1, 24, 2))
    for layers in (3, 24, 28, 36):
        assert evenly_spaced(layers, layers) == tuple(range(layers))
        assert all(len(set(evenly_spaced(n, layers))) == n for n in range(1, layers + 1))
    with pytest.raises(UserError, match="expected 1 to 24"):
        evenly_spaced(25, 24)


def test_counts_of_trained_parameters():
    """0.5B, separate sets: one layer's attention is q 896^2 + 896, k and v 896 x 128 + 128 each, o 896^2, twice."""
    config = MODELS["qwen2.5-0.5b"]
    one = 2 * (896 * 896 + 896 + 2 * (896 * 128 + 128) + 896 * 896)
    rows = ratios(config, SEPARATE, "l2a_ft", 12_000_000)
    assert [row["trained_parameters"] for row in rows] == [64_512 + n * one for n in (1, 3, 6, 12, 24)]
    assert rows[-1]["trained_parameters"] == 88_200_192  # the design's count
    assert rows[0]["tokens_per_trained_parameter"] == pytest.approx(12e6 / rows[0]["trained_parameters"])
    params = abstract_params(config, SEPARATE)
    assert count_parameters(params, regime_mask(params, "full_ft"), (0,)) == 538_143_616 - 23 * one
    assert count_parameters(params, None, (0,)) == 538_143_616 - 23 * one


@pytest.fixture(scope="module")
def narrowed():
    """Three steps with what could move a frozen layer: decay, and a penalty whose gradient reaches attention."""
    layer, chosen = LAYERS["shared"], (0, 2)
    params = make_params(layer)
    kernel = params["layers"]["attention"]["q"]["kernel"]
    params["layers"]["attention"]["q"]["kernel"] = kernel.at[1].set(-0.0)  # adding 0.0 would change its sign
    optimizer = make_optimizer(OptimizerConfig(1e-2, 20, 2, router_lr=1e-2, weight_decay=0.1, clip=1e9,
                                               attention_layers=chosen), "l2a_paper")
    trainable, frozen = partition(params, regime_mask(params, "l2a_paper"))
    objective = Objective(CONFIG, layer, penalty=0.5, attention_layers=chosen)
    step = jax.jit(functools.partial(train_step, objective=objective, optimizer=optimizer))
    states, metrics = [initial_state(trainable, optimizer, jnp.float32)], []
    for _ in range(3):
        state, found = step(states[-1], frozen, make_batch(1), jax.random.key(0))
        states.append(state)
        metrics.append(jax.device_get(found))
    return params, states, frozen, metrics


def test_only_the_chosen_layers_move(narrowed):
    before, states, frozen, metrics = narrowed
    after = combine(states[-1].trainable, frozen)
    changed = changed_layers(before, after)
    assert changed["attention"] == [0, 2]
    assert "layers/router/kernel" in changed["other"] and "norm_final/scale" in changed["other"]
    assert not any(path.startswith(("layers/mlp", "embed")) for path in changed["other"])
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    for part in ("q", "v", "o"):  # every leaf of the chosen layers, not just some
        one, two = (tree["layers"]["attention"][part]["kernel"] for tree in (before, after))
        np.testing.assert_array_equal(np.any(one != two, axis=(1, 2)), [True, False, True])


def test_the_reported_norm_is_that_of_what_the_optimizer_saw(narrowed):
    """After one step Adam's first moment is a tenth of the (unclipped) gradient; it is zero for frozen layers."""
    _, states, _, metrics = narrowed
    moments = [leaf for path, leaf in jax.tree_util.tree_flatten_with_path(states[1].optimizer)[0]
               if any(getattr(entry, "name", "") == "mu" for entry in path)]
    assert float(metrics[0]["grad_norm"]) == pytest.approx(10 * float(optax.global_norm(moments)), rel=1e-5)
    kernels = [leaf for leaf in moments if leaf.ndim == 3]
    assert len(kernels) == 4 and all(np.any(leaf[0]) and not np.any(leaf[1]) for leaf in kernels)


def test_clipping_sees_only_what_is_trained():
    params = make_params(LAYERS["shared"])
    gradients = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), params)
    spoilt = {**gradients, "layers": {**gradients["layers"], "attention": jax.tree.map(
        lambda g: g.at[0].set(1e6), gradients["layers"]["attention"])}}
    optimizer = make_optimizer(OptimizerConfig(1e-2, 10, clip=0.1, attention_layers=(1, 2)), "l2a_ft")
    state = optimizer.init(params)
    jax.tree.map(np.testing.assert_array_equal, optimizer.update(gradients, state, params)[0],
                 optimizer.update(spoilt, state, params)[0])


@pytest.mark.parametrize(("layers", "regime", "said"), [
    ((0,), "router_only", "trains no attention"), ((3,), "l2a_ft", "layers 0 to 2"), ((), "l2a_ft", "at least one"),
    ((1, 1), "l2a_ft", "each once"),
])
def test_a_choice_that_makes_no_sense(layers, regime, said):
    with pytest.raises(UserError, match=said):
        check_attention_layers(layers, regime, 3)
    check_attention_layers(None, regime, 3)


def test_the_command(tmp_path, capsys):
    """One flag, in `config.json` and in the counts of the summary; a resumed run knows it too."""
    main = load_command()
    arguments = ["--regime", "l2a_ft", "--steps", "2", "--batch-size", "2", "--run-dir", str(tmp_path / "run")]
    assert main([*arguments, "--attention-layers", "0-7"]) == 2
    assert "error: --attention-layers names 3; the model has layers 0 to 2" in capsys.readouterr().err
    assert main([*arguments, "--attention-layers", "two"]) == 2
    assert "error: --attention-layers 'two': 'two' is no layer" in capsys.readouterr().err
    assert main([*arguments, "--attention-layers", "1"]) == 0
    settings = presets.resolve("l2a_ft", {"steps": 2, "batch_size": 2, "attention_layers": (1,)})
    plan = runs.make_plan(settings)
    params = abstract_params(plan.config, plan.l2a_config)
    expected = count_parameters(params, regime_mask(params, "l2a_ft"), (1,))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["trained_parameters"] == expected < count_parameters(params, regime_mask(params, "l2a_ft"))
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2
    before, after = runs.load_tree(plan)[0], runs.load_pretrained(str(tmp_path / "run"), jnp.float32).params
    assert changed_layers(before, after)["attention"] == [1]
    assert runs.resume(tmp_path / "run")["trained_parameters"] == expected
