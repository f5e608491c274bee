"""The report's first page: what the rows that were run say to each question, every number taken from them.

A sentence appears once its rows exist; words of judgement ("agrees", "helps") follow rules that stand here.
"""

from __future__ import annotations

import itertools
from typing import Any

from l2a_jax.evaluation import reported
from l2a_jax.research.replication import damage

Fact = dict[str, Any]
AGREES = 1.25
"""A ratio of perplexities agrees with a reported one within this factor: other texts and checkpoints were read."""
NEUTRAL = 1.05
"""A perplexity up to this times the baseline's is near-neutral; the study's own near-neutral row has no baseline."""
CHANGED = ("lr", "master_dtype")
"""Settings that a row of the collapse sweep changes on purpose; `penalty` too, above 1."""
LEVERS = {"seq_len": "longer rows", "flip": "inverted decisions", "echo": "echoes"}
"""What training may do to keep the needle, by setting."""


def answers(made: dict[str, Any]) -> list[str]:
    """Markdown list items, in the order of the report's sections."""
    rows = [row for row in made["rows"] if "device" in row]
    parts = (_main(rows), _window(rows), _collapse(rows), _autopsy(made["instruments"]["autopsy"]),
             _damage(made["damage"]), _together(made["together"]["crossed"]), _noise(rows), _repair(rows),
             _needle(rows), _kept(rows), _aim(rows), _absorption(rows))
    return [f"- {sentence}" for part in parts for sentence in part]


def _ratio(row: Fact) -> float:
    return row["perplexity_ratio"]["ratio"]


def _found(row: Fact) -> str:
    return "not measured" if row["needle"] is None else f"{row['needle']['exact_match']:.0%}"


def _measured(row: Fact) -> bool:
    return row["perplexity_ratio"] is not None


def _main(rows) -> list[str]:
    out = []
    for row in filter(_measured, rows):
        if row["group"] != "main" or row["data"] != "diverse" or row["settings"].get("window") != 256:
            continue
        theirs, base = (reported.match(f"qwen2.5-{row['size']}", regime) for regime in (row["regime"], "baseline"))
        if theirs is None or base is None:
            continue
        ratio = theirs.perplexity / base.perplexity
        agrees = max(_ratio(row) / ratio, ratio / _ratio(row)) <= AGREES
        out.append(f"**{row['regime']}, {row['size']}, diverse**: perplexity x{_ratio(row):.2f} of the baseline's, "
                   f"x{ratio:.2f} reported: {'agrees' if agrees else '**disagrees**'}. Needle {_found(row)}, "
                   f"{theirs.needle} reported.")
    return out


def _window(rows) -> list[str]:
    out = []
    for size in dict.fromkeys(row["size"] for row in rows):
        some = {row["settings"]["window"]: row for row in filter(_measured, rows) if row["group"] == "main"
                and row["size"] == size and row["regime"] == "router_only" and row["data"] == "diverse"}
        if len(some) > 1:
            listed = "; ".join(f"window {window:,}: x{_ratio(some[window]):.3f}, needle {_found(some[window])}"
                               for window in sorted(some, reverse=True))
            whole, small = _ratio(some[max(some)]), _ratio(some[min(some)])
            out.append(f"**Scale or window?** `router_only` at {size} over contexts of 2,048, else equal: {listed}."
                       + (" At this size window = context is enough for a near-neutral row."
                          if whole <= NEUTRAL < small and max(some) == 2_048 else ""))
    return out


def _collapse(rows) -> list[str]:
    low = [row for row in rows if row["regime"] in ("l2a_ft", "full_ft") and row["group"] in ("main", "collapse")
           and (row["tokens_per_trained_parameter"] or 1) < 1]
    plain = [row for row in low if not any(name in row["settings"] for name in CHANGED)
             and row["settings"].get("penalty", 0) <= 1]
    if not any(map(_measured, plain)):
        return []
    finite = [row for row in plain if not row["non_finite"] and _measured(row)]
    tokens = [row["tokens_per_trained_parameter"] for row in plain]
    out = (f"**Below one token a trained parameter** ({min(tokens):.3g} to {max(tokens):.2g}; l2a_ft and full_ft at "
           f"ordinary settings): {len(finite)} of {len(plain)} runs stayed finite")
    for data in dict.fromkeys(row["data"] for row in finite):
        ratios = [_ratio(row) for row in finite if row["data"] == data]
        out += f", trained on {data} at perplexity x{min(ratios):.2f} to x{max(ratios):.2f}"
    asked = [row for row in plain if row["needle"] is not None]
    lost = [row for row in asked if row["needle"]["exact_match"] <= 0.2]
    out += "."
    if lost:
        out += (f" {len(lost)} of the {len(asked)} that were asked have lost the needle, all with at most "
                f"{max(row['tokens_seen'] for row in lost) / 1e6:.2g}M tokens.")
    odd = [row for row in low if row["verdict"] not in (None, "healthy")]
    if odd:
        out += " Unhealthy by the collapse report, of all: " + ", ".join(
            f"`{row['name']}` ({row['verdict']}" + (f", x{_ratio(row):.3g})" if _measured(row) else ")")
            for row in odd) + "."
    return [out]


