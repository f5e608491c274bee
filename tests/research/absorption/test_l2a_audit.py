"""The audit of an L2A model: forced learned decisions are the model's own, and controls keep what they say."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax import L2AConfig, ModelConfig, add_routing, init_params
from l2a_jax.config import RopeScaling
from l2a_jax.data.recall import VOCABULARY, RecallCorpus
from l2a_jax.errors import UserError
from l2a_jax.research.absorption import l2a_audit
from l2a_jax.training.step import Objective, evaluate_batch


@pytest.fixture(scope="module")
def subject():
    config = ModelConfig(vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
                         num_kv_heads=1, head_dim=8, rope_theta=1e4, rope=RopeScaling("none"), rms_norm_eps=1e-6,
                         tie_embeddings=True, max_positions=64)
    layer = L2AConfig(window=4, sinks=1, topology="parallel", share_attention=True, leakage=1.0)
    after = add_routing(init_params(config, jax.random.key(0)), config, layer)
    after["layers"]["router"]["kernel"] = jax.random.normal(jax.random.key(1), (2, 16))
    before = add_routing(init_params(config, jax.random.key(2)), config, layer)
    batches = list(RecallCorpus(48, 2, 0, distance=6, facts=2).held_out(2))
    return l2a_audit.Audited(config, layer, after, before, batches, True, jnp.dtype("float32"))


def test_audit_tables(subject):
    other = jax.tree.map(lambda x: x, subject.after)
    found = l2a_audit.audit(subject, [("other", other, subject.l2a_config)], (0, 1))
    rows = found.tables[0].rows
    objective = Objective(subject.config, subject.l2a_config, dtype=subject.dtype)
    run = jax.jit(lambda batch: evaluate_batch(subject.after, batch, None, objective=objective))
    own = [jax.device_get(run(batch)) for batch in subject.batches]
    nll = sum(float((o.nll * b.weights).sum()) for o, b in zip(own, subject.batches, strict=True)) / sum(
        float(b.weights.sum()) for b in subject.batches)
    np.testing.assert_allclose(rows["learned"]["after training"].values, np.exp(nll), rtol=1e-5)
    rate = np.mean([o.decisions.mean() for o in own])
    assert 0.05 < rate < 0.95
    np.testing.assert_allclose(rows["learned"]["routed"].values, rate, rtol=1e-6)
    np.testing.assert_allclose(rows["shuffled"]["routed"].values, rate, rtol=1e-6)
    np.testing.assert_allclose(rows["random, same rates"]["routed"].values, rate, atol=0.1)
    assert rows["everything"]["routed"].values == [1.0] and rows["nothing"]["routed"].values == [0.0]
    np.testing.assert_array_equal(rows["of other"]["after training"].values, rows["learned"]["after training"].values)
    assert rows["learned"]["before training"].values != rows["learned"]["after training"].values
    assert len(rows["shuffled"]["after training"].values) == 2


def test_a_plain_model_has_nothing_to_audit():
    with pytest.raises(UserError, match="plain model"):
        l2a_audit.open_audited("qwen2.5-tiny", [], None, None, None)


def test_held_out_text_without_anything_to_score_is_said(subject, monkeypatch, tmp_path):
    nothing = subject._replace(batches=[batch._replace(weights=np.zeros_like(batch.weights))
                                        for batch in subject.batches])
    with pytest.raises(UserError, match="no token that counts"):
        l2a_audit.audit(nothing, [], (0,))
    monkeypatch.setattr(l2a_audit, "open_data", lambda *given, **options: SimpleNamespace(held_out=lambda count: []))
    monkeypatch.setattr(l2a_audit, "locate", lambda source: source)
    monkeypatch.setattr(l2a_audit, "run_source", lambda path: None)
    monkeypatch.setattr(l2a_audit, "load_pretrained", lambda source, dtype: SimpleNamespace(
        l2a_config=subject.l2a_config, config=subject.config, tokenizer="one"))
    with pytest.raises(UserError, match=r"--data a.txt has no held-out documents"):
        l2a_audit.open_audited("model", ["a.txt"], None, None, None)
