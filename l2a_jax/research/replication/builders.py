"""What every row of the study is made from: sizes, their operating points, the two layers, and a maker for each."""

from __future__ import annotations

from l2a_jax.errors import UserError
from l2a_jax.research.replication.row import DIVERSE, Measures, Row

LAYERS = {"0.5b": 24, "1.5b": 28, "3b": 36}
BASELINE = {size: f"baseline-{size}" for size in LAYERS}
# One operating point for every size: 8,192 tokens a step.
STEP = {"0.5b": {}, "1.5b": {"remat": "elementwise"}, "3b": {"batch_size": 1, "grad_accum": 4, "remat": "layer"}}
LONG = {8_192: {"batch_size": 1}, 32_768: {"batch_size": 1, "remat": "layer"}}
PAPER = {"topology": "sequential", "share_attention": False, "sinks": 0, "rope": "theta:5", "leakage": 0.1,
         "penalty": 1.31e-3}
"""The study's likely layer: sequential, two sets, no sinks, theta x 5."""


def evenly_spaced(count: int, num_layers: int) -> tuple[int, ...]:
    """The middles of `count` equal stretches of `num_layers` layers, such as 4, 12, 20 for 3 of 24."""
    if not 1 <= count <= num_layers:
        raise UserError(f"{count} evenly spaced layers were asked for; expected 1 to {num_layers}")
    return tuple((2 * index + 1) * num_layers // (2 * count) for index in range(count))


def make_row(name, group, question, size, regime, *, data=DIVERSE, measures=Measures(), factors=(),  # noqa: B008
             not_run=None, **given) -> Row:
    """A row of the table; `given` are flags beyond the operating point of its size."""
    given = {**STEP[size], "tokens": 12_000_000, "seed": 0, **given} if regime != "baseline" else given
    return Row(name, group, question, size, regime, tuple(given.items()), data, measures,
               None if regime == "baseline" else BASELINE[size], factors, not_run)


def repair(name, question, measures, window, penalty, size="0.5b", group="frontier", **given) -> Row:
    """A row of the repaired layer."""
    return make_row(f"repair-{name}", group, question, size, "router_only", measures=measures, window=window,
                    penalty=penalty, router_lr=3e-4, **given)