def _autopsy(found) -> list[str]:
    out = []
    for name, report in found.items():
        rows = {row["fault"]: {symptom for symptom, value in row["symptoms"].items() if value is True}
                for row in report["rows"]}
        total = len(report["rows"][0]["symptoms"])
        tried = len({row["settings"]["name"] for row in report["rows"] if "settings" in row} - {"none"})
        most = max(map(len, rows.values()))
        faults = ", ".join(fault for fault, symptoms in rows.items() if len(symptoms) == most)
        never = [symptom for symptom in report["rows"][0]["symptoms"] if all(
            symptom not in symptoms for symptoms in rows.values() if len(symptoms) == most)]
        out.append(f"**Autopsy** (`{name}`, {tried} fault{'s' * (tried != 1)} tried): {most} of the {total} reported "
                   f"symptoms at once, from {faults}"
                   + (f"; without a fault the run shows {', '.join(sorted(rows['none']))}" if rows.get("none") else "")
                   + "." + "".join(f" Missing: {symptom}, which " + (f"comes from {', '.join(causes)}." if (
                       causes := [fault for fault, symptoms in rows.items() if symptom in symptoms])
                       else "none of them gives.") for symptom in never))
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


def _together(crossed) -> list[str]:
    """The combinations of topology, sinks and window that cost more than near-neutral."""
    cells = [(f"{name}, window {window:,}", value) for name, values in crossed
             for window, value in zip(damage.FACTORS["window"], values, strict=True) if value is not None]
    harmful = sorted(((value["ratio"], name) for name, value in cells if value["ratio"] > NEUTRAL), reverse=True)
    if len(cells) < 2:
        return []
    return [f"**Topology, sinks and window together**: of {len(cells)} combinations that were run, {len(harmful)} cost "
            f"more than x{NEUTRAL}" + (": " + "; ".join(f"{name} x{ratio:.2f}" for ratio, name in harmful)
                                       if harmful else "") + "."]


def _noise(rows) -> list[str]:
    some = sorted((row for row in filter(_measured, rows) if row["group"] == "noise"),
                  key=lambda row: row["settings"]["flip"])
    if len(some) < 2:
        return []
    first, last = some[0], some[-1]
    (low, high), (their_low, their_high) = (row["perplexity_ratio"]["ratio_95"] for row in (last, first))
    said = "damages training" if low > their_high else "helps training" if high < their_low else "changes little"
    return [f"**Noise in the decisions** {said}: perplexity x{_ratio(first):.3f} without, x{_ratio(last):.3f} with "
            f"{last['settings']['flip']:.0%} inverted; needle {_found(first)} and {_found(last)}; unrouted "
            f"{first['sparsity']:.1%} and {last['sparsity']:.1%}, which is part of it. One seed each."]


def _repair(rows) -> list[str]:
    some = [row for row in rows if row["group"] == "frontier" and row["aim"]["sparsity"] and row["aim"]["perplexity"]
            and row["audit"] and "ratio" in row["audit"]]
    if not some:
        return []
    best = max(some, key=lambda row: row["sparsity"])
    others = {name: value for name, value in best["audit"]["ratio"].items() if name in ("random", "static", "none")}
    asked = [[row["aim"][task] for task in ("hellaswag", "piqa", "arc_challenge")] for row in some]
    asked = [reached for reached in asked if None not in reached]
    return [f"**Repair**: {len(some)} rows leave at least 90 % unrouted at or below the baseline's perplexity; "
            f"{sum(map(all, asked))} of the {len(asked)} that were asked exclude a loss beyond the aim's bounds on the "
            "three benchmarks, whose items fit most windows and so test the norms. The sparsest, "
            f"`{best['name']}`: {best['sparsity']:.1%} unrouted, x{_ratio(best):.3f} ("
            + ", ".join(f"{name} x{value:.3f}" for name, value in others.items()) + f"), needle {_found(best)}."]


