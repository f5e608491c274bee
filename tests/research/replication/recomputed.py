"""What the study's texts say, computed from the rows, and the check of a text's numbers against it.

The rules behind words (agrees, lost, reached) stand here or beside the section that uses them.
"""

import math
import pathlib
import re
import statistics

import numpy as np

from l2a_jax.evaluation import intervals
from l2a_jax.research.replication import arms
from l2a_jax.research.replication.facts import perplexity_ratio
from l2a_jax.research.replication.row_file import read_row

RESULTS = pathlib.Path(__file__).parents[3] / "eval" / "results"
NUMBER = re.compile(r"(?<![\w.,-])[-+]?\d[\d,]*(?:\.\d+)?")
AGREES, NEUTRAL, LOST, SPARSE, PARAMETERS = 1.25, 1.05, 0.2, 0.9, 65_000
ALLOWED = {"hellaswag": 1.0, "piqa": 2.0, "arc_challenge": 3.5}
LEVERS = ("seq_len", "flip", "echo")
LENGTHS = ("2048", "8192", "32768")


def numbers(text):
    """Numbers of a text, without those in names (`code`, sizes such as 0.5B)."""
    text = re.sub(r"`[^`]*`|\b\d+(?:\.\d+)?B\b", "", text)
    return [float(found.rstrip(",").replace(",", "")) for found in NUMBER.findall(text)]


def check(text, *expected):
    """The numbers of the text are the expected ones, to the digits in which they are written."""
    written = numbers(text)
    assert len(written) == len(expected), (written, expected)
    spelled = NUMBER.findall(re.sub(r"`[^`]*`|\b\d+(?:\.\d+)?B\b", "", text))
    for found, value, spelling in zip(written, expected, spelled, strict=True):
        digits = len(spelling.partition(".")[2]) if "." in spelling else 0
        step = 10.0 ** -digits if found < 1_000 or digits or value == int(value) else 1.0
        assert abs(found - value) <= 0.5 * step + 1e-9, f"{spelling} is written where the rows say {value}"


def ratio(row):
    return row["perplexity_ratio"]["ratio"]


def percent(row, length=None):
    needle = row["needle"] if length is None else row["needle"]["lengths"][length]
    return 100 * needle["exact_match"]


def reached(row):
    """The aim, condition by condition; None where it was not asked."""
    relative, needle, longer = row["perplexity_ratio"], row["needle"], row["contexts"].values()
    out = {"parameters": row["trained_parameters"] <= PARAMETERS,
           "sparsity": None if row["sparsity"] is None else row["sparsity"] >= SPARSE,
           "perplexity": None if relative is None else relative["ratio"] <= 1}
    for task, allowed in ALLOWED.items():
        entry = row["benchmarks"][task]
        out[task] = None if entry is None else entry["difference"]["points_95"][0] >= -allowed
    out["needle"] = None if needle is None else needle["at_least_baseline"]
    out["longer"] = all(one["ratio"] <= 1 and one["sparsity"] >= SPARSE for one in longer) if longer else None
    return out


def frontier(rows):
    """(row, its aim) of the repair."""
    return [(row, reached(row)) for row in rows.values() if row["group"] == "frontier"]


def sparse_and_good(rows):
    return [(row, aim) for row, aim in frontier(rows) if aim["sparsity"] and aim["perplexity"]]


def were_run(made):
    """How many of the rows declared first were run, of how many; and the same of those declared later."""
    first = [row for row in made["rows"] if row["group"] not in arms.GROUPS]
    return [sum("device" in row for row in first), len(first), len(made["rows"]) - len(first),
            sum(len(make()) for make in arms.GROUPS.values())]


def accounted(rows, rope, leakage):
    """The gap in nats of the sequential layer without sinks at a window of 256, and what part of it goes, in percent:
    with the parallel layer and sinks, with either alone."""
    nats = {cell: math.log(ratio(rows[f"damage-{cell}-{rope}-w256-l{leakage}"]))
            for cell in ("seq-k0", "par-k4", "par-k0", "seq-k4")}
    gap = nats.pop("seq-k0")
    return [gap, *(100 * (1 - left / gap) for left in nats.values())]


def stored(name):
    return read_row(RESULTS / "rows" / f"{name}.json")


def norms_alone(rows):
    """Beside the twin with a router, everything routed in the audit's windows, and all rows of the same training."""
    alone, twin, base = map(stored, ("norms_only-s0", "repair-w256-p0.3-s0", "baseline-0.5b"))
    assert alone["settings"]["lr"] == twin["settings"]["lr"]
    for key in ("tokens_seen", "data_fingerprint"):
        assert alone["training"][key] == twin["training"][key]
    own, beside = rows["norms_only-s0"]["perplexity_ratio"], perplexity_ratio(twin, alone)

    def shown(found):
        return found["evaluations"]["perplexity"]["result"]

    def audited(found, control):
        return found["evaluations"]["audit"]["result"]["rows"][control]["window_nll"]

    count = len(audited(twin, "all"))
    tokens = sum(shown(base)["window_tokens"][:count])

    def there(nll):
        return math.exp((sum(nll[:count]) - sum(shown(base)["window_nll"][:count])) / tokens)

    windows, routed = there(shown(alone)["window_nll"]), there(audited(twin, "all"))
    assert beside["nats_95"][0] > 0 and windows < routed
    same = [row for row, _ in frontier(rows) if row["size"] == "0.5b" and row["settings"]["seed"] == 0
            and row["tokens_seen"] == alone["training"]["tokens_seen"]
            and not any(row["settings"].get(lever) for lever in LEVERS)]
    below = sorted((row for row in same if ratio(row) < own["ratio"]), key=ratio)
    gains = [perplexity_ratio(stored(row["name"]), alone) for row in below]
    assert all(gain["nats_95"][1] < 0 and row["settings"]["penalty"] <= 0.1 and row["audit"]["worse"]["all"] > 0
               for gain, row in zip(gains, below, strict=True))
    assert all(row["sparsity"] < SPARSE for row, _ in frontier(rows) if row["size"] == "0.5b"
               and row["perplexity_ratio"] and ratio(row) < own["ratio"])
    local = [100 * row["sparsity"] for row in below]
    return [own["ratio"], *own["ratio_95"], -own["nats"], ratio(rows[twin["name"]]), beside["nats"], *beside["nats_95"],
            count, windows, routed, len(same), 2_048, len(below), ratio(below[0]), ratio(below[-1]),
            *sorted({row["settings"]["window"] for row in below}), min(local), max(local), -gains[0]["nats"], count,
            there(audited(stored(below[0]["name"]), "random")), 100 * SPARSE]


