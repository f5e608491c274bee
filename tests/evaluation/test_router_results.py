"""Every number of `eval/results/router/README.md`, computed from the evaluations, in its order."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from l2a_jax.evaluation import intervals, reach
from l2a_jax.evaluation.results import read_results
from l2a_jax.training.settings import Settings, resolve
from tests.evaluation.test_long_results import reach_of, ruler_of
from tests.research.replication.recomputed import check

ROUTER = pathlib.Path(__file__).parents[2] / "eval/results/router"
SHORT, LONG = 8_192, 32_768
RECIPES = ("penalty", "target", "ask", "ask-distill", "ask-32k", "ask-32k-hidden", "ask-hidden", "lengths",
           "lengths-mixed", "lengths-mixed-signals", "lengths-signals", "answers", "answers-mixed", "target-945",
           "post-local")
SEEDS, LENGTHS, ITEMS = ("final-0", "final-1", "final-2"), (4_096, SHORT, 16_384, LONG), 8


def cells_of(run, length, control="learned"):
    """RULER's cells of a length by task; a plain model has no other control."""
    controls = ("plain", control)
    found = {cell["task"]: cell for cell in run["tasks"]["ruler"]["cells"]
             if cell["length"] == length and cell["control"] in controls}
    return {task: found[task] for task in sorted(found)}


def scores_of(run, length, control="learned"):
    """The scores [task, prompt] of as many prompts as the seeds have."""
    return np.array([cell["scores"][:ITEMS] for cell in cells_of(run, length, control).values()])


def points_behind(plain, mine):
    """Points of `mine` [task, prompt] behind the plain model, with the interval."""
    value, (low, high) = intervals.paired_items(plain.ravel().tolist(), mine.ravel().tolist())
    return [100 * one for one in (value, low, high)]


@pytest.fixture(scope="module")
def runs():
    return {name: read_results(ROUTER / name / "eval.json") for name in ("plain", *RECIPES)}


def result(name):
    return read_results(ROUTER / name / "eval.json")


def looks():
    return result("final-0")["tasks"]["looks"]


def section(title):
    return (ROUTER / "README.md").read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


def ruler(found):
    return ruler_of(found, (SHORT, LONG), 8)


def difference(mine, base, length):
    """Points by which RULER is higher, with the interval, over the same prompts."""
    cells = [cells_of(run, length) for run in (mine, base)]
    assert all(cells[0][task]["prompts"] == cells[1][task]["prompts"] for task in cells[0])
    scores = [[one for cell in found.values() for one in cell["scores"]] for found in cells]
    value, (low, high) = intervals.paired_items(*scores)
    return [100 * one for one in (value, low, high)]


def behind(mine, base, length):
    value, low, high = difference(mine, base, length)
    return [-value, -high, -low]


