"""`replication.md`: the numbers of `report.collect` as a page for people."""

from __future__ import annotations

import statistics
from typing import Any

from l2a_jax.data.counts import format_count
from l2a_jax.evaluation import table
from l2a_jax.research.replication import arms, autopsy, damage, flips, prunable, routed_text
from l2a_jax.research.tables import grid
from l2a_jax.training.settings import Settings

CARD_GB = 24.0
ROUTING_COSTS = (
    "*Routing costs*: by how much the learned decisions are worse than the same trained weights with everything "
    "routed, over the audit's windows. *random*, *static*, *none*: controls with the same weights, as a ratio to the "
    "baseline's (the row's ratio times how much worse each is over the audit's windows).")
NEEDLE = ("Found by the learned decisions / a static choice of layers of the same density / random tokens at the same "
          "rates / nothing routed, and what is local in those prompts.")
SPEED = (f"Memory is the compiled step's (arguments and temporaries), beside the {CARD_GB:g} GB of a 4090; lowest to "
         "highest over the rows of a group. Rows that shared the card are left out.")
ELSEWHERE = ("`replication.json` holds, row by row, the commands, the hash of the weights, the texts as used, speed, "
             "memory and seconds, and what the instruments found layer by layer. All rows of a group: `python "
             "train/study.py --group GROUP --model-05b MODEL --data-dir DATA --out OUT`; one row: `--rows NAME`.")


def markdown(made: dict[str, Any], figures: dict[str, str]) -> str:
    """The report for people: tables and figures. What they say is written elsewhere, by people."""
    rows = made["rows"]
    run = [row for row in rows if "device" in row]
    frontier = group_of(rows, "frontier")

    def picture(name):
        return [f"![{name}]({figures[name]})", ""] if name in figures else []

    lines = [
        "# The study on real weights", "", *_about(run, rows), "", "## 1. The main table", "", *_main(made["main"]),
        "### Window = context apart from smaller windows", "", *_rows(group_of(rows, "main", "router_only"), _WINDOW),
        "## 2. Collapse", "", *picture("collapse"), *_rows(ratio_rows(rows), _COLLAPSE), *_found(made, "autopsy"),
        "## 3. What damages router-only", "", *picture("combinations"), *_effects(made["damage"]),
        *_together(made["together"]), *picture("residual"), *_rows(group_of(rows, "damage"), _DAMAGE),
        *_rows(group_of(rows, "together"), _DAMAGE), "### Noise in the decisions", "",
        *_rows(group_of(rows, "noise"), _NOISE), *_found(made, "flips"),
        "## 4. The repair", "", ROUTING_COSTS, "", *picture("frontier"), *_rows(frontier, _FRONTIER),
        "### The needle beside its controls", "", NEEDLE, "",
        *_rows([row for row in frontier if row.get("needle")], _NEEDLE),
        *_thresholds(made["instruments"]["thresholds"]), *picture("layers"), *picture("picture"),
        *_found(made, "routed"), *_found(made, "prunable"),
        "## 5. Absorption", "", *_rows(group_of(rows, "absorption"), _ABSORPTION),
        *_arms(rows), "## 6. Speed and memory as run", "", SPEED, "", *_speed(run),
        "## 7. What is in the JSON alone", "", ELSEWHERE]
    return "\n".join(lines) + "\n"


def _about(run, rows) -> list[str]:
    devices = sorted({row["device"] for row in run})
    versions = sorted({f"jax {row['versions']['jax']}, Python {row['versions']['python']}" for row in run})
    dates = sorted(row["date"][:10] for row in run)
    part = [row["name"] for row in run if row["status"] != "done"]
    first = [row for row in rows if row["group"] not in arms.GROUPS]
    later = sum(row["group"] in arms.GROUPS for row in run)
    elsewhere = [f"{row['name']}: {task} on {device}" for row in run for task, device in row["elsewhere"].items()]
    hashes = sorted({(row["size"], row["source_hash"][:12]) for row in run if row["source_hash"]})
    return ["What these numbers say is written in [findings.md](findings.md).", "",
            f"{sum(row['status'] == 'done' for row in first)} of {len(first)} declared rows were run"
            + (f", and {later} of later arms" if later else "")
            + (f" ({', '.join(part)} in part)" if part else "")
            + f", {dates[0]} to {dates[-1]}, on {'; '.join(devices)} ({'; '.join(versions)})."
            + (f" Measured elsewhere than trained: {'; '.join(elsewhere)}." if elsewhere else "")
            + f" Weights, by hash: {'; '.join(f'{size} {name}' for size, name in hashes)}.", "",
            f"*Reported*: {table.SOURCE}. Differences are paired over the same windows or items; brackets are 95 % "
            "intervals over those, not over seeds of training."]


