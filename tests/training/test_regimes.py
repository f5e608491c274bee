"""The regime table: the counts of the design, coverage, and a mask that freezes by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2a_jax.config import MODELS, L2AConfig
from l2a_jax.errors import UserError
from l2a_jax.models.params import abstract_params, init_params, map_with_path
from l2a_jax.training.optimizer import Dials, OptimizerConfig, make_optimizer
from l2a_jax.training.presets import PRESETS
from l2a_jax.training.regimes import combine, count_parameters, partition, regime_mask
from l2a_jax.training.settings import ROUTED, Settings, resolve
from l2a_jax.training.tables import PLAIN_REGIMES, REGIMES, check_objective, group_of
from tests.models.cases import CONFIG, LAYERS, UNTIED, make_params

SEPARATE, SHARED = L2AConfig(share_attention=False), L2AConfig()
COUNTS = [
    ("0.5b", SEPARATE, {"baseline": 0, "router_strict": 21_504, "router_only": 64_512, "l2a_ft": 88_200_192,
                        "l2a_paper": 88_222_592, "full_ft": 538_143_616}),
    ("1.5b", SEPARATE, {"baseline": 0, "router_strict": 43_008, "router_only": 129_024, "l2a_ft": 308_525_056,
                        "l2a_paper": 308_569_600, "full_ft": 1_697_998_336}),
    ("3b", SEPARATE, {"baseline": 0, "router_strict": 73_728, "router_only": 221_184, "l2a_ft": 679_882_752,
                      "l2a_paper": 679_958_528, "full_ft": 3_425_916_928}),
    ("0.5b", SHARED, {"baseline": 0, "router_strict": 21_504, "router_only": 43_008, "l2a_ft": 44_110_848,
                      "l2a_paper": 44_133_248, "full_ft": 494_054_272}),
]


@pytest.mark.parametrize(("size", "layer", "expected"), COUNTS)
def test_counts_of_the_design_without_allocating(size, layer, expected):
    config = MODELS[f"qwen2.5-{size}"]
    params = jax.eval_shape(lambda key: init_params(config, key, layer), jax.random.key(0))
    for regime, count in expected.items():
        assert count_parameters(params, regime_mask(params, regime)) == count, regime


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
@pytest.mark.parametrize("layer", [None, SEPARATE, SHARED,
                                   L2AConfig(router_sees=("position",), router_hidden=2)])
def test_every_parameter_is_covered_exactly_once(config, layer):
    groups = {}
    map_with_path(lambda path, _: groups.setdefault(group_of(path), path), abstract_params(config, layer))
    assert {"attention", "attention_norms", "mlp", "other_norms", "embeddings"} <= set(groups)
    with pytest.raises(ValueError, match=r"layers/lora/kernel.*exactly one"):
        regime_mask({"layers": {"lora": {"kernel": jnp.zeros(3)}}}, "full_ft")


def test_unknown_regime_names_the_known_ones():
    with pytest.raises(UserError, match=r"l2a_tf.*router_only"):
        regime_mask(abstract_params(CONFIG, SHARED), "l2a_tf")


@pytest.mark.parametrize("regime", PLAIN_REGIMES)
def test_without_a_router_a_preset_gives_what_a_plain_model_has(regime):
    """Whatever it says of a router; a flag that asks for one is refused."""
    real = {"model": "model", "data": ("text",)}
    for name, preset in PRESETS.items():
        settings = resolve(regime, real, (name,))
        values = {key: value for key, value in preset.values.items() if key not in ROUTED} | real
        assert {key: getattr(settings, key) for key in values} == values
        assert all(getattr(settings, key) == getattr(Settings, key) for key in ROUTED)
        check_objective(settings.objective, regime, None)
    for flag in ({"target_local": 0.9}, {"forced": (0.5,)}, {"objective": "distill"}):
        with pytest.raises(UserError, match=f"^--{next(iter(flag)).replace('_', '-')} .*--regime {regime} "):
            check_objective(resolve(regime, {**real, **flag}, ("repair",)).objective, regime, None)


@pytest.mark.parametrize("regime", REGIMES)
def test_partition_and_combine_are_inverse(regime):
    params = make_params(LAYERS["sequential"])
    trainable, frozen = partition(params, regime_mask(params, regime))
    jax.tree.map(np.testing.assert_array_equal, combine(trainable, frozen), params)
    leaves = len(jax.tree.leaves(trainable)), len(jax.tree.leaves(frozen))
    assert sum(leaves) == len(jax.tree.leaves(params))


@pytest.mark.parametrize("regime", [name for name in REGIMES if name != "baseline"])
def test_the_mask_freezes_by_itself(regime):
    """Gradients of the whole tree, driven through the optimizer: trained leaves move, frozen ones are bit-identical."""
    params = make_params(LAYERS["parallel"])
    optimizer = make_optimizer(OptimizerConfig(regime, weight_decay=0.1), Dials(1e-2, 1e-3, 10, 2))
    state, moved = optimizer.init(params), params
    for seed in range(3):
        gradients = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(seed), leaf.shape), moved)  # noqa: B023
        updates, state = optimizer.update(gradients, state, moved)
        moved = optax.apply_updates(moved, updates)

    def check(path, before, after, trained):
        assert bool((before != after).any()) == trained, path

    map_with_path(check, params, moved, regime_mask(params, regime))
    trained = partition(params, regime_mask(params, regime))[0]
    held = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in held) == 2 * count_parameters(trained)  # Adam's moments of nothing else


def test_the_whole_tree_and_the_subtree_get_the_same_update():
    """Clipping, decay and rates see the trainable gradients alone, whichever way the optimizer is driven."""
    params = make_params(LAYERS["parallel"])
    optimizer = make_optimizer(OptimizerConfig("l2a_ft", weight_decay=0.1), Dials(1e-2, 1e-3, 10))
    gradients = jax.tree.map(lambda leaf: 100 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    mask = regime_mask(params, "l2a_ft")
    whole, _ = optimizer.update(gradients, optimizer.init(params), params)
    part, part_gradients = partition(params, mask)[0], partition(gradients, mask)[0]
    alone, _ = optimizer.update(part_gradients, optimizer.init(part), part)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), partition(whole, mask)[0], alone)
    router, kernel = alone["layers"]["router"]["kernel"], alone["layers"]["attention_local"]["q"]["kernel"]
    assert jnp.abs(router).max() < 1.1e-3 < 9e-3 < jnp.abs(kernel).max()