def best_evidence(row):
    """For tokens over layers: every control finds the same share."""
    needle = row["needle"]["lengths"]["2048"]
    controls = {needle["controls"][name] for name in ("random", "static", "none")}
    assert len(controls) == 1
    return [row["settings"]["window"], row["settings"]["penalty"], 100 * row["sparsity"], 100 * needle["sparsity"],
            percent(row, "2048"), 2_048, 100 * controls.pop(), ratio(row)]


def is_pair(one, other, lever):
    """Whether two rows differ in the lever alone, and what comes with longer rows."""
    leave = {lever, *(("batch_size", "remat") if lever == "seq_len" else ())}
    rest = [{"size": row["size"], **{name: value for name, value in row["settings"].items()
                                     if value and name not in leave}} for row in (one, other)]
    low, high = ((row["settings"].get(lever) or 0) for row in (one, other))
    return low < high and rest[0] == rest[1]


def limits(rows, made):
    """Of the aim: nothing routed, a bound of one point on every benchmark, and pruning where routing costs nothing."""
    seeds = [rows[f"repair-t8192-w1024-p0.5-f0.3-e1{seed}"] for seed in ("", "-s1", "-s2")]
    strict = [row for row in seeds if reached(row)["longer"]
              and all(row["benchmarks"][task]["difference"]["points_95"][0] >= -1 for task in ALLOWED)]
    assert strict == seeds[:1]
    pruned = made["instruments"]["prunable"][seeds[1]["name"]]["thresholds"]
    best = next(row for row in pruned if len(row["pruned"]) == 17)
    return [*(row["audit"]["ratio"]["none"] for row in seeds), 2_048, 1.0, len(strict), 17, best["cost"],
            seeds[1]["audit"]["worse"]["none"]]


KINDS = ("learned", "frozen", "static")


def trained_under(rows):
    """Attention trained under each kind of decisions and evaluated under all, paired over the same windows."""
    of = {kind: rows[f"l2a_ft-{kind}-s2"] for kind in KINDS}
    nats = {kind: {name: one["nll"] for name, one in row["under"]["rows"].items()} for kind, row in of.items()}
    assert len({row["tokens_seen"] for row in of.values()}) == 1

    def differ(one, other):
        """Nats with their interval; each is (trained under, evaluated under)."""
        nll = [of[trained]["under"]["rows"][under]["window_nll"] for trained, under in (one, other)]
        value, (low, high) = intervals.paired_windows(*map(np.array, nll), np.array(
            of["learned"]["under"]["window_tokens"]))
        return [value, low, high]

    fixed = rows["repair-w256-p0.3-s2"]["audit"]["worse"]["static"]
    static, own = (differ(("static", "static"), (kind, "learned")) for kind in ("static", "learned"))
    third = {kind: rows[f"l2a_ft-{kind}-s3"]["under"]["rows"] for kind in KINDS[:2]}
    count = len(of["learned"]["under"]["window_tokens"])
    everywhere = perplexity_ratio(*(stored(of[kind]["name"]) for kind in ("static", "learned")))
    whole = stored(of["static"]["name"])["evaluations"]["perplexity"]["result"]
    assert max(static[0], own[0]) < 0.2 * fixed < differ(("learned", "static"), ("learned", "learned"))[0]
    return [of["learned"]["tokens_seen"] / 1e6,
            *(100 * of["learned"]["under"]["rows"][kind]["density"] for kind in KINDS), count, 2,
            *(value for kind in KINDS for under in KINDS for value in (nats[kind][under], math.exp(nats[kind][under]))),
            nats["learned"]["frozen"] - nats["learned"]["learned"],
            *differ(("learned", "frozen"), ("frozen", "frozen")),
            nats["learned"]["random"] - nats["frozen"]["random"], *differ(("frozen", "frozen"), ("frozen", "learned")),
            *differ(("frozen", "frozen"), ("learned", "learned")), percent(of["learned"]), percent(of["frozen"]),
            fixed, nats["learned"]["static"] - nats["learned"]["learned"], *static, 100 * static[0] / fixed, *own,
            100 * own[0] / fixed, len(whole["window_tokens"]), everywhere["nats"], *everywhere["nats_95"],
            percent(of["learned"]), percent(of["static"]),
            3, third["frozen"]["frozen"]["nll"] - third["frozen"]["learned"]["nll"],
            third["frozen"]["frozen"]["nll"] - third["learned"]["learned"]["nll"],
            100 * statistics.mean(of["static"]["settings"]["forced"])]