def group_of(rows, group, regime=None) -> list[dict[str, Any]]:
    """The facts of one group, and of one regime in it."""
    return [row for row in rows if row["group"] == group and regime in (None, row["regime"])]


def ratio_rows(rows) -> list[dict[str, Any]]:
    """The rows of the ratio sweep: those of `collapse`, and the main table's trained rows of the same size."""
    some = [row for row in rows if row["group"] == "collapse"
            or (row["group"] == "main" and row["size"] == "0.5b" and row["regime"] != "baseline")]
    return sorted(some, key=lambda row: (row["regime"], row.get("tokens_per_trained_parameter") or 0))


def _main(parts) -> list[str]:
    lines = []
    for part in parts:
        lines += [f"### {part['size']}", "", *([table.markdown(part["table"])] if part["table"] is not None else []),
                  *(f"- {name}: not run" for name in part["not_run"]), ""]
    return lines


def _rows(rows, columns) -> list[str]:
    """A row a line; one that was not run has its status in the second column and nothing else."""
    return grid(["row", *columns], [[row["name"], *(
        [show(row) for show in columns.values()] if "device" in row else [row["status"], *[""] * (len(columns) - 1)])]
        for row in rows]) if rows else ["No rows.", ""]


_FORMATS = {"flips": flips.format_flips, "routed": routed_text.format_routed, "prunable": prunable.format_prunable}
_TOO_LONG = {"routed": {"layers": []}, "prunable": {"layers": [], "thresholds": []}}


def _found(made, name) -> list[str]:
    """What an instrument found, a part for each row that has it; the autopsy's is a table already."""
    lines = []
    for row, found in made["instruments"][name].items():
        text = (["```", _FORMATS[name]({**found, **_TOO_LONG.get(name, {})}), "```"] if name in _FORMATS
                else [autopsy.format_autopsy(found)])
        lines += [f"#### {name}, {row}", "", *text, ""]
    return lines


def _number(value, form="{:.3g}") -> str:
    return "-" if value is None else form.format(value)


def _count(value) -> str:
    return "-" if value is None else format_count(int(value)) if value else "0"


def _ratio(entry) -> str:
    return "-" if entry is None else f"x{entry['ratio']:.3f} [{entry['ratio_95'][0]:.3f}, {entry['ratio_95'][1]:.3f}]"


def _needle(row) -> str:
    needle = row["needle"]
    if needle is None:
        return "-"
    return ", ".join(f"{int(length):,}: {entry['exact_match']:.0%}"
                     + (f" (baseline {entry['baseline']:.0%})" if "baseline" in entry else "")
                     for length, entry in needle["lengths"].items())


def _points(task):
    def show(row):
        entry = row["benchmarks"][task]
        if entry is None:
            return "-"
        difference = entry["difference"]
        low, high = (None, None) if difference is None else difference["points_95"]
        return f"{entry['acc']:.1%}" + ("" if difference is None else
                                        f"<br>{difference['points']:+.1f} [{low:+.1f}, {high:+.1f}]")

    return show


def _control(name):
    return lambda row: _number(((row["audit"] or {}).get("ratio") or {}).get(name), "x{:.3f}")


def _cost(row) -> str:
    """What routing itself costs: nats by which the learned decisions are worse than the same weights, all routed."""
    audit = row["audit"]
    if audit is None or "all" not in audit["worse"]:
        return "-"
    low, high = audit["worse_95"]["all"]
    return f"{-audit['worse']['all']:+.3f} [{-high:+.3f}, {-low:+.3f}]"


def _trained_on(row) -> str:
    """Tokens of a row, and what training did to keep the needle."""
    flip, echo = (row["settings"].get(name) for name in ("flip", "echo"))
    return (f"{row['settings'].get('seq_len', Settings.seq_len):,}" + (f", {flip:.0%} inverted" if flip else "")
            + (f", echoes {echo:.0%}" if echo else ""))


def _contexts(row) -> str:
    return "<br>".join(f"{int(context):,}: x{entry['ratio']:.3f}, {_number(entry['sparsity'], '{:.1%}')}"
                       for context, entry in row["contexts"].items()) or "-"


def _beside_controls(length):
    def show(row):
        entry = row["needle"]["lengths"].get(length)
        if entry is None or not entry["controls"]:
            return "-"
        found = [entry["exact_match"], *(entry["controls"][name] for name in ("static", "random", "none"))]
        return " / ".join(f"{100 * value:g}" for value in found) + f" % ({_number(entry['sparsity'], '{:.1%}')})"

    return show


def _broken(row) -> str:
    return "finite" if not row["non_finite"] else f"not finite at step {row['non_finite']['step']}"


_QUALITY = {"perplexity": lambda row: _ratio(row["perplexity_ratio"]),
            "local": lambda row: _number(row["sparsity"], "{:.1%}")}
