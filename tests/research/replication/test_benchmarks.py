"""Benchmarks prepared once give what `evaluate_tasks` gives, item by item."""

import jax
import numpy as np
import pytest

from l2a_jax.config import L2AConfig
from l2a_jax.errors import UserError
from l2a_jax.evaluation.perplexity import score_windows
from l2a_jax.evaluation.tasks import evaluate_tasks
from l2a_jax.models.params import add_routing, init_params
from l2a_jax.research.replication import benchmarks
from l2a_jax.research.replication.windows import of_requests
from l2a_jax.sources import Pretrained
from tests.evaluation.byte_tokenizer import byte_tokenizer
from tests.evaluation.test_tasks import CONFIG, write


def model_of(seed):
    params = jax.tree.map(lambda x: x * 3, init_params(CONFIG, jax.random.key(seed)))
    return Pretrained(CONFIG, None, params, byte_tokenizer(), "")


@pytest.mark.parametrize("name, limit", [("hellaswag", None), ("arc_challenge", 1)])
def test_the_same_items_are_right(name, limit, tmp_path):
    prepared = benchmarks.prepare(model_of(0), name, str(write(tmp_path)), limit)
    for seed in (1, 2):  # one preparation serves every model
        model = model_of(seed)
        found = benchmarks.score(model, prepared)
        other = evaluate_tasks(model, (name,), limit=limit, num_fewshot=None, task_data=tmp_path)[name]
        assert [int(bit) for bit in found["acc_bits"]] == other["correct"]
        assert [int(bit) for bit in found["acc_norm_bits"]] == other["correct_norm"]
        assert (found["acc"], found["acc_norm"], found["n"]) == (other["acc"], other["acc_norm"], other["n"])
        assert found["source"] == other["source"] and found["num_fewshot"] == other["num_fewshot"] == 0


def test_controls_force_decisions_on_the_same_requests(tmp_path):
    """As learned (here: everything routed, so the plain model), a request in a window of its own scores as packed."""
    prepared = benchmarks.prepare(model_of(0), "piqa", str(write(tmp_path)), None)
    plain, layer = model_of(1), L2AConfig(window=2, sinks=0)
    routed = plain._replace(l2a_config=layer, params=add_routing(plain.params, CONFIG, layer))
    found = benchmarks.controls(routed, prepared, length=64, batch_tokens=512)
    assert found["n"] == found["of"] == 3 and found["density"] == 1.0
    assert found["learned"] == benchmarks.score(plain, prepared)["acc"]
    assert found["random"]["points"] == found["static"]["points"] == 0.0  # at a rate of 1 there is nothing to choose
    assert benchmarks.controls(routed, prepared, length=40, batch_tokens=512)["n"] < 3
    assert not found["window_covers"]


@pytest.mark.parametrize("topology, shared", [("parallel", True), ("sequential", False)])
def test_controls_are_the_learned_decisions_exactly_where_these_cannot_matter(topology, shared, tmp_path):
    prepared = benchmarks.prepare(model_of(0), "piqa", str(write(tmp_path)), None)
    layer = L2AConfig(window=64, sinks=0, topology=topology, share_attention=shared)
    plain = model_of(1)
    params = add_routing(plain.params, CONFIG, layer)
    router = params["layers"]["router"]
    router["kernel"] = jax.random.normal(jax.random.key(3), router["kernel"].shape)
    routed = plain._replace(l2a_config=layer, params=params)
    found = benchmarks.controls(routed, prepared, length=64, batch_tokens=512)
    assert found["window_covers"] == shared and 0 < found["density"] < 1
    windows = of_requests(prepared.requests, found["length"], "requests")
    shape = (CONFIG.num_layers, *windows.tokens.shape)
    nll = [score_windows(routed, windows, np.full(shape, value), batch_tokens=512).nll for value in (False, True)]
    assert np.allclose(*nll, rtol=1e-5) == shared


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no piqa"):
        benchmarks.prepare(model_of(0), "piqa", str(tmp_path), None)


def test_controls_over_no_item_are_refused(tmp_path):
    prepared = benchmarks.prepare(model_of(0), "piqa", str(write(tmp_path)), None)
    with pytest.raises(UserError, match=r"piqa_valid\.jsonl: none of the first 3 items fits 4 tokens"):
        benchmarks.controls(model_of(0), prepared, items=3, length=4)
