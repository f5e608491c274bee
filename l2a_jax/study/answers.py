"""The report's first page: what the rows that were run say to each question, every number taken from them.

A sentence appears once its rows exist; words of judgement ("agrees", "holds") follow rules that stand here.
"""

from __future__ import annotations

from typing import Any

from l2a_jax.evaluation import reported

Fact = dict[str, Any]
AGREES = 1.25
"""A ratio of perplexities agrees with a reported one within this factor: other texts and checkpoints were read."""
NEUTRAL = 1.05
"""A perplexity up to this times the baseline's is near-neutral; the study's own near-neutral row has no baseline."""
CHANGED = ("lr", "master_dtype")
"""Settings that a row of the collapse sweep changes on purpose; `penalty` too, above 1."""


def answers(made: dict[str, Any]) -> list[str]:
    """Markdown list items, in the order of the report's sections."""
    rows = [row for row in made["rows"] if "device" in row]
    parts = (_main(rows), _window(rows), _collapse(rows), _autopsy(made["instruments"]["autopsy"]),
             _damage(made["damage"]), _noise(rows), _repair(rows), _needle(rows), _absorption(rows))
    return [f"- {sentence}" for part in parts for sentence in part]


def _ratio(row: Fact) -> float:
    return row["perplexity_ratio"]["ratio"]


def _reported_ratio(row: Fact) -> tuple[float, str] | None:
    """(perplexity over its baseline's, needle) of the study's row for this size and regime on the diverse mix."""
    found = reported.match(f"qwen2.5-{row['size']}", row["regime"])
    base = reported.match(f"qwen2.5-{row['size']}", "baseline")
    return None if found is None or base is None else (found.perplexity / base.perplexity, found.needle)


def _main(rows) -> list[str]:
    out = []
    for row in rows:
        if row["group"] != "main" or row["regime"] == "baseline" or row["data"] != "diverse":
            continue
        if row["settings"]["window"] != 256 or row["perplexity_ratio"] is None:
            continue
        theirs = _reported_ratio(row)
        if theirs is None:
            continue
        ratio, needle = theirs
        agrees = max(_ratio(row) / ratio, ratio / _ratio(row)) <= AGREES
        out.append(f"**{row['regime']}, {row['size']}, diverse**: perplexity x{_ratio(row):.2f} of the baseline's "
                   f"here, x{ratio:.2f} reported; needle {row['needle']['exact_match']:.0%} here, {needle} reported: "
                   + ("agrees." if agrees else "**disagrees**."))
    return out


def _window(rows) -> list[str]:
    out = []
    for size in dict.fromkeys(row["size"] for row in rows):
        some = {row["settings"]["window"]: row for row in rows if row["group"] == "main" and row["size"] == size
                and row["regime"] == "router_only" and row["data"] == "diverse" and row["perplexity_ratio"]}
        if len(some) > 1:
            listed = ", ".join(f"window {window:,}: x{_ratio(some[window]):.3f}, needle "
                               f"{some[window]['needle']['exact_match']:.0%}" for window in sorted(some, reverse=True))
            whole, small = _ratio(some[max(some)]), _ratio(some[min(some)])
            out.append(f"**Scale or window?** `router_only` at {size} over contexts of 2,048, all else equal: {listed}."
                       + (" A near-neutral row needs no larger model, only window = context."
                          if whole <= NEUTRAL < small and max(some) == 2_048 else ""))
    return out


def _collapse(rows) -> list[str]:
    low = [row for row in rows if row["regime"] in ("l2a_ft", "full_ft") and row["group"] in ("main", "collapse")
           and row["tokens_per_trained_parameter"] and row["tokens_per_trained_parameter"] < 1
           and row["perplexity_ratio"] is not None]
    plain = [row for row in low if not any(name in row["settings"] for name in CHANGED)
             and row["settings"].get("penalty", 0) <= 1]
    if not plain:
        return []
    finite = sum(not row["non_finite"] for row in plain)
    ratios = [row["tokens_per_trained_parameter"] for row in plain]
    out = [f"**Below one token a trained parameter** ({min(ratios):.3g} to {max(ratios):.2g}), at ordinary settings: "
           f"{finite} of {len(plain)} runs stayed finite; perplexity x{min(map(_ratio, plain)):.2f} to "
           f"x{max(map(_ratio, plain)):.2f}."]
    odd = [row for row in low if row["verdict"] not in (None, "healthy")]
    if odd:
        out[0] += " Unhealthy by the collapse report, of all: " + ", ".join(
            f"`{row['name']}` ({row['verdict']}, x{_ratio(row):.3g})" for row in odd) + "."
    return out