def test_the_page_says_what_was_measured(runs):
    text = (ROUTER / "README.md").read_text().partition("## Three seeds")[0]
    head, _, points = text.partition("- **Asking** mends")
    introduction, _, table = head.partition("| plain |")
    check(introduction.replace("WikiText-2", ""), 1_024, 4, 12, LONG, 8, 11, 0, 1, LONG, SHORT, LONG)

    expected = [1, *ruler(runs["plain"])]
    extra = {"penalty": [0.3], "ask-32k": [LONG], "ask-32k-hidden": [64], "ask-hidden": [64]}
    for name in RECIPES:
        asked = {"penalty": [], "lengths": [90], "lengths-mixed": [90], "lengths-mixed-signals": [90],
                 "target-945": [94.5], "post-local": [94.5]}.get(name, [93])
        expected += [*extra.get(name, []), *asked, *reach_of(runs[name]), *ruler(runs[name])]
    check(table, *expected, SHORT, LONG, 368, 369, 1e-3, 1_470, 370, LONG, 0)

    tracking = [next(100 * cell["score"] for cell in runs[name]["tasks"]["ruler"]["cells"]
                     if (cell["task"], cell["length"]) == ("vt", LONG)) for name in ("plain", "target", "ask")]
    local = {name: reach_of(run)[0] for name, run in runs.items() if name != "plain"}
    kept = [runs[name]["tasks"]["reach"]["rows"]["learned"] for name in ("lengths", "lengths-mixed")]
    alike = [reach_of(runs[name])[1] for name in ("answers", "answers-mixed")]
    assert abs(alike[0] - alike[1]) < 0.005
    lost = {name: behind(runs[name], runs["plain"], LONG) for name in RECIPES}
    nearest, by = min((value, name) for name, value in lost.items())
    enough = min(lost[name] for name in RECIPES if local[name] >= 90)
    assert nearest[0] > 10
    assert "none is within 10 points" in " ".join((ROUTER.parent / "README.md").read_text().split())
    steps = {name: run["run"]["steps"] for name, run in runs.items() if name != "plain"}
    assert {steps[name] for name in RECIPES[:RECIPES.index("lengths")]} == {1_470, 370}
    assert {steps[name] for name in RECIPES[RECIPES.index("lengths"):]} == {368, 369} and steps["ask-32k"] == 370
    check(points, LONG, *tracking, *difference(runs["ask"], runs["target"], LONG),
          local["answers"] - local["answers-mixed"], *difference(runs["answers-mixed"], runs["answers"], LONG), LONG,
          kept[0]["kept"], *kept[0]["kept_95"],
          kept[1]["kept"], *kept[1]["kept_95"],
          *behind(runs["lengths-mixed-signals"], runs["lengths-mixed"], SHORT), SHORT,
          *behind(runs["lengths-mixed-signals"], runs["lengths-mixed"], LONG), LONG,
          local["lengths-mixed-signals"] - local["lengths-mixed"],
          *behind(runs["post-local"], runs["target-945"], SHORT), SHORT,
          *behind(runs["post-local"], runs["target-945"], LONG), LONG, 90, 2, LONG, *nearest, local[by], 90, *enough,
          88, 64, 1.4, 21_504, 22_176)
    assert max(layer["routed"] for layer in looks()["layers"][:3]) < 0.0005  # "the first three layers route nothing"


def test_the_page_says_what_three_seeds_reached():
    text = section("Three seeds")
    seeds = [result(name) for name in SEEDS]
    shorter = [result(f"{name}-{SHORT}") for name in SEEDS]
    assert [run["source_hash"] for run in shorter] == [run["source_hash"] for run in seeds]
    plain = read_results(ROUTER.parent / "long/plain/eval.json")
    assert [run["run"]["seed"] for run in seeds] == [0, 1, 2]
    made = [(found["seed"], found["made_of"]) for found in (run["tasks"]["ruler"] for run in (*seeds, plain))]
    assert made == [made[0]] * 4  # a prompt follows from these, its task, its length and its number
    scores = {name: {} for name in ("plain", "learned", "question")}
    rows = []
    for length in LENGTHS:
        scores["plain"][length] = base = scores_of(plain, length)
        for control in ("learned", "question"):
            cells = [cells_of(run, length, control) for run in seeds]
            assert all(len({found[task]["prompts"] for found in cells}) == 1 for task in cells[0])
            scores[control][length] = np.mean([scores_of(run, length, control) for run in seeds], axis=0)
            assert scores[control][length].shape == base.shape == (11, ITEMS)
        rows.append([length, *(100 * one[length].mean() for one in scores.values()), *(
            value for one in ("learned", "question") for value in points_behind(base, scores[one][length]))])
    each = [[number, *reach_of(short), *reach_of(run)]
            for number, (short, run) in enumerate(zip(shorter, seeds, strict=True))]
    assert all(kept < 0.97 for _, _, short, _, long in each for kept in (short, long))
    first, _, rest = text.partition("| 0 |")
    check(first.replace("WikiText-2", ""), 88, 64, SHORT, LONG)
    table, _, points = ("| 0 |" + rest).partition("- **It misses")
    check(table, *itertools.chain(*each, *rows))

    tasks = list(cells_of(plain, SHORT))
    worst = {length: 100 * (scores["plain"][length] - scores["question"][length]).mean(axis=1) for length in LENGTHS}
    found = [(float(behind[index]), tasks[index], length) for length, behind in worst.items()
             for index in [int(behind.argmax())]]
    (first_worst, *first_is), (second_worst, *second_is) = sorted(found, reverse=True)[:2]
    assert (first_is, second_is) == (["vt", SHORT], ["niah_single_3", LONG])
    over = {name: np.concatenate(list(of.values())) for name, of in scores.items()}
    counted = [[100 * (1 - run["tasks"]["reach"]["rows"]["learned"]["density_beyond"]) for run in some]
               for some in (shorter, seeds)]
    assert all(np.ptp(shares) < 1 for shares in counted)
    controls = [[run["tasks"]["reach"]["rows"][name]["kept"] for run in seeds] for name in ("random", "static")]
    took = json.loads((ROUTER / "post-local/summary.json").read_text())
    check(points.partition("GSM8K of")[0], 0.97, 11, 2, 8, SHORT, first_worst, LONG, second_worst,
          *points_behind(over["question"], over["learned"]), *points_behind(over["plain"], over["question"]),
          *points_behind(over["plain"], over["learned"]), SHORT, np.mean(counted[0]), SHORT, np.mean(counted[1]), LONG,
          *(bound for kept in controls for bound in (min(kept), max(kept))), took["seconds_this_session"],
          took["peak_memory_gb"])

    lost, pruned = points_behind(scores["plain"][LONG], scores["learned"][LONG]), result("final-0-pruned")
    pruning = points_behind(*(scores_of(run, LONG) for run in (seeds[0], pruned)))[0]
    saved = pruned["tasks"]["pruning"]
    top = " ".join((ROUTER.parents[2] / "README.md").read_text().split())
    for said in (f"lose {lost[0]:.1f} points of RULER [{lost[1]:.1f}, {lost[2]:.1f}] in 32,768 "
                 f"(plain: {rows[-1][1]:.1f})",
                 f"another's {len(saved['pruned_layers'])} on another text cost {pruning:.1f} points of RULER in "
                 "32,768"):
        assert said in top
    main = " ".join((ROUTER.parent / "README.md").read_text().split())
    main = main.partition("Three seeds of `repair`, on other prompts,")[2]
    check(main.partition(" points. *Limit")[0], lost[0],
          points_behind(scores["plain"][LONG], scores["question"][LONG])[0],
          100 * saved["cache_saved"] / saved["cache_bytes_before"], pruning)


