"""The collapse report: text statistics against slow definitions, every rule on synthetic measures, and models broken on
purpose."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.config import L2AConfig
from l2a_jax.data.recall import RecallCorpus, needs_memory
from l2a_jax.evaluation import collapse, perplexity
from l2a_jax.models import transformer
from l2a_jax.models.params import add_routing, map_with_path
from l2a_jax.sources import TINY, load_pretrained

HEALTHY = {
    "weights_not_finite": 0, "logits_not_finite": 0, "training_losses_not_finite": 0, "future_seen": 0.0,
    "future_routing": 0.0, "training_loss": 2.5, "loss_gap": 0.2, "logit_spread": 20.0, "top_token_share": 0.1,
    "loss_over_uniform": 0.3, "sampled_ends_in_loop": 0.0, "sampled_distinct_2": 0.9, "sparsity": 0.8,
}


def obvious_loops(x):
    """Every (start, length, period) by trying all of them; maximal for their period."""
    found = set()
    for period, start in itertools.product(range(1, collapse.MAX_PERIOD + 1), range(len(x))):
        stop = start
        while stop + period < len(x) and x[stop + period] == x[stop]:
            stop += 1
        length = stop - start + period
        before = start > 0 and x[start - 1] == x[start - 1 + period] if start - 1 + period < len(x) else False
        if stop > start and not before and length >= max(collapse.TIMES * period, collapse.TOKENS):
            found.add((start, length, period))
    return found


@pytest.mark.parametrize("seed", range(30))
def test_loops_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2 if seed % 2 else 5, 40).tolist()
    if seed % 3:
        unit = rng.integers(0, 5, rng.integers(1, 9)).tolist()
        x = x[: rng.integers(0, 40)] + unit * int(rng.integers(2, 9)) + (x[:3] if seed % 4 else [])
    expected = obvious_loops(x)
    assert set(collapse._loops(x)) == expected
    assert collapse.longest_loop(x).length == max((length for _, length, _ in expected), default=0)
    assert collapse.ends_in_loop(x) == any(start + length == len(x) for start, length, _ in expected)


def test_numbers_of_known_texts():
    stuck, fresh = [7] * 40, list(range(40))
    assert collapse.distinct([1, 2, 1, 2, 1], 2) == 0.5 and collapse.distinct([1], 2) is None
    described = collapse.repetition([stuck, fresh, [1, 2]])
    assert described["too_short"] == 1 and described["ends_in_loop"] == 0.5 and described["longest_loop"] == 40
    assert described["distinct_1"] == pytest.approx((1 / 40 + 1) / 2)
    assert collapse.unigram_entropy(stuck) == 0 and collapse.unigram_entropy(fresh) == pytest.approx(math.log(40))
    assert collapse.repetition([])["distinct_2"] is None


@pytest.mark.parametrize("rule", collapse.RULES, ids=lambda rule: f"{rule.verdict}: {rule.measure}")
def test_every_rule_on_both_sides_of_its_threshold(rule):
    assert collapse.judge(HEALTHY)["verdict"] == "healthy"
    step = {">": 1e-3, ">=": 0.0, "<": -1e-3 * rule.threshold, "<=": 0.0}[rule.compare]
    broken = collapse.judge({**HEALTHY, rule.measure: rule.threshold + step})
    assert broken["verdict"] == rule.verdict and rule.measure in broken["rule"]
    sound = {">": 0.0, ">=": -1e-3, "<": 0.0, "<=": 1e-3}[rule.compare]
    assert collapse.judge({**HEALTHY, rule.measure: rule.threshold + sound})["verdict"] == "healthy"


def test_the_first_rule_decides_and_nothing_is_hidden():
    judged = collapse.judge({**HEALTHY, "logits_not_finite": 3, "sparsity": 1.0, "sampled_distinct_2": 0.0,
                            "loss_gap": None})
    assert judged["verdict"] == "non-finite"
    assert judged["findings"] == ["non-finite", "degenerate text", "never routes"]
    assert judged["not_measured"] == ["loss_gap"]
    assert collapse.judge({**HEALTHY, "sampled_distinct_2": math.nan})["verdict"] == "degenerate text"


def test_training_records():
    records = [{"loss": 3.0}] * 95 + [{"loss": 1.0, "held_out_loss": 1.5}] * 5
    assert collapse.training_measures(records) == {"steps": 100, "loss": 1.0, "not_finite": 0, "held_out_loss": 1.5}
    assert collapse.training_measures([{"loss": "nan"}, {"loss": 1.0}])["not_finite"] == 1
    assert collapse.training_measures([]) == {}


@pytest.fixture(scope="module")
def model():
    return load_pretrained(TINY, jnp.float32)


@pytest.fixture(scope="module")
def windows():
    corpus = RecallCorpus(128, 64)
    return perplexity.batch_windows(list(corpus.held_out(1)), {"name": "recall corpus"}, needs_memory)


def report(model, windows, records=()):
    return collapse.collapse(model, windows, prompts=[row[:24].tolist() for row in windows.tokens[:8]], records=records)


def broken(model, path, change):
    return model._replace(params=map_with_path(lambda name, leaf: change(leaf) if name == path else leaf, model.params))


def test_a_sound_model(model, windows):
    found = report(model, windows, [{"loss": 1.0, "held_out_loss": 1.02}])
    assert found["verdict"] == "healthy", found["rule"]
    assert found["text"]["loss"] == pytest.approx(math.log(2.8), abs=0.1) and found["text"]["future_seen"] < 1e-5
    sampled = found["generation"]["sampled"]
    assert sampled["ends_in_loop"] == 0 and sampled["distinct_2"] > 0.5 and sampled["own_perplexity"] < 5
    assert "ends in loop" in collapse.told(found)


def test_a_weight_that_is_no_number(model, windows):
    nan = broken(model, "layers/mlp/up/kernel", lambda leaf: leaf.at[1, 3, 5].set(jnp.nan).at[2, 0, 0].set(jnp.inf))
    found = report(nan, windows)
    assert found["verdict"] == "non-finite" and found["weights_not_finite"] == {"layers/mlp/up/kernel": 2}
    assert found["text"]["logits_not_finite"] > 0 and found["text"]["loss"] is None
    assert found["generation"] is None and "not finite" in found["not_generated"]


def test_logits_that_are_all_the_same(model, windows):
    found = report(broken(model, "embed/embedding", jnp.zeros_like), windows)
    assert found["verdict"] == "constant output" and found["text"]["logit_spread"] == 0
    assert found["text"]["top_token_share"] == 1
    assert found["findings"] == ["constant output", "worse than chance"]
    assert found["generation"]["greedy"]["ends_in_loop"] == 1  # greedy decoding shows it as the study's looping text


def test_training_that_saw_its_target(model, windows):
    assert report(model, windows, [{"loss": 0.001, "held_out_loss": 1.0}])["verdict"] == "loss-perplexity mismatch"
    leaked = report(model, windows, [{"loss": 0.5, "held_out_loss": 2.5}])
    assert leaked["verdict"] == "loss-perplexity mismatch" and "loss_gap" in leaked["rule"]
    assert report(model, windows, [{"loss": "nan", "held_out_loss": 1.0}])["verdict"] == "non-finite"


def cut(windows, rows, length):
    return windows._replace(**{name: getattr(windows, name)[:rows, :length]
                               for name in ("tokens", "targets", "scored", "real")})


def test_a_layer_that_sees_the_future_is_found(model, windows, monkeypatch):
    def leaky(params, tokens, config, l2a_config=None, **options):
        hidden, routing = transformer.hidden_states(params, tokens, config, l2a_config, **options)
        return hidden + 0.2 * jnp.roll(hidden, -1, axis=1), routing

    monkeypatch.setattr(collapse, "hidden_states", leaky)
    small = cut(windows, 2, 30)
    assert collapse.text_measures(model, small)["future_seen"] > 0.05


def test_routing_is_described(model, windows):
    layer = L2AConfig(window=12, sinks=2)
    routed = model._replace(l2a_config=layer, params=add_routing(model.params, model.config, layer))
    router = jax.random.normal(jax.random.key(0), routed.params["layers"]["router"]["kernel"].shape)
    routed.params["layers"]["router"]["kernel"] = router.at[1].set(0.0)
    found = collapse.text_measures(routed, cut(windows, 4, 96))
    assert found["sparsity_per_layer"][1] == 0 and 0.1 < found["sparsity_per_layer"][0] < 0.9
    assert found["router_entropy_per_layer"][1] == pytest.approx(math.log(2), abs=1e-4)
    assert found["future_routing"] == 0 and found["future_seen"] < 1e-5
