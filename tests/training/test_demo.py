"""The embedded demo, whole: what it promises on two CPU cores."""

import numpy as np
import pytest

from l2a_jax.data.recall import PREDICTED, RecallCorpus, needs_memory, predicted
from l2a_jax.runs.demo import by_kind
from l2a_jax.runs.train import train
from l2a_jax.sources import TINY, load_pretrained, locate
from l2a_jax.training.settings import resolve


@pytest.mark.parametrize("regime", ["l2a_ft", "router_strict"])
def test_the_router_finds_what_needs_memory(regime, tmp_path, optimised):
    report = train(resolve(regime, {}), tmp_path / "run")["recall"]
    rows, found = report["rows"], report["router_any_layer"]
    baseline, trained = rows["baseline (full attention)"], rows["trained router"]
    control = rows["random routing, same rates"]
    assert baseline["recall_accuracy"] > 0.95
    assert rows["local only, untrained"]["recall_accuracy"] < 0.3
    assert trained["recall_accuracy"] >= baseline["recall_accuracy"] - 0.05
    assert trained["sparsity"] >= 0.8
    assert trained["recall_accuracy"] >= control["recall_accuracy"] + 0.2
    assert abs(control["sparsity"] - trained["sparsity"]) < 0.02
    assert found["recall"] >= 0.95
    if regime == "l2a_ft":  # frozen attention cannot learn to do without memory what a window could tell
        assert found["routed"] <= 0.08 and found["recall"] >= 0.98 and trained["recall_accuracy"] >= 0.98


def test_the_packaged_model_is_small():
    assert sum(file.stat().st_size for file in locate(TINY).iterdir()) < 4_000_000
    assert load_pretrained(TINY).tokenizer is not None


def test_what_a_token_predicts_is_told_by_the_tokens():
    batch = RecallCorpus(128, 4).batch(0)
    kinds = predicted(batch.tokens)
    np.testing.assert_array_equal(kinds == PREDICTED.index("an answer"), needs_memory(batch.tokens))
    assert by_kind(kinds * 2.0, kinds) == {name: 2.0 * kind for kind, name in enumerate(PREDICTED)}
