"""Arms of the study that wait for a machine, in the order of what they decide.

    norms      what of a ratio below 1 is adaptation to the text: the repair's norms, trained with everything routed
    border     where l2a_ft breaks: learning rates at 12M tokens
    layer      settings of the sequential layer that lose benchmark points as reported

The report leaves a row of these groups out until it has a file.
"""

from __future__ import annotations

import itertools

from l2a_jax.research.replication.builders import LONG, PAPER, make_row
from l2a_jax.research.replication.row import BENCHMARKS, Measures, Row

NEAR = Measures(tasks=("perplexity", "needle", *BENCHMARKS))


def _norms() -> list[Row]:
    """Twins of the frontier's rows at the same tokens, rate and text; the long ones are those of the aim."""
    question = "what of a ratio below 1 is adaptation to the text?"
    far = Measures(tasks=("perplexity", "contexts", "needle", *BENCHMARKS), contexts=(8_192, 32_768),
                   needle_lengths=(2_048, 8_192, 32_768))
    return [
        *(make_row(f"norms_only-s{seed}", "norms", question, "0.5b", "norms_only", seed=seed, measures=NEAR)
          for seed in range(3)),
        *(make_row(f"norms_only-t8192-e1-s{seed}", "norms", question, "0.5b", "norms_only", seed=seed, measures=far,
                   seq_len=8_192, echo=1.0, **LONG[8_192]) for seed in range(3)),
        make_row("norms_only-1.5b", "norms", question, "1.5b", "norms_only", tokens=8_000_000, measures=NEAR)]


def _border() -> list[Row]:
    """The paper's layer at a window of 256; 5e-5 is `l2a_ft-diverse-0.5b`."""
    health = Measures(tasks=("perplexity", "audit", "needle", "collapse", *BENCHMARKS))
    return [make_row(f"l2a_ft-12M-lr{rate:g}", "border", "at what learning rate does l2a_ft break?", "0.5b", "l2a_ft",
                     lr=rate, window=256, measures=health, **PAPER) for rate in (1e-4, 3e-4, 1e-3, 3e-3)]


def _layer() -> list[Row]:
    """Router-only; what the main table and the damage experiment did not cross. At 1.5B the other two windows of the
    main table's."""
    question, measures = "which sequential layer loses benchmark points as reported?", Measures()
    crossed = itertools.product((128, 256, 512, 1_024), (1.31e-3, 0.1), (0.1, 1.0))
    rows = [make_row(f"layer-w{window}-p{penalty:g}-l{leakage:g}", "layer", question, "0.5b", "router_only",
                     tokens=4_000_000, window=window, measures=measures,
                     **{**PAPER, "penalty": penalty, "leakage": leakage}) for window, penalty, leakage in crossed]
    return rows + [make_row(f"layer-w{window}-1.5b", "layer", question, "1.5b", "router_only", tokens=4_000_000,
                            window=window, measures=measures, **PAPER) for window in (128, 512)]


GROUPS = {"norms": _norms, "border": _border, "layer": _layer}