_COSTS = {**_QUALITY, "routing costs, nats": _cost, "random": _control("random"), "needle": _needle}
_WINDOW = {"window": lambda row: str(row["settings"].get("window", "-")), "data": lambda row: row["data"],
           "size": lambda row: row["size"], **_QUALITY, "HellaSwag": _points("hellaswag"), "needle": _needle}
_COLLAPSE = {"regime": lambda row: row["regime"], "tokens": lambda row: _count(row["tokens_seen"]),
             "trained": lambda row: _count(row["trained_parameters"]),
             "tokens/param": lambda row: _number(row["tokens_per_trained_parameter"]),
             "numbers": _broken, "last loss": lambda row: _number(row["loss_last_5_percent"], "{:.3f}"),
             "held-out": lambda row: _number(row["held_out_loss"], "{:.3f}"),
             **_QUALITY, "HellaSwag": _points("hellaswag"), "needle": _needle,
             "verdict": lambda row: row["verdict"] or "-"}
_DAMAGE = {**{factor: (lambda row, factor=factor: row["factors"][factor]) for factor in damage.FACTORS}, **_COSTS}
_NOISE = {"flipped in training": lambda row: _number(row["settings"].get("flip"), "{:.0%}"), **_COSTS}
_NEEDLE = {f"in {int(length):,} tokens": _beside_controls(length) for length in ("2048", "8192", "32768")}
_FRONTIER = {"trained on": _trained_on, "window": lambda row: str(row["settings"]["window"]),
             "penalty": lambda row: str(row["settings"]["penalty"]),
             "local": _QUALITY["local"], "perplexity": _QUALITY["perplexity"], "routing costs, nats": _cost,
             **{name: _control(name) for name in ("random", "static", "none")}, "HellaSwag": _points("hellaswag"),
             "PIQA": _points("piqa"), "ARC-C": _points("arc_challenge"), "needle": _needle,
             "longer contexts": _contexts}


def _absorbed(when, key):
    return lambda row: "-" if row["absorption"] is None else _number(row["absorption"][when][key], "{:.3f}")


def _all_routed(row) -> str:
    """With everything routed, by context: the same weights' perplexity, and what the router's decisions cost beside."""
    found = row.get("all_routed")
    return "-" if found is None else "<br>".join(
        f"{int(context):,}: {one['perplexity']:.2f}, {one['routing_costs']:+.3f}"
        for context, one in found["contexts"].items())


def _reach(row) -> str:
    learned = row.get("reach", {}).get("rows", {}).get("learned", {})
    if learned.get("kept") is None:
        return "-"
    low, high = learned["kept_95"]
    return f"{learned['kept']:.3f} [{low:.3f}, {high:.3f}]"


def _ruler(row) -> str:
    own = [one for one in row.get("ruler", {}).get("overall", []) if one["control"] in ("plain", "learned")]
    return "<br>".join(f"{one['length']:,}: {one['score']:.1%}" for one in own) or "-"


def _symptoms(row) -> str:
    """Of the reported symptoms, which the row shows."""
    found = row.get("symptoms")
    return "-" if found is None else ", ".join(name for name, shown in found["symptoms"].items() if shown) or "none"


def _under(row) -> str:
    """Nats a token under each kind of decisions."""
    return "<br>".join(f"{name} {one['nll']:.4f}" for name, one in row.get("under", {}).get("rows", {}).items()) or "-"


_ARM = {"trained": lambda row: _count(row.get("trained_parameters")), **_QUALITY,
        "all routed: perplexity, cost in nats": _all_routed, "HellaSwag": _points("hellaswag"),
        "PIQA": _points("piqa"), "ARC-C": _points("arc_challenge"), "needle": _needle,
        "kept beyond the window": _reach, "RULER": _ruler, "last loss": lambda row: _number(
            row.get("loss_last_5_percent"), "{:.3f}"), "symptoms": _symptoms, "nats under decisions": _under}
"""Columns of the later arms; a group shows those that any of its rows was asked."""


def _arms(rows) -> list[str]:
    """A table for each later arm that was run."""
    lines = []
    for group, declared in arms.GROUPS.items():
        some = group_of(rows, group)
        columns = {name: show for name, show in _ARM.items() if any(show(row) != "-" for row in some)}
        lines += ["### " + some[0]["question"], "", f"{len(some)} of {len(declared())} declared rows were run.", "",
                  *_rows(some, columns)] if some else []
    return ["## Later arms", "", *lines] if lines else []


_ABSORPTION = {"local": _QUALITY["local"], "perplexity": _QUALITY["perplexity"],
               **{f"{key.replace('_', ' ')}, {when}": _absorbed(when, key)
                  for when in ("before", "after") for key in ("random_worse", "none_worse", "carried")}}