def _needle(rows) -> list[str]:
    some = [row for row in rows if row["group"] == "frontier" and row["aim"]["sparsity"] and row["aim"]["perplexity"]
            and row["needle"]]
    if not some:
        return []
    whole = [row for row in some if row["aim"]["needle"]]
    if whole:
        return ["**Needle**: at the baseline's at every depth and length that was looked at: "
                + ", ".join(f"`{row['name']}` (to {max(map(int, row['needle']['lengths'])):,})" for row in whole) + "."]
    best = max(some, key=lambda row: row["needle"]["lengths"].get("8192", {"exact_match": 0.0})["exact_match"])
    listed = ", ".join(f"{entry['exact_match']:.0%} in {int(length):,}" for length, entry in
                       best["needle"]["lengths"].items())
    return ["**Needle**: no row of the repair with 90 % unrouted at or below the baseline's perplexity keeps it at "
            f"every depth; the best in 8,192 tokens, `{best['name']}`, finds {listed}."]


def _kept(rows) -> list[str]:
    """What training on longer rows, inverted decisions and echoes each do to the needle, by pairs of rows."""
    some = [row for row in rows if row["group"] == "frontier" and row["needle"]]
    said = []
    for lever, name in LEVERS.items():
        found: dict[int, list[float]] = {}
        for one, other in itertools.permutations(some, 2):
            levels = [row["settings"].get(lever) or 0 for row in (one, other)]
            if levels[0] < levels[1] and _rest(one, lever) == _rest(other, lever):
                before, after = (row["needle"]["lengths"] for row in (one, other))
                for length in set(before) & set(after):
                    found.setdefault(int(length), []).append(
                        100 * (after[length]["exact_match"] - before[length]["exact_match"]))
        if found:
            said.append(f"{name} " + ", ".join(f"{' '.join(f'{points:+g}' for points in sorted(changes))} in {length:,}"
                                               for length, changes in sorted(found.items())))
    return ["**The needle, in points**, over pairs of rows whose settings differ in one thing (what they leave "
            f"unrouted differs with it): {'; '.join(said)} tokens."] if said else []


def _rest(row: Fact, lever: str) -> dict[str, Any]:
    """What has to be equal: everything but the lever, and what comes with longer rows."""
    leave = {lever, *(("batch_size", "remat") if lever == "seq_len" else ())}
    return {"size": row["size"], **{name: value for name, value in row["settings"].items()
                                    if value and name not in leave}}


def _aim(rows) -> list[str]:
    """Rows that meet every condition of the repair's aim: in longer contexts too, in 2,048 tokens alone, or but for one
    prompt of the needle."""
    some = [(row, {name for name, value in row["aim"].items() if value is False}) for row in rows
            if row["group"] == "frontier" and None not in row["aim"].values()]
    if not some:
        return []
    whole = [row for row, missed in some if not missed]
    short = [row["name"] for row, missed in some if missed == {"longer contexts"}]
    nearly = [row for row, missed in some if missed == {"needle"} and _missed(row) == 1]
    said = [f"**The aim**, in every context to {max(int(context) for row, _ in some for context in row['contexts']):,} "
            f"tokens, of {len(some)} rows that were asked: " + ("; ".join(map(_reached, whole)) or "reached by none")]
    said += [f"in 2,048 tokens alone by {', '.join(f'`{name}`' for name in short)}"] if short else []
    said += [f"but for one prompt of the needle by {'; '.join(map(_reached, nearly))}"] if nearly else []
    return ["; ".join(said) + "."]


def _missed(row: Fact) -> int:
    return sum(entry["n"] - entry["correct"] for entry in row["needle"]["lengths"].values())


def _reached(row: Fact) -> str:
    longer = ", ".join(f"{entry['sparsity']:.1%} at x{entry['ratio']:.3f} in {int(context):,}"
                       for context, entry in row["contexts"].items())
    return f"`{row['name']}` ({row['sparsity']:.1%} unrouted at x{_ratio(row):.3f} in 2,048 tokens, {longer})"


def _absorption(rows) -> list[str]:
    some = [row for row in rows if row["absorption"] and row["absorption"]["after"]["carried"] is not None
            and row["absorption"]["before"]["carried"] is not None]
    out = []
    for row in some:
        before, after = (row["absorption"][when]["carried"] for when in ("before", "after"))
        audit = (row["audit"] or {}).get("worse", {})
        out.append(f"**Absorption** (`{row['name']}`): of what global attention gives, the router's choice carries "
                   f"{before:.2f} beyond random tokens at its rates when it decides for the weights before l2a_ft, "
                   f"{after:.2f} for those after: "
                   + ("not absorbed, at least half is left." if after >= before / 2 else "absorbed.")
                   + (f" Beyond a static choice of layers it carries {audit['static'] / audit['none']:.2f} after."
                      if audit.get("none") and "static" in audit else ""))
    return out
