"""The embedded demo, whole: what it promises on two CPU cores."""

import pytest

from l2a_jax.runs.train import train
from l2a_jax.sources import TINY, load_pretrained, locate
from l2a_jax.training import settings as presets


@pytest.mark.parametrize("regime", ["l2a_ft", "router_strict"])
def test_the_router_finds_what_needs_memory(regime, tmp_path, optimised):
    rows = train(presets.resolve(regime, {}), tmp_path / "run")["recall"]["rows"]
    baseline, trained = rows["baseline (full attention)"], rows["trained router"]
    control = rows["random routing, same rates"]
    assert baseline["recall_accuracy"] > 0.95
    assert rows["local only, untrained"]["recall_accuracy"] < 0.3
    assert trained["recall_accuracy"] >= baseline["recall_accuracy"] - 0.05
    assert trained["sparsity"] >= 0.8
    assert trained["recall_accuracy"] >= control["recall_accuracy"] + 0.2
    assert abs(control["sparsity"] - trained["sparsity"]) < 0.02


def test_the_packaged_model_is_small():
    assert sum(file.stat().st_size for file in locate(TINY).iterdir()) < 4_000_000
    assert load_pretrained(TINY).tokenizer is not None