def _speed(run) -> list[str]:
    """A line for each group and regime: the range over its rows that had the whole card."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    whole = max((row["memory"].get("device_gb") or 0 for row in run if row["memory"]), default=0)
    for row in run:
        memory = row["memory"] or {}
        alone = (memory.get("device_gb") or whole) == whole
        if alone and row["tokens_per_second_median"] and memory.get("compiled_gb"):
            groups.setdefault((row["group"], row["size"], row["regime"]), []).append(row)

    def edges(rows, value, form):
        low, high = (form.format(edge(map(value, rows))) for edge in (min, max))
        return low if low == high else f"{low} to {high}"

    return grid(["group", "size", "regime", "rows", "tokens/s", "GB"], [
        [*key, len(rows), edges(rows, lambda row: row["tokens_per_second_median"], "{:,.0f}"),
         edges(rows, lambda row: row["memory"]["compiled_gb"], "{:.1f}")] for key, rows in groups.items()])


def _thresholds(found) -> list[str]:
    """All rows' lower thresholds in one table."""
    lengths = sorted({length for one in found.values() for row in one["rows"] for length in row["needle"]}, key=int)
    return ["#### Lower thresholds than trained with", "", *grid(
        ["row", "threshold", "local", "worse, nats", *(f"needle in {int(length):,}" for length in lengths)],
        [[name, *map("<br>".join, zip(*[
            (f"{row['threshold']:g}", f"{row['sparsity']:.1%}", f"{row['worse']:+.4f} [{low:+.4f}, {high:+.4f}]",
             *(_number(row["needle"].get(length), "{:.0%}") for length in lengths))
            for row in one["rows"] for low, high in (row["worse_95"],)], strict=True))]
         for name, one in found.items()])] if found else []


def _effects(analyses) -> list[str]:
    if not analyses:
        return ["Not all cells were run: no effects.", ""]
    lines = []
    for response, found in analyses.items():
        main, more = found["main_effects"], found.get("with_interactions")
        rows = [[name, level, term["reference"], *_effect(term, entry)] for name, term in main["terms"].items()
                for level, entry in term["levels"].items()]
        if more:
            rows += [[f"*{term.name}*", "beyond both", "", *_effect(
                more["terms"][term.name], more["terms"][term.name]["levels"]["True"])] for term in damage.INTERACTIONS]
        lines += [f"### {response}", "", _fit(main), "", *grid(
            ["factor", "level", "instead of", "difference", "95 %", "share of squares", "p", "inflation"], rows)]
    return lines


def _fit(main) -> str:
    """How well main effects describe the cells."""
    pure = main["pure_error"]
    said = (f"Main effects, {main['runs']} runs, {main['residual_df']} residual degrees of freedom, residual sd "
            f"{main['residual_sd']:.3g}, R2 {main['r_squared']:.3f}")
    if pure is not None:
        said += f"; pure error sd {pure['sd']:.3g} on {pure['df']}"
    if pure is not None and "F" in pure:
        said += f", lack of fit F({pure['lack_of_fit_df']}, {pure['df']}) = {pure['F']:.3g}, p = {pure['p']:.3g}"
    return said + "."


def _effect(term, entry) -> list[str]:
    low, high = entry["interval"]
    return [f"{entry['difference']:+.3f}", f"[{low:+.3f}, {high:+.3f}]", f"{term['share']:.1%}", f"{term['p']:.3g}",
            f"{term['inflation']:.2f}"]


def _together(made) -> list[str]:
    if not any(value is not None for _, values in made["crossed"] for value in values):
        return []

    def show(value):
        return "-" if value is None else f"x{value['ratio']:.3f}" + (
            "" if value["needle"] is None else f", needle {value['needle']:.0%}")

    pairs = []
    for factor, levels in made["pairs"].items():
        for level, found in levels.items():
            if found:
                nats = [one["difference"] for one in found]
                where = ", ".join(f"{name} {value}" for name, value in found[-1]["where"].items())
                pairs.append([factor, level, damage.FACTORS[factor][0], len(found), f"{nats[0]:+.3f}",
                              f"{statistics.median(nats):+.3f}", f"{nats[-1]:+.3f}", where])
    return [
        "### Topology, sinks and window in combination", "",
        "Perplexity over the baseline's and the needle, nothing scaled, every gradient let through.", "",
        *grid(["", *(f"window {window:,}" for window in damage.FACTORS["window"])],
               [[name, *map(show, values)] for name, values in made["crossed"]]),
        "### One factor changed, all else equal", "",
        "Nats a token that a level adds, over all pairs of runs that differ in nothing else.", "",
        *grid(["factor", "level", "instead of", "pairs", "least", "median", "most", "most where"], pairs)]
