"""Every row of the study, in groups that answer one question each (issue texts: `docs` of the report).

    main       the table: four regimes, two sizes, two mixtures; window = context apart from smaller windows
    collapse   tokens per trained parameter from 0.005 to 6, by tokens and by how much is trained
    damage     a designed fraction of five factors (`damage.py`)
    together   what that fraction could not tell apart: topology, sinks and window in all combinations
    frontier   the repair: penalties, windows, lengths, seeds, and what keeps the needle
    noise      decisions flipped at random in training
    absorption do learned decisions matter once attention has adapted?

The groups of `arms` stand behind these: what they ask waits for a machine.
"""

from __future__ import annotations

import dataclasses
import itertools

from l2a_jax.errors import UserError
from l2a_jax.research.replication import arms, damage
from l2a_jax.research.replication.builders import BASELINE, LAYERS, LONG, PAPER, evenly_spaced, make_row, repair
from l2a_jax.research.replication.row import BENCHMARKS, DIVERSE, WIKITEXT, Measures, Row

HEALTH = Measures(tasks=("perplexity", "needle", "collapse", *BENCHMARKS), limit=500)
SUSPECT = Measures(tasks=("perplexity", "audit", "needle", "residual"), audit_windows=16, audit_seeds=1, held_out=False)


def _main() -> list[Row]:
    """The study's likely choices (`PAPER`) for every regime, a window of 256 and, apart from it, window = context; the
    frontier's rows are the repaired ones."""
    compared = Measures(tasks=("perplexity", "contexts", "needle", "collapse", *BENCHMARKS), contexts=(8_192, 32_768),
                        needle_lengths=(2_048, 8_192, 32_768))
    rows = []
    for size, tokens in (("0.5b", 12_000_000), ("1.5b", 4_000_000)):  # a third at 1.5B: so many fit the time on a card
        rows.append(make_row(BASELINE[size], "main", "what everything is compared with", size, "baseline",
                         measures=compared))
        mixtures, regimes = {"diverse": DIVERSE, "wikitext": WIKITEXT}, ("router_only", "l2a_ft", "full_ft")
        rows += [make_row(f"{regime}-{mixture}-{size}", "main",
                          "what does each regime cost, on the study's likely layer?", size, regime,
                          data=mixtures[mixture], tokens=tokens, window=256, **PAPER,
                          measures=Measures(tasks=("perplexity", "audit", "needle", "collapse", *BENCHMARKS)))
                 for mixture, regime in itertools.product(mixtures, regimes)]
        rows += [make_row(f"router_only-w{window}-diverse-{size}", "main",
                          "is the near-neutral row one of scale, or of window = context?", size, "router_only",
                          tokens=tokens, window=window, **PAPER) for window in (2_048, 1_024)]
    rows.append(make_row("router_only-w2048-wikitext-3b", "main", "the study's near-neutral row", "3b", "router_only",
                     data=WIKITEXT, tokens=8_000_000, window=2_048, **PAPER, not_run="no 3B weights were at hand"))
    return rows


def _collapse() -> list[Row]:
    """l2a_ft by tokens (88M parameters: 0.005 to 0.5 a parameter), by trained layers at 12M tokens, and the other two
    regimes at matching ratios. The paper's layer, window 256."""
    paper = {**PAPER, "window": 256}

    def small(name, question, regime="l2a_ft", measures=HEALTH, layer=paper, **given):
        return make_row(name, "collapse", question, "0.5b", regime, measures=measures, **given, **layer)

    def autopsy(name, question, faults=(), **given):
        return small(name, question, measures=Measures(tasks=("perplexity", "autopsy"), limit=500, faults=faults),
                     **given)

    same = "the same ratio in another regime"
    return [
        *(small(f"l2a_ft-{label}-s{seed}", "does l2a_ft collapse as tokens fall?", tokens=tokens, seed=seed)
          for label, tokens, seed in (("0.44M", 440_000, 0), ("0.44M", 440_000, 1), ("1.3M", 1_300_000, 0),
                                      ("1.3M", 1_300_000, 1), ("4.4M", 4_400_000, 0), ("44M", 44_000_000, 0))),
        small("l2a_ft-12M-s1", "the same, another seed", seed=1),
        *(small(f"l2a_ft-12M-{count}of24-s0", "does it collapse as parameters grow?",
                attention_layers=evenly_spaced(count, LAYERS["0.5b"])) for count in (1, 3, 6, 12)),
        small("full_ft-2.7M-s0", same, "full_ft", tokens=2_700_000),  # 0.005 and 0.05 of 538M
        small("full_ft-27M-s0", same, "full_ft", tokens=27_000_000),
        small("router_only-16k-s0", same, "router_only", tokens=16_384),  # 0.25, 1 and 3 of 64,512
        small("router_only-65k-s0", same, "router_only", tokens=65_536),
        small("router_only-197k-s0", same, "router_only", tokens=196_608),
        *(small(f"l2a_ft-1.3M-lr{rate:g}", "is it the learning rate?", tokens=1_300_000, lr=rate)
          for rate in (3e-4, 3e-3)),
        small("l2a_ft-1.3M-bfloat16", "are pure bfloat16 updates to blame?", tokens=1_300_000,
              master_dtype="bfloat16"),
        small("l2a_ft-1.3M-penalty10", "does an overgrown penalty collapse it?", tokens=1_300_000,
              layer={**paper, "penalty": 10.0}),
        autopsy("autopsy", "which fault produces the reported symptoms?", tokens=1_000_000),
        autopsy("autopsy-leak-4.4M", "what does the leak do in a longer run?", ("leak",), tokens=4_400_000, seed=1)]


