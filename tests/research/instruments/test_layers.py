"""Attention trained in some layers only: what moves, what stays bit for bit, and what counts as trained."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2a_jax.config import MODELS, L2AConfig
from l2a_jax.errors import UserError
from l2a_jax.models.params import abstract_params, map_with_path
from l2a_jax.research.replication.rows import evenly_spaced
from l2a_jax.runs.plan import load_tree, make_plan
from l2a_jax.sources import load_pretrained
from l2a_jax.training.checkpoints import LATEST, Checkpoints
from l2a_jax.training.metrics import read_metrics
from l2a_jax.training.optimizer import Dials, OptimizerConfig, make_optimizer
from l2a_jax.training.regimes import count_parameters, partition, regime_mask
from l2a_jax.training.settings import resolve
from l2a_jax.training.step import initial_state
from l2a_jax.training.tables import check_attention_layers, group_of
from tests.models.cases import LAYERS, make_params
from tests.training.test_bad_input import load_command

SEPARATE = L2AConfig(share_attention=False)


def changed_layers(before, after):
    """Where two trees differ in any bit: {"attention": layers, "other": paths outside attention}."""
    layers, other = set(), []

    def look(path, one, two):
        one, two = np.asarray(one), np.asarray(two)
        same = one.view(np.uint8).reshape(one.shape[0], -1) == two.view(np.uint8).reshape(two.shape[0], -1)
        if group_of(path) == "attention":
            layers.update(np.flatnonzero(~same.all(axis=1)).tolist())
        elif not same.all():
            other.append(path)

    map_with_path(look, before, after)
    return {"attention": sorted(layers), "other": sorted(other)}


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
    params = abstract_params(config, SEPARATE)
    counts = [count_parameters(params, regime_mask(params, "l2a_ft"), evenly_spaced(n, 24)) for n in (1, 3, 6, 12, 24)]
    assert counts == [64_512 + n * one for n in (1, 3, 6, 12, 24)] and counts[-1] == 88_200_192
    assert count_parameters(params, regime_mask(params, "full_ft"), (0,)) == 538_143_616 - 23 * one
    assert count_parameters(params, None, (0,)) == 538_143_616 - 23 * one


def test_frozen_layers_keep_every_bit_and_clipping_does_not_see_them():
    """The optimizer alone, with decay: whatever a frozen layer's gradients are, nothing of it or of others depends on
    them; -0.0 stays -0.0, which adding 0.0 would not leave it."""
    params = make_params(LAYERS["parallel"])
    params["layers"]["attention_local"]["q"]["kernel"] = params["layers"]["attention_local"]["q"]["kernel"].at[0].set(
        -0.0)
    gradients = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32), params)
    spoilt = {**gradients, "layers": {**gradients["layers"], "attention_local": jax.tree.map(
        lambda g: np.concatenate([g[:1] + 1e6, g[1:]]), gradients["layers"]["attention_local"])}}
    optimizer = make_optimizer(OptimizerConfig("l2a_paper", weight_decay=0.1, clip=0.1, attention_layers=(1, 2)),
                               Dials(1e-2, 1e-2, 10))

    @jax.jit
    def moved(gradients):
        return optax.apply_updates(params, optimizer.update(gradients, optimizer.init(params), params)[0])

    after = moved(gradients)
    changed = changed_layers(params, after)
    assert changed["attention"] == [1, 2]
    assert set(changed["other"]) == {"layers/router/kernel", "layers/norm_local/scale", "layers/norm_global/scale",
                                     "layers/norm_mlp/scale", "norm_final/scale"}
    assert changed_layers(after, moved(spoilt)) == {"attention": [], "other": []}


@pytest.mark.parametrize(("layers", "regime", "said"), [
    ((0,), "router_only", "trains no attention"), ((3,), "l2a_ft", "layers 0 to 2"), ((), "l2a_ft", "at least one"),
    ((1, 1), "l2a_ft", "each once"),
])
def test_a_choice_that_makes_no_sense(layers, regime, said):
    with pytest.raises(UserError, match=said):
        check_attention_layers(layers, regime, 3)
    check_attention_layers(None, regime, 3)


def test_the_command(tmp_path, capsys):
    """One flag: what is trained, the counts of the summary, and the gradient norm that a step reports."""
    main, folder = load_command(), tmp_path / "run"
    arguments = ["--regime", "l2a_ft", "--steps", "1", "--batch-size", "2", "--weight-decay", "0.1", "--clip", "1e9",
                 "--run-dir", str(folder)]
    for bad, said in (("0-7", "names 3; the model has layers 0 to 2"), ("two", "'two': 'two' is no layer")):
        assert main([*arguments, "--attention-layers", bad]) == 2
        assert f"error: --attention-layers {said}" in capsys.readouterr().err and not folder.exists()
    assert main([*arguments, "--attention-layers", "1"]) == 0
    plan = make_plan(resolve("l2a_ft", {"steps": 1, "batch_size": 2, "attention_layers": (1,)}))
    mask = regime_mask(abstract_params(plan.config, plan.l2a_config), "l2a_ft")
    before = load_tree(plan)[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["trained_parameters"] == count_parameters(before, mask, (1,)) < count_parameters(before, mask)
    assert changed_layers(before, load_pretrained(str(folder), jnp.float32).params)["attention"] == [1]

    # After one unclipped step Adam's first moment is a tenth of the gradient, and zero for frozen layers.
    optimizer = make_optimizer(OptimizerConfig("l2a_ft", attention_layers=(1,)), Dials(1e-3, 1e-3, 1))
    like = jax.eval_shape(lambda: initial_state(partition(before, mask)[0], optimizer, jnp.float32))
    state = Checkpoints(folder).load(LATEST, like)
    moments = [leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state.optimizer)[0]
               if any(getattr(entry, "name", "") == "mu" for entry in path)]
    norm = read_metrics(folder / "metrics.jsonl")[0]["grad_norm"]
    assert norm == pytest.approx(10 * float(optax.tree.norm(moments)), rel=1e-5)
    kernels = [leaf for leaf in moments if leaf.ndim == 3]
    assert len(kernels) == 4 and all(np.any(leaf[1]) and not np.any(leaf[0]) for leaf in kernels)
