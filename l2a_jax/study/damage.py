"""What damages router-only: sixteen cells of the 2 x 3 x 3 x 3 x 2 factorial of five suspects, and what they can tell.

No sixteen of the 108 cells are balanced in factors of two and three levels (an orthogonal array would need 36), so the
cells are D-optimal: found by `search` for the model of all main effects and two interactions that theory predicts (a
window of 256 hurts more without a sink, and more in the sequential layer). Estimable: every main effect (8 columns),
those two interactions, and 5 residual degrees of freedom (7 without the interactions; the two repeated cells add 2 of
pure error). All other interactions are partly aliased with the main effects; `lack_of_fit` says whether they matter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from l2a_jax.study import effects
from l2a_jax.study.effects import Interaction

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
RUNS = 16
CHOSEN = (5, 9, 19, 28, 40, 42, 50, 53, 58, 63, 66, 74, 89, 93, 97, 100)
"""Places in the full factorial, the last factor fastest: `search(seed=2)`."""
REPLICATED = (7, 8)
"""Which of the sixteen are run twice, with another seed: one of each topology."""
SHORT = {
    "topology": lambda level: level[:3], "sinks": lambda level: f"k{level}",
    "rope": lambda level: level.replace(":", ""), "window": lambda level: f"w{level}",
    "leakage": lambda level: f"l{level:g}",
}


def factorial() -> list[dict[str, Any]]:
    """All 108 cells."""
    return [dict(zip(FACTORS, levels, strict=True)) for levels in itertools.product(*FACTORS.values())]


def cells() -> list[dict[str, Any]]:
    """The sixteen."""
    everything = factorial()
    return [everything[index] for index in CHOSEN]


def search(seed: int = 2, starts: int = 6) -> tuple[int, ...]:
    """The choice made anew."""
    return tuple(effects.d_optimal(factorial(), RUNS, FACTORS, INTERACTIONS, seed=seed, starts=starts))


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
