"""Arms of the study that wait for a machine, in the order of what they decide.

    norms      what of a ratio below 1 is adaptation to the text: the repair's norms, trained with everything routed
    forced     does attention absorb decisions? l2a_ft under learned, frozen random and static ones, each then
               evaluated under the others
    border     where l2a_ft breaks: learning rates at 12M tokens; and a text read again and again
    layer      settings of the sequential layer that lose benchmark points as reported

The report leaves a row of these groups out until it has a file.
"""

from __future__ import annotations

import itertools

from l2a_jax.research.replication.builders import LONG, PAPER, make_row
from l2a_jax.research.replication.row import BENCHMARKS, Measures, Row
from l2a_jax.research.replication.under import static_shares

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


RATES = (0.0, 0.0001, 0.0, 0.0378, 0.006, 0.0424, 0.0091, 0.0208, 0.0003, 0.2132, 0.0123, 0.272, 0.0159, 0.1388, 0.0412,
         0.0339, 0.3213, 0.0966, 0.0073, 0.0113, 0.1014, 0.1732, 0.1493, 0.0919)
"""Share of tokens that the two seeds of `l2a_ft-repair` route in each layer, their mean."""


def _forced() -> list[Row]:
    """Absorption's decisive arm, on the layer of `l2a_ft-repair`."""
    layer = {"topology": "parallel", "share_attention": True, "sinks": 4, "rope": "none", "leakage": 1.0, "window": 256}
    kinds = {"learned": {"penalty": 0.3, "router_lr": 3e-4}, "frozen": {"forced": RATES},
             "static": {"forced": static_shares(RATES)}}
    question = "does attention absorb the decisions that it is trained under?"
    return [make_row(f"l2a_ft-{kind}-s{seed}", "forced", question, "0.5b", "l2a_ft", seed=seed, **layer, **given,
                     measures=Measures(tasks=("perplexity", "audit", "under", "needle"), controls=True, audit_seeds=3,
                                       held_out=False, under=(f"l2a_ft-learned-s{seed}", RATES)))
            for seed in (2, 3, 4) for kind, given in kinds.items()]


def _border() -> list[Row]:
    """The paper's layer at a window of 256; 5e-5 is `l2a_ft-diverse-0.5b`."""
    health = Measures(tasks=("perplexity", "audit", "needle", "collapse", *BENCHMARKS, "symptoms"))
    rates = [make_row(f"l2a_ft-12M-lr{rate:g}", "border", "at what learning rate does l2a_ft break?", "0.5b", "l2a_ft",
                      lr=rate, window=256, measures=health, **PAPER) for rate in (1e-4, 3e-4, 1e-3, 3e-3)]
    return rates + [make_row(f"l2a_ft-{name}-lr{rate:g}", "border", "do the reported symptoms come from memorisation?",
                             "0.5b", "l2a_ft", tokens=tokens, unique=unique, lr=rate, window=256, measures=health,
                             **PAPER) for rate in (5e-5, 3e-4)
                    for name, unique, tokens in (("1M-12times", 1_000_000, 12_000_000),
                                                 ("100k-100times", 100_000, 10_000_000))]


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


GROUPS = {"norms": _norms, "forced": _forced, "border": _border, "layer": _layer}