def _damage() -> list[Row]:
    """Router-only, two attention sets in every cell so that the same 64,512 parameters are trained."""
    return [_cell(cell, "damage", "what damages router-only?", seed) for index, cell in enumerate(damage.cells())
            for seed in ((0, 1) if index in damage.REPLICATED else (0,))]


def _together() -> list[Row]:
    return [_cell(cell, "together", "which suspects do damage only together?") for cell in damage.follow_up()]


def _cell(cell, group, question, seed=0) -> Row:
    return make_row(damage.name_of(cell) + (f"-s{seed}" if seed else ""), group, question, "0.5b", "router_only",
                tokens=4_000_000, seed=seed, share_attention=False, penalty=0.1, router_lr=3e-4, unroll=False,
                measures=SUSPECT, factors=tuple((factor, str(level)) for factor, level in cell.items()), **cell)


def _frontier() -> list[Row]:
    """The repaired layer; trained on novels, code, mathematics and science, evaluated on WikiText-2."""
    question = "how much can go unrouted at no loss?"
    full = Measures(tasks=("perplexity", "audit", "needle", *BENCHMARKS, "task_controls"),
                    needle_lengths=(2_048, 8_192), controls=True)
    # Without a penalty: what the trained norms do alone, the control of every gain.
    penalties = {128: (0.1, 0.3, 1.0), 256: (0.0, 0.05, 0.1, 0.3, 0.5, 1.0, 2.0), 512: (0.1, 0.3, 1.0),
                 1_024: (0.1, 0.3, 1.0)}
    points = [(window, penalty) for window in penalties for penalty in penalties[window]]
    rows = [repair(f"w{window}-p{penalty:g}-s{seed}", question, full, window, penalty, seed=seed)
            for window, penalty in points for seed in range(3 if (window, penalty) in ((256, 0.3), (256, 0.5)) else 1)]
    learned = Measures(tasks=("perplexity", "audit", "flips", "residual", "routed", "prunable"))
    rows.append(repair("w256-p0.4-s0", "what did routing learn?", learned, 256, 0.4))
    # The first noise arms found more of the needle the more decisions training inverted.
    far = dataclasses.replace(full, needle_lengths=(2_048, 8_192, 32_768))
    rows += [repair(f"w256-p{penalty:g}-f0.3-s0", "do inverted decisions keep the needle?", far, 256, penalty,
                     flip=0.3) for penalty in (0.3, 0.5, 0.8)]
    asked = dataclasses.replace(far, tasks=(*far.tasks, "thresholds", "picture"))
    rows += [repair(f"{label}-s0", "does text that repeats itself keep the needle?", asked, window, penalty,
                     flip=flip, echo=echo) for label, window, penalty, flip, echo in (
        ("w256-p0.3-e0.2", 256, 0.3, 0.0, 0.2), ("w256-p0.5-e0.2", 256, 0.5, 0.0, 0.2),
        ("w256-p0.5-f0.3-e0.2", 256, 0.5, 0.3, 0.2), ("w512-p0.2-f0.3-e0.5", 512, 0.2, 0.3, 0.5),
        ("w1024-p0.1-f0.3-e0.5", 1_024, 0.1, 0.3, 0.5))]
    rows += [repair(f"w256-p{penalty:g}-1.5b", question, full, 256, penalty, "1.5b", tokens=8_000_000)
             for penalty in (0.1, 0.3, 1.0)]
    long = Measures(tasks=("perplexity", "contexts", "audit", "needle", *BENCHMARKS), contexts=(8_192, 32_768),
                    needle_lengths=(2_048, 8_192, 32_768), controls=True)
    rows += [repair(f"t{length}-w{window}-p0.3", "does it hold over long texts?", long, window, 0.3, seq_len=length,
                     **LONG[length]) for length, window in itertools.product(LONG, (256, 1_024))]
    # An echo is a number a row, so that longer rows need a greater share of them for as many a token. The penalties
    # beyond the first at a window, and the seeds, were added after the first rows had been seen.
    everything = dataclasses.replace(long, tasks=(*long.tasks, "thresholds"))
    explained = dataclasses.replace(everything, tasks=(*everything.tasks, *learned.tasks[2:], "picture"))
    for length, window, penalty, echo, seeds in (
            (8_192, 256, 0.5, 0.2, 1), (8_192, 256, 0.3, 1.0, 1), (8_192, 256, 0.6, 1.0, 1), (8_192, 512, 0.2, 1.0, 1),
            (8_192, 1_024, 0.1, 1.0, 1), (8_192, 1_024, 0.2, 1.0, 3), (8_192, 1_024, 0.5, 1.0, 3),
            (32_768, 1_024, 0.1, 1.0, 1), (32_768, 1_024, 0.2, 1.0, 1)):
        rows += [repair(f"t{length}-w{window}-p{penalty:g}-f0.3-e{echo:g}" + (f"-s{seed}" if seed else ""),
                         "everything that keeps the needle at once",
                         explained if (penalty, seed) == (0.5, 1) else everything, window, penalty, seq_len=length,
                         flip=0.3, echo=echo, seed=seed, **LONG[length]) for seed in range(seeds)]
    return rows


