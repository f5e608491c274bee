"""What a row is asked beyond its windows, and what remains of it with everything routed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from l2a_jax.evaluation import intervals, perplexity, ruler, subject
from l2a_jax.evaluation import reach as reach_task
from l2a_jax.evaluation.options import Options
from l2a_jax.evaluation.perplexity import score_windows
from l2a_jax.evaluation.registry import Work
from l2a_jax.research.replication import benchmarks, needles
from l2a_jax.research.replication.row import BENCHMARKS


def reach(evaluated) -> dict[str, Any]:
    """`--tasks reach` of the row's text in windows of its far context."""
    m = evaluated.row.measures
    windows = evaluated.session.windows(evaluated.row, m.far_context, None)
    return reach_task.reach(evaluated.model, windows, seeds=m.audit_seeds, **evaluated.session.passes)


def long_tasks(evaluated) -> dict[str, Any]:
    """`--tasks ruler`, without what was written, and without this machine's paths."""
    session, m, model = evaluated.session, evaluated.row.measures, evaluated.model
    options = Options(evaluated.row.name, ("ruler",), lengths=m.ruler_lengths, ruler_items=m.ruler_items,
                      needle={"haystack": (session.place(m.haystack),)}, backend=session.backend)
    prepared = session.once(("ruler", evaluated.row.size, m.ruler_lengths, m.ruler_items, m.haystack),
                            lambda: ruler.prepare("ruler", options, model))
    found = ruler.task(Work("ruler", options, model, model, None, prepared, session.passes, lambda: None,
                            Path(f"{evaluated.row.name}.json")))
    cells = [{name: value for name, value in cell.items() if name != "written"} for cell in found["cells"]]
    haystack = {**found["made_of"]["haystack"], "name": m.haystack}
    return {**found, "cells": cells, "made_of": {**found["made_of"], "haystack": haystack}}


def all_routed(evaluated) -> dict[str, Any]:
    """The same weights with everything routed, on the text, its longer contexts, the needle and the benchmarks that the
    row is asked: how much worse its router's decisions are, paired."""
    row, session, passes = evaluated.row, evaluated.session, evaluated.session.passes
    layer = evaluated.model.l2a_config
    subject.check_routed(layer, "all_routed")
    layer = dataclasses.replace(layer, threshold=0.5)  # where a zero router routes everything
    model = subject.with_layer(evaluated.model, evaluated.model.config, layer, "all")
    out: dict[str, Any] = {"contexts": {}, "benchmarks": {}}
    contexts = {row.measures.context: evaluated.windows}
    if "contexts" in row.measures.tasks:
        contexts |= {context: session.windows(row, context, max(1, row.measures.context_tokens // context))
                     for context in row.measures.contexts}
    for context, windows in contexts.items():
        everything = score_windows(model, windows, label=f"all routed at {context}", **passes)
        own = evaluated.scores if windows is evaluated.windows else score_windows(evaluated.model, windows, **passes)
        worse, interval = intervals.paired_windows(own.nll, everything.nll, own.tokens)
        out["contexts"][str(context)] = {"perplexity": perplexity.result(everything, windows)["perplexity"],
                                         "routing_costs": worse, "routing_costs_95": list(interval)}
    if "needle" in row.measures.tasks:
        options, prepared = session.needles(row)
        found = needles.score(model, prepared, options, **passes)["lengths"]
        out["needle"] = {length: entry["exact_match"] for length, entry in found.items()}
    for name in (task for task in BENCHMARKS if task in row.measures.tasks):
        asked = session.benchmark(row, name)
        mine, own = (benchmarks.score(one, asked, session.backend, session.mesh) for one in (model, evaluated.model))
        points, interval = intervals.paired_items(*([int(bit) for bit in one["acc_bits"]] for one in (own, mine)))
        out["benchmarks"][name] = {"acc": mine["acc"], "routing_gains": 100 * points,
                                   "routing_gains_95": [100 * bound for bound in interval]}
    return out