def test_the_page_says_what_the_first_seed_learned():
    text, found = section("What the first seed learned"), looks()
    kinds = found["kinds"]
    shown = [(found["routed"], found["routed_95"]), *((kinds[kind]["routed"], kinds[kind]["routed_95"]) for kind in (
        "newline", "capitalised, seen beyond", "capitalised, not seen beyond", "token seen beyond", "token new",
        "token seen near"))]
    routed = np.array([layer["routed"] for layer in found["layers"]])
    order = np.argsort(-routed)
    assert order[:3].tolist() == [16, 11, 9] and (routed < 0.01).sum() == 12 and (routed[:3] < 0.01).all()
    beyond = {sort: 100 * sum(one["mass"][2:]) for sort, one in found["looks"].items()}
    check(text.replace("WikiText-2", ""), found["text"]["windows"], LONG,
          *(100 * one for value, interval in shown for one in (value, *interval)),
          8, 24, 100 * routed[order[:8]].sum() / routed.sum(), *order[:3], 100 * routed[order[:3]].sum() / routed.sum(),
          12, kinds["token seen beyond"]["routed"] / kinds["token seen near"]["routed"], beyond["routed"],
          beyond["local, layers as routed"], 1_056, 24)
    passage = result("final-0-guides")
    assert passage["source_hash"] == result("final-0")["source_hash"]
    assert (ROUTER / "final-0-guides" / passage["tasks"]["looks"]["picture"]["file"]).is_file()


def test_the_page_says_what_pruning_costs():
    text, pruned, whole = section("Pruned by a calibration text"), result("final-0-pruned"), result("final-0")
    found = pruned["tasks"]["pruning"]
    cells = [cells_of(run, LONG) for run in (whole, pruned)]
    assert pruned["source_hash"] == whole["source_hash"]
    assert all(cells[0][task]["prompts"] == cells[1][task]["prompts"] for task in cells[0])
    none, needle = pruned["tasks"]["audit"]["rows"]["none"], pruned["tasks"]["needle"]
    prompts = len(needle["seeds"]) * len(needle["depths"])
    assert np.mean(needle["exact_match"]) == 1 and needle["lengths"] == [LONG]
    check(text.replace("WikiText-2", ""), len(found["pruned_layers"]), found["layers"],
          100 * found["cache_saved"] / found["cache_bytes_before"], LONG, found["cache_bytes_before"] / 1e6,
          found["cache_bytes_after"] / 1e6, found["cost"], *found["cost_95"], none["worse"], prompts, prompts,
          *points_behind(*(scores_of(run, LONG) for run in (whole, pruned))), LONG)


