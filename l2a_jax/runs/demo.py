"""The embedded demo's own report: recall of the synthetic corpus beside its controls."""

from __future__ import annotations

import jax

from l2a_jax.evaluation import recall
from l2a_jax.models.params import add_routing
from l2a_jax.training.step import evaluate_batch


def recall_report(run, state, frozen, source_params, held_out):
    plan = run.plan
    plain = run.objective._replace(l2a_config=None)
    if plan.l2a_config is None:
        rows = recall.score(lambda batch, decisions: run.evaluate(state.trainable, frozen, batch, None), held_out)[0]
        return {"rows": {"this model (full attention)": rows}}
    start_trainable, start_frozen = run.split(add_routing(source_params, plan.config, plan.l2a_config)
                                              if not plan.source_routed else source_params)
    baseline = jax.jit(lambda params, batch: evaluate_batch(params, batch, None, objective=plain))
    return recall.report(
        baseline=lambda batch, decisions: baseline(source_params, batch),
        untrained=lambda batch, decisions: run.evaluate(start_trainable, start_frozen, batch, decisions),
        trained=lambda batch, decisions: run.evaluate(state.trainable, frozen, batch, decisions),
        batches=held_out, seed=plan.settings.seed)
