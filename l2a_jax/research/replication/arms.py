"""Arms of the study that wait for a machine, in the order of what they decide.

    norms      what of a ratio below 1 is adaptation to the text: the repair's norms, trained with everything routed
    forced     does attention absorb decisions? l2a_ft under learned, frozen random and static ones, each then
               evaluated under the others
    border     where l2a_ft breaks: learning rates at 12M tokens; and a text read again and again
    far        a new seed of the main table's regimes and of the final router: RULER, reach, and everything routed
    layer      settings of the sequential layer that lose benchmark points as reported

The report leaves a row of these groups out until it has a file.
"""

from __future__ import annotations

import dataclasses
import itertools

from l2a_jax.research.replication.builders import LONG, PAPER, make_row, repair
from l2a_jax.research.replication.row import BENCHMARKS, Measures, Row
from l2a_jax.research.replication.under import static_shares
from l2a_jax.training.presets import PRESETS

NEAR = Measures(tasks=("perplexity", "needle", *BENCHMARKS))


def _norms() -> list[Row]:
    """Twins of the frontier's rows at the same tokens, rate and text, the long ones of the aim's; and headline rows in
    a new seed, asked everything again with everything routed."""
    question = "what of a ratio below 1 is adaptation to the text?"
    far = Measures(tasks=("perplexity", "contexts", "needle", *BENCHMARKS), contexts=(8_192, 32_768),
                   needle_lengths=(2_048, 8_192, 32_768))
    both = Measures(tasks=("perplexity", "audit", "needle", *BENCHMARKS, "all_routed"), controls=True)
    return [
        *(make_row(f"norms_only-s{seed}", "norms", question, "0.5b", "norms_only", seed=seed, measures=NEAR)
          for seed in range(3)),
        *(make_row(f"norms_only-t8192-e1-s{seed}", "norms", question, "0.5b", "norms_only", seed=seed, measures=far,
                   seq_len=8_192, echo=1.0, **LONG[8_192]) for seed in range(3)),
        make_row("norms_only-1.5b", "norms", question, "1.5b", "norms_only", tokens=8_000_000, measures=NEAR),
        repair("w256-p0.3-s3", question, both, 256, 0.3, group="norms", seed=3),
        *(repair(f"w256-p{penalty:g}-1.5b-s1", question, both, 256, penalty, "1.5b", "norms", tokens=8_000_000, seed=1)
          for penalty in (0.1, 0.3, 1.0))]


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


def _far() -> list[Row]:
    """RULER takes two minutes at 0.5B. The plain model is asked too, in rows of its own, so that those that were run
    stay as they are."""
    question = "what is left beyond the window, and with everything routed?"
    asked = ("perplexity", "contexts", "needle", *BENCHMARKS, "reach", "ruler")
    plain = Measures(tasks=asked, contexts=(8_192, 32_768), needle_lengths=(2_048, 8_192, 32_768))
    routed = dataclasses.replace(plain, tasks=(*asked, "audit", "all_routed"))
    far = PRESETS["repair-far"].values
    far = {name: value for name, value in far.items() if name in (
        "window", "penalty", "router_lr", "seq_len", "batch_size", "flip", "echo")}
    rows = []
    for size, tokens in (("0.5b", 12_000_000), ("1.5b", 4_000_000)):
        rows += [make_row(f"baseline-far-{size}", "far", question, size, "baseline", measures=plain),
                 make_row(f"router_only-far-{size}-s3", "far", question, size, "router_only", tokens=tokens, seed=3,
                          measures=routed, **far),
                 make_row(f"router_strict-far-{size}", "far", question, size, "router_strict", tokens=tokens,
                          measures=routed, **{**far, "penalty": 0.3})]
        rows += [make_row(f"{regime}-diverse-{size}-s2", "far", question, size, regime, tokens=tokens, seed=2,
                          window=256, measures=routed, **PAPER)
                 for regime in ("router_only", "l2a_ft", "full_ft")]
    return [dataclasses.replace(row, baseline=row.baseline and f"baseline-far-{row.size}") for row in rows]


GROUPS = {"norms": _norms, "forced": _forced, "border": _border, "far": _far, "layer": _layer}
