"""The rivals told: a line each, a table in markdown, and a figure of what is kept over what is routed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l2a_jax.research import tables

NAMES = {"learned": "learned tokens", "ranked": "layers, by learned rates", "searched": "layers, searched",
         "alternating": "layers, alternating", "heads": "heads, searched", "random": "random tokens",
         "oracle": "oracle (saw the text)"}
# Okabe and Ito's colours, and a marker each, for eyes that tell no colours and for print.
LOOKS = {"learned": ("#0072B2", "o"), "ranked": ("#E69F00", "s"), "searched": ("#D55E00", "D"),
         "alternating": ("#CC79A7", "v"), "heads": ("#009E73", "^"), "random": ("#999999", "x"),
         "oracle": ("#000000", "*")}


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
        f"{result['calibration']['name']}; the router's threshold was moved "
        "until it routed as much of the text. Brackets: 95 % intervals over windows, paired.", ""]
    if ruled:
        lines += [f"RULER: mean of its tasks at {', '.join(f'{one:,}' for one in result['lengths'])} tokens, "
                  f"{result['ruler_items']} prompts a task and length; prompts are read under the choice, answers "
                  "written by the router's own rule (heads stay open). The oracle needs the text that it is scored "
                  "on, and has none.", ""]
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
    """Worth kept, and RULER where it was scored, over the share of decisions that is local; and over prefill time."""
    plt = tables.pyplot()
    panels = [("local", "kept", "decisions that are local, %", "share of the worth of global attention kept")]
    if result["lengths"]:
        panels.append(("local", "ruler_mean", "decisions that are local, %", "RULER, mean score"))
    if any("prefill_ms" in row for row in result["rows"]):
        panels.append(("prefill_ms", "kept", f"prefill of {result['context']:,} tokens, ms",
                       "share of the worth of global attention kept"))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.4), squeeze=False)
    for axis, (across, up, under, beside) in zip(axes[0], panels, strict=True):
        for name, (colour, marker) in LOOKS.items():
            points = [(100 * (1 - row["density"]) if across == "local" else row.get(across), row.get(up), row)
                      for row in result["rows"] if row["name"] == name]
            points = sorted((point for point in points if None not in point[:2]), key=lambda point: point[0])
            if not points:
                continue
            x, y = zip(*((one, two) for one, two, _ in points), strict=True)
            axis.plot(x, y, color=colour, marker=marker, label=NAMES[name], linewidth=1.2, markersize=6)
            if up == "kept":
                low, high = zip(*(row["kept_95"] for *_, row in points), strict=True)
                axis.vlines(x, low, high, color=colour, linewidth=1)
        axis.set(xlabel=under, ylabel=beside)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{Path(result['source']).name}: {result['text']['name']}, windows of {result['context']:,} tokens",
                    fontsize=10)
    figure.tight_layout()
    tables.write_figure(figure, path)