def rivals_of(path):
    """(percent local that was asked for, choice): its row; the router's own density is "own"."""
    return {("own" if row["own"] else round(100 * (1 - row["target"])), row["name"]): row
            for row in json.loads((ROUTER.parent / path / "rivals.json").read_text())["rows"]}


def prompts_of(row):
    """The scores [task, prompt] of a row of rivals."""
    return np.array([row["ruler"][name]["scores"] for name in sorted(row["ruler"])])


def test_the_page_says_how_the_first_seed_compares_with_its_rivals():
    text, rows = section("The first seed beside its rivals"), rivals_of("router/final-0")
    run, plain = result("final-0"), read_results(ROUTER.parent / "long/plain/eval.json")
    read = scores_of(run, SHORT)[:, :5]
    assert np.abs(read - prompts_of(rows["own", "learned"])).max() < 1e-3  # so the prompts are those of the three seeds
    base = scores_of(plain, SHORT)[:, :5]
    expected = [4, SHORT, 5, SHORT, 100 * base.mean()]
    for local in (80, 90, 95, 98):
        expected.append(local)
        for name in ("learned", "heads", "joined", "searched", "random"):
            if (local, name) == (98, "joined"):
                assert (local, name) not in rows
                continue
            row = rows[local, name]
            assert abs(100 * (1 - row["density"]) - local) < 1.3
            expected += [row["kept"], 100 * row["ruler_mean"]]

    def kept(local, name, sign=1):
        return [sign * one for one in (rows[local, name]["behind"], *rows[local, name]["behind_95"][::sign])]

    def lost(local, name):
        return [100 * one for one in (rows[local, name]["ruler_behind"], *rows[local, name]["ruler_behind_95"])]

    before = rivals_of("long/strict")[90, "learned"]
    newer = points_behind(prompts_of(rows[90, "learned"]), prompts_of(before))
    asking = difference(result("ask"), result("target"), SHORT)
    needles = np.array([name.startswith("niah") for name in sorted(rows[90, "heads"]["ruler"])])
    lead = [points_behind(*(prompts_of(rows[90, name])[tasks] for name in ("learned", "heads")))
            for tasks in (~needles, needles)]
    layers = [rivals_of(path)[80, "searched"] for path in ("router/final-0", "long/strict")]
    first, second = (json.loads((ROUTER.parent / path / "rivals.json").read_text())["searched_layers"]
                     for path in ("router/final-0", "long/strict"))
    assert first == second and layers[0]["density"] == layers[1]["density"]
    local = [100 * rows[90, name]["ruler_local"] for name in ("learned", "heads")]
    left = [points_behind(base, prompts_of(rows[local, "learned"])) for local in (80, 90)]
    own = 100 * (1 - rows["own", "learned"]["density"])
    assert all(lost("own", name)[1] > 0 for name in ("searched", "ranked")) and lost("own", "heads")[1] < 0
    check(text.replace("WikiText-2", ""), *expected, 90, *kept(90, "heads"), *lost(90, "heads"), *kept(90, "searched"),
          *lost(90, "searched"), *lost(90, "ranked"), own, *kept("own", "heads"), *lost("own", "heads"), 80,
          *kept(80, "heads", -1), *kept(90, "joined", -1), 90, *lost(90, "joined"), 90, *newer,
          before["kept"] - rows[90, "learned"]["kept"], *asking, SHORT, 90, *lead[0], (~needles).sum(), *lead[1],
          needles.sum(), 80, *left[0], 90, *left[1], 55, 12, 90, *local, 80, *points_behind(*map(prompts_of, layers)))
    top = " ".join((ROUTER.parents[2] / "README.md").read_text().split())
    heads, layers = lost(90, "heads"), min(lost(90, "searched"), lost(90, "ranked"))
    assert (f"searched heads lose {heads[0]:.1f} points of RULER [{heads[1]:.1f}, {heads[2]:.1f}] to learned tokens, "
            f"layers {layers[0]:.1f}.") in top
    earlier = rivals_of("long/strict")[90, "heads"]["ruler_behind"]
    assert f"an earlier router trails heads by {-100 * earlier:.1f}." in top

    gsm8k = [found["tasks"]["gsm8k"]["scores"]["exact_match,strict-match"]["items"] for found in (plain, run)]
    value, (low, high) = intervals.paired_items(*gsm8k)
    said = section("Three seeds").partition("GSM8K of")[2].partition("Two in five")[0]
    check(said, 100 * np.mean(gsm8k[1]), 100 * value, 100 * low, 100 * high)
    assert np.mean(gsm8k[0]) == np.mean(gsm8k[1])