def _autopsy(found) -> list[str]:
    out = []
    for report in found.values():
        counted = [(sum(value is True for value in row["symptoms"].values()), row) for row in report["rows"]]
        total = len(report["rows"][0]["symptoms"])
        most = max(count for count, _ in counted)
        names = ", ".join(row["fault"] for count, row in counted if count == most)
        missing = sorted({name for count, row in counted if count == most
                          for name, value in row["symptoms"].items() if value is not True})
        out.append("**Autopsy**: " + ("all reported symptoms at once come from " if most == total else
                                       f"no single fault gives all {total} reported symptoms; {most} come from ")
                   + names + (f" (without: {', '.join(missing)})" if missing else "") + ".")
    return out


def _damage(analyses) -> list[str]:
    out = []
    for response, found in analyses.items():
        main = found["main_effects"]
        name, term = max(main["terms"].items(), key=lambda item: item[1]["share"])
        level, entry = max(term["levels"].items(), key=lambda item: abs(item[1]["difference"]))
        pure = main["pure_error"]
        out.append(f"**Damage, {response}**: {name} explains {term['share']:.0%} of the squares; {level} instead of "
                   f"{term['reference']} adds {entry['difference']:+.2f} [{entry['interval'][0]:+.2f}, "
                   f"{entry['interval'][1]:+.2f}]."
                   + (f" Main effects leave {main['residual_sd']:.3g}, repeats differ by {pure['sd']:.3g}: the other "
                      "factors act in combination." if pure and pure.get("p", 1) < 0.05 else ""))
    return out


def _noise(rows) -> list[str]:
    some = sorted((row for row in rows if row["group"] == "noise" and row["perplexity_ratio"]),
                  key=lambda row: row["settings"]["flip"])
    if len(some) < 2:
        return []
    first, last = some[0], some[-1]
    worse = _ratio(last) > _ratio(first)
    return [f"**Noise in the decisions** {'damages' if worse else 'does not damage'} training: perplexity "
            f"x{_ratio(first):.3f} without, x{_ratio(last):.3f} with {last['settings']['flip']:.0%} inverted; needle "
            f"{first['needle']['exact_match']:.0%} and {last['needle']['exact_match']:.0%}."]


def _repair(rows) -> list[str]:
    some = [row for row in rows if row["group"] == "frontier" and row["aim"]["sparsity"] and row["aim"]["perplexity"]]
    some = [row for row in some if row["audit"] and "all" in row["audit"]["worse"]]
    if not some:
        return []
    best = max(some, key=lambda row: row["sparsity"])
    others = {name: value for name, value in best["audit"]["ratio"].items() if name in ("random", "static", "none")}
    tasks = [row for row in some if all(row["aim"][task] for task in ("hellaswag", "piqa", "arc_challenge"))]
    return [f"**Repair**: {len(some)} rows leave at least 90 % unrouted at or below the baseline's perplexity, "
            f"{len(tasks)} of them with no loss on the three benchmarks beyond the aim's bounds. The sparsest, "
            f"`{best['name']}`: {best['sparsity']:.1%} unrouted, x{_ratio(best):.3f} ("
            + ", ".join(f"{name} x{value:.3f}" for name, value in others.items()) + ")."]


def _needle(rows) -> list[str]:
    some = [row for row in rows if row["group"] == "frontier" and row["aim"]["sparsity"] and row["aim"]["perplexity"]
            and row["needle"]]
    whole = [row for row in some if row["aim"]["needle"]]
    if not some:
        return []
    if whole:
        return ["**Needle**: at the baseline's at every depth and length that was looked at: "
                + ", ".join(f"`{row['name']}` (to {max(map(int, row['needle']['lengths'])):,})" for row in whole) + "."]
    best = max(some, key=lambda row: row["needle"]["lengths"]["2048"]["exact_match"] if "2048" in
               row["needle"]["lengths"] else 0.0)
    listed = ", ".join(f"{entry['exact_match']:.0%} of {int(length):,}" for length, entry in
                       best["needle"]["lengths"].items())
    return [f"**Needle**: no row with 90 % unrouted keeps it at every depth; the best, `{best['name']}`, finds "
            f"{listed}. The aim is **not reached**."]


def _absorption(rows) -> list[str]:
    some = [row for row in rows if row["absorption"] and row["absorption"]["after"]["carried"] is not None
            and row["absorption"]["before"]["carried"] is not None]
    out = []
    for row in some:
        before, after = (row["absorption"][when]["carried"] for when in ("before", "after"))
        out.append(f"**Absorption** (`{row['name']}`): of what global attention gives, the router's choice of tokens "
                   f"carries {before:.2f} before attention is trained and {after:.2f} after: "
                   + ("not absorbed." if after >= before / 2 else "absorbed."))
    return out
