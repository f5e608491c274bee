"""The rivals told: a line each, a table in markdown, and a figure of what is kept over what is routed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l2a_jax.research import tables

NAMES = {"learned": "learned tokens", "ranked": "layers, by learned rates", "searched": "layers, searched",
         "alternating": "layers, alternating", "heads": "heads, searched", "joined": "tokens and heads",
         "random": "random tokens", "oracle": "oracle (saw the text)"}
# Okabe and Ito's colours and one of Tol's, and a marker each, for eyes that tell no colours and for print.
LOOKS = {"learned": ("#0072B2", "o"), "ranked": ("#E69F00", "s"), "searched": ("#D55E00", "D"),
         "alternating": ("#CC79A7", "v"), "heads": ("#009E73", "^"), "joined": ("#882255", "P"),
         "random": ("#999999", "x"), "oracle": ("#000000", "*")}


def line(row: dict[str, Any]) -> str:
    """A row, while it comes."""
    low, high = row["kept_95"] or (float("nan"),) * 2
    kept = "-" if row["kept"] is None else f"{row['kept']:.3f} [{low:.3f}, {high:.3f}]"
    return f"{NAMES[row['name']]}: {1 - row['density']:.1%} local, keeps {kept}"


def markdown(result: dict[str, Any]) -> str:
    """The table of every density."""
    low, high = result["worth_95"]
    timed, ruled = any("prefill_ms" in row for row in result["rows"]), bool(result["lengths"])
    head = ["choice", "local", "worth kept", "behind learned",
            *(["RULER (local)", "behind learned"] if ruled else []), *(["prefill ms", "decode ms"] if timed else [])]
    lines = [
        "# Rivals at the same density", "",
        f"{result['source']}; {result['text']['name']} in windows of {result['context']:,} tokens, of which a local "
        f"token sees {result['window']:,} and {result['sinks']} sinks. Global attention is worth {result['worth']:.4f} "
        f"nats a token [{low:.4f}, {high:.4f}] beyond the window. Layers and heads were chosen on "
        f"{result['calibration']['name']}; the router's threshold was moved until it routed as much of the text. "
        "Random tokens: every layer routes as many. Brackets: 95 % intervals over windows, paired.", ""]
    if ruled:
        answers = ("Prompts are read and answers written under the choice." if result.get("answers") == "choice" else
                   "Prompts are read under the choice; what is written is decided by the router, its threshold unmoved "
                   "(open heads stay open, layers do not).")
        lines += [f"RULER: mean of its tasks at {', '.join(f'{one:,}' for one in result['lengths'])} tokens, "
                  f"{result['ruler_items']} prompts a task and length, over which its intervals are. {answers} The "
                  "oracle needs the text that it is scored on, and has none.", ""]
    if timed:
        lines += [f"Times: one row of {result['context']:,} tokens on {result['device']}, medians. Heads of different "
                  "windows have no kernel here, and are not timed.", ""]
    for target in dict.fromkeys(row["target"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["target"] == target]
        own = "the router's own density" if rows[0]["own"] else f"{1 - target:.0%} local"
        lines += [f"## {own[0].upper()}{own[1:]}", "", *tables.grid(head, [_cells(row, ruled, timed) for row in rows])]
    return "\n".join([*lines, f"{result['date'][:10]}: `{' '.join(result['command'])}`"]) + "\n"


def _cells(row: dict[str, Any], ruled: bool, timed: bool) -> list[str]:
    def number(value: float | None, interval: list[float] | None, form: str, scale: float = 1) -> str:
        if value is None:
            return "-"
        shown = "" if interval is None else f" [{scale * interval[0]:{form}}, {scale * interval[1]:{form}}]"
        return f"{scale * value:{form}}{shown}"

    lead = row["name"] == "learned"
    cells = [NAMES[row["name"]], f"{1 - row['density']:.1%}", number(row["kept"], row["kept_95"], ".3f"),
             "" if lead else number(row["behind"], row["behind_95"], "+.3f")]
    if ruled:
        local = "" if row.get("ruler_local") is None else f" ({row['ruler_local']:.1%})"
        cells += [number(row.get("ruler_mean"), None, ".1f", 100) + local,
                  "" if lead else number(row.get("ruler_behind"), row.get("ruler_behind_95"), "+.1f", 100)]
    if timed:
        cells += [number(row.get("prefill_ms"), None, ".1f"), number(row.get("decode_ms"), None, ".2f")]
    return cells


def draw(result: dict[str, Any], path: Path) -> None:
    """Worth kept and, where it was scored, RULER, each over the share of decisions that is local and, where they were
    measured, over the times of prefill and decode."""
    plt = tables.pyplot()
    measured = [name for name in ("kept", "ruler_mean") if any(name in row for row in result["rows"])]
    across = [name for name in ("local", "prefill_ms", "decode_ms")
              if name == "local" or any(name in row for row in result["rows"])]
    labels = {"local": "decisions that are local, %", "prefill_ms": f"prefill of {result['context']:,} tokens, ms",
              "decode_ms": f"a decode step after {result['context']:,} tokens, ms",
              "kept": "share kept of the worth of global attention", "ruler_mean": "RULER, mean score"}
    figure, axes = plt.subplots(len(measured), len(across), figsize=(4.8 * len(across), 4.2 * len(measured)),
                                squeeze=False)
    for row, up in zip(axes, measured, strict=True):
        for axis, under in zip(row, across, strict=True):
            for name, (colour, marker) in LOOKS.items():
                _series(axis, [one for one in result["rows"] if one["name"] == name], under, up, colour, marker)
            axis.set(xlabel=labels[under], ylabel=labels[up])
            axis.grid(alpha=0.3)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=9, ncols=4, loc="lower center")
    figure.suptitle(f"{Path(result['source']).name}: {result['text']['name']}, windows of {result['context']:,} tokens",
                    fontsize=10)
    figure.tight_layout(rect=(0, 0.14 if len(measured) == 1 else 0.08, 1, 1))
    tables.write_figure(figure, path)


def _series(axis: Any, rows: list[dict[str, Any]], under: str, up: str, colour: str, marker: str) -> None:
    """One choice at every density, joined in that order where the density moves what is below; of the share kept its
    intervals too. RULER's local share is of its own prompts."""
    local = "ruler_local" if up == "ruler_mean" else "local"
    points = [(100 * row.get(local, 1 - row["density"]) if under == "local" else row.get(under), row.get(up), row)
              for row in rows]
    points = sorted((point for point in points if None not in point[:2]), key=lambda point: point[2]["density"])
    if not points:
        return
    x, y = zip(*(point[:2] for point in points), strict=True)
    axis.plot(x, y, color=colour, marker=marker, label=NAMES[rows[0]["name"]], markersize=6, linewidth=1.2,
              linestyle="none" if under == "decode_ms" else "solid")
    if up == "kept":
        axis.vlines(x, *zip(*(row["kept_95"] for *_, row in points), strict=True), color=colour, linewidth=1)