def test_the_page_says_what_the_larger_model_reached():
    text, run, before = section("The 1.5B"), result("final-1.5b"), result("final-1.5b-before")
    plain = read_results(ROUTER.parent / "long/plain-1.5b/eval.json")
    made = [(found["seed"], found["made_of"]) for found in (one["tasks"]["ruler"] for one in (run, before, plain))]
    assert made == [made[0]] * 3
    learned, earlier = (one["tasks"]["reach"]["rows"]["learned"] for one in (run, before))
    rows = []
    for length in (SHORT, LONG):
        base = scores_of(plain, length)
        mine = [scores_of(run, length, control) for control in ("learned", "question")]
        assert base.shape == mine[0].shape == (11, ITEMS)
        rows += [length, *(100 * one.mean() for one in (base, *mine)),
                 *(value for one in mine for value in points_behind(base, one))]

    def one_window(of):
        """Its share of the worth, and what is kept in the others."""
        nll = {name: np.array(row["window_nll"])[:, 1:].sum(1) for name, row in of["tasks"]["reach"]["rows"].items()}
        worth, lost = nll["none"] - nll["all"], nll["learned"] - nll["all"]
        rest = np.arange(len(worth)) != worth.argmax()
        assert len(worth) == 10
        return 100 * worth.max() / worth.sum(), 1 - lost[rest].sum() / worth[rest].sum()

    gain, short_gain = (points_behind(*(scores_of(run, length, one) for one in ("question", "learned")))
                        for length in (LONG, SHORT))
    lost = [np.array([one["tasks"]["reach"]["rows"][name]["window_nll"] for name in ("learned", "none", "all")])[
        :, :, 1:].sum(2) for one in (run, before)]
    less, less_95 = reach.ratio(lost[1][0] - lost[0][0], lost[0][1] - lost[0][2])
    ahead = points_behind(scores_of(before, SHORT), scores_of(run, SHORT))
    behind_it = points_behind(scores_of(run, LONG), scores_of(before, LONG))
    of_target = [json.loads((ROUTER / name / "summary.json").read_text()) for name in (
        "final-1.5b", "post-local", "final-1.5b-before")]
    now, small, then = [(one["steps"], one["target"]["greatest_weight"], one["target"]["weight"]) for one in of_target]
    assert then[0] == now[0]
    check(text, 4, LONG, *reach_of(run), *learned["kept_95"], *rows, *now, *small, *then[1:], earlier["kept"],
          *earlier["kept_95"], less, *less_95, *ahead, SHORT, *behind_it, LONG, *gain, LONG, *short_gain, SHORT,
          *one_window(run), one_window(before)[1])
    assert abs(run["run"]["tokens_seen"] / 4e6 - 1) < 0.01


def test_the_recipes_are_those_of_the_table(runs):
    parameters = {name: runs[name]["run"]["trained_parameters"] for name in RECIPES}
    assert min(parameters.pop("ask-hidden"), parameters.pop("ask-32k-hidden")) > 65_000 >= max(parameters.values())
    assert {parameters[name] for name in ("lengths-signals", "lengths-mixed-signals")} == {22_176}
    assert all(abs(runs[name]["run"]["tokens_seen"] / 12e6 - 1) < 0.01 for name in RECIPES)


def test_the_preset_is_the_recipe_of_the_three_seeds():
    """But that a step's rows come in two micro-batches."""
    for number, name in enumerate(SEEDS):
        run = read_results(ROUTER / name / "eval.json")["run"]
        given = {name: run[name] for name in ("model", "data", "seed")} | {"data": tuple(run["data"])}
        settings = resolve("router_strict", given)
        recipe = run["settings"]
        later = {*vars(settings)} - {*recipe, *given, "given", "preset", "regime"}  # settings that came since
        assert all(getattr(settings, name) == getattr(Settings(regime="router_strict"), name) for name in later)
        assert settings.seed == number and settings.batch_size * settings.grad_accum == recipe["batch_size"]
        assert recipe["grad_accum"] == 1
        other = {name for name in recipe if json.loads(json.dumps(getattr(settings, name))) != recipe[name]}
        assert other == {"batch_size", "grad_accum", "save_every", "eval_every"}