def _noise() -> list[Row]:
    """Training that inverts a share of its decisions: the third suspect. Measured with the router's own."""
    return [make_row(f"noise-f{flip:g}", "noise", "does noise in the decisions damage router-only?", "0.5b",
                     "router_only", tokens=4_000_000, window=256, penalty=0.3, router_lr=3e-4, flip=flip, unroll=False,
                     measures=SUSPECT) for flip in (0.0, 0.02, 0.1, 0.3)]


def _absorption() -> list[Row]:
    """l2a_ft on the repaired layer, whose decisions matter at the start; the frontier has its router-only twin."""
    measures = Measures(tasks=("perplexity", "audit", "absorption", "needle", *BENCHMARKS), limit=500, audit_seeds=3)
    layer = {"topology": "parallel", "share_attention": True, "sinks": 4, "rope": "none", "leakage": 1.0,
             "window": 256, "penalty": 0.3, "router_lr": 3e-4}
    return [make_row(f"l2a_ft-repair-s{seed}", "absorption", "do decisions matter once attention has adapted?", "0.5b",
                 "l2a_ft", seed=seed, measures=measures, **layer) for seed in (0, 1)]


GROUPS = {"main": _main, "collapse": _collapse, "damage": _damage, "together": _together, "noise": _noise,
          "frontier": _frontier, "absorption": _absorption, **arms.GROUPS}


def all_rows() -> list[Row]:
    """The table, in the order of the groups."""
    return [row for make in GROUPS.values() for row in make()]


def choose(names: tuple[str, ...] = (), groups: tuple[str, ...] = ()) -> list[Row]:
    """Rows by name, in that order, then those of groups (both empty: all). UserError on an unknown one."""
    table = {row.name: row for row in all_rows()}
    for name in names:
        if name not in table:
            raise UserError(f"--rows: there is no row {name!r}; see --list")
    for group in groups:
        if group not in GROUPS:
            raise UserError(f"--group is {group!r}; expected some of {', '.join(GROUPS)}")
    named = dict.fromkeys(names)  # each once
    return [table[name] for name in named] + [row for name, row in table.items() if name not in named and (
        row.group in groups or not (names or groups))]


def with_baselines(rows: list[Row]) -> list[Row]:
    """The rows, with those in front that their differences are taken with, or whose decisions they need."""
    needed = {row.baseline for row in rows} | {row.measures.under[0] for row in rows if row.measures.under}
    needed -= {row.name for row in rows}
    return [row for row in all_rows() if row.name in needed] + rows
