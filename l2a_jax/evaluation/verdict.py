"""The collapse report's verdict: one table of rules, the first that holds decides.

"Collapse" is a word for several things: weights that are no numbers, a target that the model can see, text that turns
in circles, a router that stopped deciding. Each has a rule of its own with a threshold, so that a verdict can be
argued with. Greedy text is measured but judges nothing: sound small models loop under greedy decoding too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

_COMPARE = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}


class Rule(NamedTuple):
    """`verdict` holds where the measure named `measure` compares with `threshold`; a measure not taken says nothing."""

    verdict: str
    measure: str
    compare: str
    threshold: float
    meaning: str

    def holds(self, value: float | None) -> bool:
        """Whether the rule applies. A value that is not a number is out of bounds of every rule."""
        return value is not None and (math.isnan(value) or _COMPARE[self.compare](value, self.threshold))


HEALTHY = "healthy"
RULES = (
    Rule("non-finite", "weights_not_finite", ">", 0, "parameters that are NaN or infinite"),
    Rule("non-finite", "logits_not_finite", ">", 0, "logits on held-out text that are NaN or infinite"),
    Rule("non-finite", "training_losses_not_finite", ">", 0, "training steps whose loss was NaN or infinite"),
    Rule("leak", "future_seen", ">", 0.05, "change of the hidden state, as a share of its size, when only later tokens "
         "change: a causal model has none"),
    Rule("leak", "future_routing", ">", 0.01, "share of decisions that change when only later tokens change"),
    Rule("loss-perplexity mismatch", "training_loss", "<", 0.02, "a training loss (nats) that no text allows: a target "
         "that is seen, or NaN logged as zero"),
    Rule("loss-perplexity mismatch", "loss_gap", ">", 1.5, "held-out loss minus training loss, nats: a leak in "
         "training alone, or memorised text"),
    Rule("constant output", "logit_spread", "<", 1e-3, "largest minus smallest logit of a token, mean"),
    Rule("constant output", "top_token_share", ">", 0.9, "share of held-out places where one and the same token is "
         "the likeliest"),
    Rule("worse than chance", "loss_over_uniform", ">=", 1.0, "held-out loss over ln V, that of a uniform guess"),
    Rule("degenerate text", "sampled_ends_in_loop", ">", 0.5, "share of texts sampled at temperature 1 that end in a "
         "loop"),
    Rule("degenerate text", "sampled_distinct_2", "<", 0.3, "different bigrams over all, of texts sampled at "
         "temperature 1"),
    Rule("never routes", "sparsity", ">=", 0.999, "share of decisions that are local"),
    Rule("always routes", "sparsity", "<=", 0.001, "share of decisions that are local"),
)


def judge(measures: Mapping[str, float | None]) -> dict[str, Any]:
    """{"verdict", "rule", "findings", "rules"}: the first rule that holds, all that hold, and the table with what was
    measured. `healthy` where none holds, and then only as far as the rules not measured are listed."""
    table = [{**rule._asdict(), "value": measures.get(rule.measure),
              "holds": rule.holds(measures.get(rule.measure))} for rule in RULES]
    findings = [row for row in table if row["holds"]]
    missing = list(dict.fromkeys(row["measure"] for row in table if row["value"] is None))
    return {"verdict": findings[0]["verdict"] if findings else HEALTHY,
            "rule": sentence(findings[0]) if findings else "no rule of the table holds",
            "findings": list(dict.fromkeys(row["verdict"] for row in findings)), "not_measured": missing,
            "rules": table}


def sentence(row: Mapping[str, Any]) -> str:
    """A rule with its measure, as a person would read it."""
    return f"{row['measure']} = {row['value']:.4g} {row['compare']} {row['threshold']:g} ({row['meaning']})"
