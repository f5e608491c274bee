"""Rivals at the same density: searches against exhaustive ones, the oracle against every control, the whole command."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from l2a_jax.data.recall import needs_memory
from l2a_jax.errors import UserError
from l2a_jax.evaluation import controls, reach
from l2a_jax.evaluation.perplexity import score_windows
from l2a_jax.research.rivals import choices, compare, oracle
from l2a_jax.research.rivals.options import RivalOptions
from l2a_jax.research.rivals.search import Losses, greedy, opened
from l2a_jax.sources import TINY
from tests.research.rivals.conftest import LAYER, RUN

PASSES = {"batch_tokens": 4_096}


def beyond(model, windows, **given):
    """Nats a token beyond the window, as `reach` scores it."""
    _, groups = reach.distances(windows, model)
    scores = score_windows(model, windows, **given, **PASSES)
    return scores.token_nll[groups > 0].mean()


@pytest.fixture(scope="module")
def losses(model, windows):
    return {units: Losses(model, windows, units) for units in ("layers", "heads")}


def test_losses_are_those_of_scoring(losses, model, windows):
    layers, heads = model.config.num_layers, model.config.num_kv_heads
    for mask in ([True, False, False], [False, True, True]):
        forced = np.broadcast_to(np.array(mask)[:, None, None], (layers, *windows.tokens.shape))
        want = beyond(model, windows, decisions=forced)
        assert losses["layers"](np.array([mask]))[0] == pytest.approx(want, abs=1e-4)
    mask = np.zeros((layers, heads), bool)
    mask[1, 0] = mask[2, heads - 1] = True
    none = np.zeros((layers, *windows.tokens.shape), bool)
    assert losses["heads"](mask[None])[0] == pytest.approx(beyond(model, windows, decisions=none, heads=mask), abs=1e-4)


@pytest.mark.parametrize("units", ["layers", "heads"])
def test_greedy_search_finds_what_exhaustive_search_finds(losses, units):
    search = losses[units]
    every = list(np.ndindex(*search.shape))
    for count in (1, 2):
        sets = list(itertools.combinations(every, count))
        found = search(np.stack([opened(list(one), search.shape) for one in sets]))
        assert set(greedy(search, count, units)) == set(sets[int(np.argmin(found))])


def test_more_units_than_there_are(losses):
    with pytest.raises(UserError, match="no choice has 4 of 3 units"):
        greedy(losses["layers"], 4, "layers")


def test_alternating_layers_are_literal():
    np.testing.assert_array_equal(choices.alternating(4, 2), [0, 1, 0, 1])
    np.testing.assert_array_equal(choices.alternating(6, 2), [0, 1, 0, 0, 1, 0])
    np.testing.assert_allclose(choices.alternating(6, 1.25), [0, 1, 0, 0, 0.25, 0])
    np.testing.assert_array_equal(choices.alternating(3, 3), [1, 1, 1])


def test_static_choices_spend_the_density(model, windows):
    found = choices.Found(np.array([0.1, 0.5, 0.3]), [(2,), (0,)], [(2, 0), (0, 0), (1, 0)])
    made = {choice.name: choice for choice in choices.static_choices(0.5, model, found)}
    np.testing.assert_allclose(made["ranked"].rates, [0, 1, 0.5])
    np.testing.assert_allclose(made["searched"].rates, [0.5, 0, 1])
    np.testing.assert_allclose(made["random"].rates, [0.5] * 3)
    for name in ("ranked", "searched", "alternating", "random"):
        decisions = made[name].given(3, *windows.tokens.shape)["decisions"]
        assert decisions.mean() == pytest.approx(0.5, abs=0.02), name
    count = 3 * model.config.num_kv_heads
    assert made["heads"].heads.sum() == min(3, -(-count // 2))


def test_a_density_that_no_choice_has(model):
    pruned = model._replace(l2a_config=dataclasses.replace(LAYER, pruned_layers=(0, 2)))
    for density in (0.5, 0.0):
        with pytest.raises(UserError, match=rf"--local 9: no choice routes {density:.0%} of a model with 2 of 3"):
            choices.check_density(density, pruned, "--local 9")
    choices.check_density(1 / 3, pruned, "--local 67")


def test_pruned_layers_take_no_part_and_cost_no_rival(model, windows):
    pruned = model._replace(l2a_config=dataclasses.replace(LAYER, pruned_layers=(1,)))
    search = Losses(pruned, windows, "layers")
    assert search.able == [(0,), (2,)] and set(greedy(search, 2, "layers")) == {(0,), (2,)}
    made = {choice.name: choice.rates for choice in choices.static_choices(
        0.5, pruned, choices.Found(np.array([0.1, 0.9, 0.3]), [(2,), (0,)], None))}
    np.testing.assert_allclose(made["ranked"], [0.5, 0, 1])
    np.testing.assert_allclose(made["searched"], [0.5, 0, 1])
    np.testing.assert_allclose(made["random"], [0.75, 0, 0.75])
    assert made["alternating"][1] == 0 and made["alternating"].sum() == pytest.approx(1.5)


def test_the_learned_choice_reaches_the_density(model, windows):
    known = {}
    for density in (0.6, 0.3):
        choice, made = choices.learned_choice(density, model, windows, known, **PASSES)
        scores = score_windows(model, windows, **choice.given(3, *windows.tokens.shape), **PASSES)
        np.testing.assert_array_equal(made.token_nll, scores.token_nll)
        np.testing.assert_array_equal(known[choice.cut], scores.decisions.mean(axis=(1, 2)))
        assert scores.decisions.mean() == pytest.approx(density, abs=0.003)
        assert choice.density == pytest.approx(scores.decisions.mean())


def test_heads_and_tokens_spend_the_density_together(model, windows):
    heads = model.config.num_kv_heads
    found = choices.Found(np.zeros(3), [], [(2, 0), (0, heads - 1), (1, 0)])
    choice, _ = choices.learned_choice(0.6, model, windows, {}, heads=choices.joined_heads(0.6, model, found), **PASSES)
    assert choice.heads.sum() == int(0.3 * 3 * heads) > 0 and choice.heads[2, 0]
    scores = score_windows(model, windows, **choice.given(3, *windows.tokens.shape), **PASSES)
    open_ = choice.heads[:, :, None, None] | scores.decisions[:, None]
    assert open_.mean() == pytest.approx(0.6, abs=0.003) and choice.density == pytest.approx(open_.mean())
    # A head that sees everything changes what a token that stays local sees.
    alone = score_windows(model, windows, scores.decisions, **PASSES)
    assert np.abs(alone.token_nll - scores.token_nll).max() > 1e-4
    assert choices.joined_heads(0.6, model, found._replace(heads=None)) is None
    assert choices.joined_heads(0.1, model, found) is None


def test_a_cut_at_the_threshold_is_the_router(model, windows):
    own = score_windows(model, windows, **PASSES)
    cut = score_windows(model, windows, cut=np.zeros(3, np.float32), **PASSES)
    np.testing.assert_array_equal(own.decisions, cut.decisions)


def test_the_oracle_is_at_least_as_good_as_every_control(model, windows):
    """Few tokens of the recall corpus need memory: routed in every layer, they keep nearly everything."""
    needed = np.broadcast_to(needs_memory(windows.tokens), (3, *windows.tokens.shape))
    density = needed.mean()
    worth = oracle.decision_worth(model, windows)
    assert (worth[:, :, : LAYER.window + LAYER.sinks] == 0).all()  # where all see the same keys
    best = oracle.most_worth(worth, windows.real, density)
    assert best.sum() == needed.sum()
    told = beyond(model, windows, decisions=best)
    for name, _, decisions in controls.controls(needed, windows.real, (), 2):
        if name != "all":
            assert told < beyond(model, windows, decisions=decisions), name
    truth, none = beyond(model, windows, decisions=needed), beyond(model, windows, decisions=np.zeros_like(needed))
    assert none - told >= 0.9 * (none - truth)


def test_the_command_compares_and_writes(texts, tmp_path):
    options = RivalOptions(source=str(RUN), **texts, local=(80.0,), context=128, calibration_context=128, times=True,
                           out=tmp_path)
    result, folder = compare.compare(options)
    names = ["learned", "ranked", "searched", "alternating", "random", "heads", "oracle"]
    assert [row["name"] for row in result["rows"] if row["name"] != "joined"] == names * 2
    held = json.loads((folder / "rivals.json").read_text())
    assert held["answers"] is None  # none was asked for
    assert held["rows"][0]["kept"] == pytest.approx(result["rows"][0]["kept"])
    assert (folder / "rivals.png").stat().st_size > 10_000
    told = (folder / "rivals.md").read_text()
    assert "80% local" in told and "layers, searched" in told and "prefill ms" in told
    assert all(row["prefill_ms"] > 0 for row in result["rows"] if row["name"] not in ("heads", "joined"))
    assert result["rows"][0]["behind"] == 0
    assert sorted(path.name for path in folder.iterdir()) == ["rivals.json", "rivals.md", "rivals.png"]


@pytest.mark.parametrize(("given", "said"), [
    ({"source": TINY}, "is a plain model"),
    ({"context": 8}, "longer than the window"),
    ({"calibration_context": 100_000}, "is longer than max_positions"),
    ({"text": "nowhere.txt"}, "nowhere.txt"),
    ({"lengths": (128,)}, "speaks the synthetic recall corpus"),
    ({"local": (100.0,)}, "--local 100: no choice routes 0%"),
])
def test_bad_input_is_said_before_weights_are_read(texts, tmp_path, given, said, monkeypatch):
    monkeypatch.setattr(compare, "load_pretrained", lambda *_: pytest.fail("weights were read"))
    options = RivalOptions(**{"source": str(RUN), **texts, "context": 128, "calibration_context": 128,
                              "out": tmp_path, **given})
    with pytest.raises(UserError, match=said):
        compare.compare(options)
