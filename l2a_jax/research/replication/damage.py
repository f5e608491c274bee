"""What damages router-only: sixteen cells of the 2 x 3 x 3 x 3 x 2 factorial of five suspects, and what they can tell.

No sixteen of the 108 cells are balanced in factors of two and three levels (an orthogonal array would need 36), so the
cells are D-optimal for the model of all main effects and two interactions that theory predicts (a window of 256 hurts
more without a sink, and more in the sequential layer); a test finds them anew. Estimable: every main effect (8
columns), those two interactions, and 5 residual degrees of freedom (7 without the interactions; the two repeated cells
add 2 of pure error). All other interactions are partly aliased with the main effects; `lack_of_fit` says whether they
matter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from l2a_jax.research.replication import effects
from l2a_jax.research.replication.effects import Interaction

# The first level is the one that should do no harm; the context is 2,048 tokens.
FACTORS: dict[str, tuple[Any, ...]] = {
    "topology": ("parallel", "sequential"),
    "sinks": (4, 1, 0),
    "rope": ("none", "theta:5", "linear:5"),
    "window": (2_048, 1_024, 256),
    "leakage": (1.0, 0.1),
}
INTERACTIONS = (
    Interaction("no sink and a window of 256", {"sinks": 0, "window": 256}),
    Interaction("sequential and a window of 256", {"topology": "sequential", "window": 256}),
)
CROSSED = ("topology", "sinks", "window")
"""Factors of the follow-up, in all combinations."""
RUNS = 16
CHOSEN = (5, 9, 19, 28, 40, 42, 50, 53, 58, 63, 66, 74, 89, 93, 97, 100)
"""Places in the full factorial, the last factor fastest; a test finds them anew."""
REPLICATED = (7, 8)
"""Which of the sixteen are run twice, with another seed: one of each topology."""


def factorial() -> list[dict[str, Any]]:
    """All 108 cells."""
    return [dict(zip(FACTORS, levels, strict=True)) for levels in itertools.product(*FACTORS.values())]


def cells() -> list[dict[str, Any]]:
    """The sixteen."""
    everything = factorial()
    return [everything[index] for index in CHOSEN]


def follow_up() -> list[dict[str, Any]]:
    """Cells after the sixteen, which showed that repeats of a cell differ by 0.003 nats but the model of main effects
    by 0.18: topology, sinks and window in all 18 combinations, nothing scaled and every gradient let through, and at
    their four corners the other rope that does little, and the small leakage."""
    rows = [dict(zip(CROSSED, levels, strict=True)) for levels in itertools.product(*(FACTORS[f] for f in CROSSED))]
    corners = [row for row in rows if row["sinks"] in (4, 0) and row["window"] == 256]
    changed = [*rows, *({**row, "rope": "theta:5"} for row in corners), *({**row, "leakage": 0.1} for row in corners)]
    made = [{factor: row.get(factor, FACTORS[factor][0]) for factor in FACTORS} for row in changed]
    return [cell for cell in made if cell not in cells()]


def name_of(cell: Mapping[str, Any]) -> str:
    """damage-par-k4-none-w256-l0.1"""
    return (f"damage-{cell['topology'][:3]}-k{cell['sinks']}-{cell['rope'].replace(':', '')}-w{cell['window']}"
            f"-l{cell['leakage']:g}")


def empirical_logit(correct: int, count: int) -> float:
    """log((k + 1/2) / (n - k + 1/2)): finite at 0 and at n."""
    return math.log((correct + 0.5) / (count - correct + 0.5))


def analyse(levels: Sequence[Mapping[str, str]], response: Any) -> dict[str, Any]:
    """Main effects, and the same with the two interactions; `levels` as `Row.factors` write them."""
    back = {factor: {str(level): level for level in values} for factor, values in FACTORS.items()}
    made = [{factor: back[factor][cell[factor]] for factor in FACTORS} for cell in levels]
    out = {"main_effects": effects.fit(made, response, FACTORS)}
    if len(made) > sum(len(values) - 1 for values in FACTORS.values()) + 1 + len(INTERACTIONS):
        out["with_interactions"] = effects.fit(made, response, FACTORS, INTERACTIONS)
    return out


def crossed(levels: Sequence[Mapping[str, str]], values: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    """The follow-up's table: (topology and sinks, a value for each window), None where there is none; repeats of a cell
    count once, the first. `levels` as `Row.factors` write them."""
    found: dict[tuple, Any] = {}
    for cell, value in zip(levels, values, strict=True):
        if value is not None:
            found.setdefault(tuple(cell[factor] for factor in FACTORS), value)
    rest = {factor: str(FACTORS[factor][0]) for factor in FACTORS if factor not in CROSSED}

    def value_of(**cell):
        return found.get(tuple(str({**rest, **cell}[factor]) for factor in FACTORS))

    return [(f"{topology}, {sinks} sinks",
             [value_of(topology=topology, sinks=sinks, window=window) for window in FACTORS["window"]])
            for topology in FACTORS["topology"] for sinks in FACTORS["sinks"]]


def pairs(levels: Sequence[Mapping[str, str]], response: Sequence[float]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Without any model: per factor and level, what that level in place of the factor's first one adds where two runs
    differ in nothing else, least first: {"difference", "where": the other factors' levels}. Repeats of a cell are
    averaged."""
    sums: dict[tuple, list[float]] = {}
    for cell, value in zip(levels, response, strict=True):
        sums.setdefault(tuple(cell[factor] for factor in FACTORS), []).append(value)
    means = {cell: sum(values) / len(values) for cell, values in sums.items()}
    out: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for place, (factor, choices) in enumerate(FACTORS.items()):
        for level in map(str, choices[1:]):
            found = []
            for cell, value in means.items():
                other = (*cell[:place], str(choices[0]), *cell[place + 1 :])
                if cell[place] == level and other in means:
                    where = {name: cell[i] for i, name in enumerate(FACTORS) if i != place}
                    found.append({"difference": value - means[other], "where": where})
            out.setdefault(factor, {})[level] = sorted(found, key=lambda one: one["difference"])
    return out
