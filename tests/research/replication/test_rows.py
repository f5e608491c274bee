"""The table of rows: names, groups, and commands that the training and evaluation commands understand as meant."""

import dataclasses
import importlib.util
import pathlib
import shlex

import pytest

from l2a_jax.config import MODELS
from l2a_jax.errors import UserError
from l2a_jax.models.params import abstract_params
from l2a_jax.research.replication import damage
from l2a_jax.research.replication.instruments import INSTRUMENTS
from l2a_jax.research.replication.measures import TASKS
from l2a_jax.research.replication.row import Measures
from l2a_jax.research.replication.rows import GROUPS, all_rows, choose, with_baselines
from l2a_jax.training import tables
from l2a_jax.training.regimes import count_parameters, regime_mask
from l2a_jax.training.settings import layer_of, resolve

ROOT = pathlib.Path(__file__).resolve().parents[3]


def command(name):
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_are_unique_and_every_comparison_exists():
    rows = all_rows()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names) and {row.group for row in rows} == set(GROUPS)
    assert {row.baseline for row in rows} - {None} <= {*names, "baseline-3b"}
    for row in rows:
        assert set(row.measures.tasks) <= {*TASKS, *INSTRUMENTS}
        assert not ("absorption" in row.measures.tasks and row.regime == "baseline")


def test_flags_are_the_settings_of_the_training_command():
    """`train/run.py` parses a row's flags into the very settings that the study trains with."""
    parser = command("train/run").make_parser()
    for row in all_rows():
        flags = vars(parser.parse_args(row.flags("M.gguf", "texts")))
        regime, named = flags.pop("regime"), flags.pop("preset", ())
        found, row_settings = resolve(regime, flags, named), row.settings("M.gguf", "texts")
        assert dataclasses.replace(found, preset=(), given=()) == dataclasses.replace(row_settings, given=()), row.name


def test_every_command_parses():
    parsers = {"train/run.py": command("train/run").make_parser(), "eval/run.py": command("eval/run").make_parser()}
    for row in all_rows():
        for line in row.commands("M.gguf", "texts"):
            assert "{data}" not in line
            _, script, *arguments = shlex.split(line)
            parsers[script].parse_args(arguments)
        assert row.regime == "baseline" or f"--run-dir runs/{row.name}" in row.commands()[0]


def test_a_hash_follows_what_decides_a_result_and_nothing_else():
    rows = [row for row in all_rows() if row.regime != "baseline"]
    assert len({row.training_hash for row in rows}) == len(rows)  # no row is trained twice
    row = rows[0]
    renamed = dataclasses.replace(row, name="x", group="y", question="z")
    assert renamed.training_hash == row.training_hash
    shorter = dataclasses.replace(row, measures=Measures(context=512))
    assert shorter.training_hash == row.training_hash
    assert shorter.task_hash("perplexity") != row.task_hash("perplexity")
    assert shorter.task_hash("needle") == row.task_hash("needle")
    limited = row.with_limit(10)
    assert limited.task_hash("piqa") != row.task_hash("piqa") and row.with_limit(None) is row
    assert limited.accepts("piqa", row.task_hash("piqa"))  # all items answer for the first ten
    assert not row.accepts("piqa", limited.task_hash("piqa"))


def test_the_collapse_rows_span_the_ratios():
    """Tokens per trained parameter from 0.005 to above 1 in l2a_ft, by tokens and by layers."""
    config = MODELS["qwen2.5-0.5b"]
    ratios = []
    for row in choose(groups=("collapse",)):
        s = row.settings()
        shapes = abstract_params(config, layer_of(s))
        trained = count_parameters(shapes, regime_mask(shapes, s.regime), s.attention_layers)
        if row.regime == "l2a_ft":
            ratios.append(s.tokens / trained)
    assert min(ratios) < 0.0051 and max(ratios) > 3 and sum(0.1 < ratio < 1 for ratio in ratios) >= 3


def test_the_damage_rows_are_the_design():
    rows = choose(groups=("damage",))
    assert len(rows) == damage.RUNS + len(damage.REPLICATED)
    for row in rows:
        s = row.settings()
        assert dict(row.factors) == {name: str(getattr(s, name)) for name in damage.FACTORS}
        assert s.tokens == 4_000_000 and not s.share_attention
    seeds = [row.settings().seed for row in rows]
    assert sorted(seeds) == [0] * 16 + [1] * 2


def test_the_follow_up_crosses_three_factors():
    rows = choose(groups=("damage", "together"))
    assert len({row.name for row in rows}) == len(rows) == 18 + len(damage.follow_up())
    crossed = damage.crossed([dict(row.factors) for row in rows], [row.name for row in rows])
    assert len(crossed) == 6 and all(None not in names for _, names in crossed)
    assert crossed[3] == ("sequential, 4 sinks", ["damage-seq-k4-none-w2048-l1", "damage-seq-k4-none-w1024-l1",
                                                  "damage-seq-k4-none-w256-l1"])
    for row in choose(groups=("together",)):
        s = row.settings()
        assert dict(row.factors) == {name: str(getattr(s, name)) for name in damage.FACTORS}


def test_a_setting_that_came_later_leaves_the_hash_of_rows_that_do_not_use_it():
    row = choose(("repair-w256-p0.5-s0",))[0]
    same = dataclasses.replace(row, given=(*row.given, ("echo", 0.0)))
    other = dataclasses.replace(row, given=(*row.given, ("echo", 0.2)))
    assert same.training_hash == row.training_hash == "f144d1783d74" != other.training_hash


def test_the_preset_that_keeps_the_needle_is_the_row_that_was_run():
    row = choose(("repair-t8192-w1024-p0.5-f0.3-e1",))[0].settings()
    preset = resolve("router_only", {"model": row.model, "data": row.data}, ("0.5b-24gb", "repair-far"))
    assert dataclasses.replace(preset, preset=(), given=()) == dataclasses.replace(row, preset=(), given=())


def test_a_renewed_preset_changes_no_row_that_was_run(monkeypatch):
    assert (flags := choose(("router_strict-far-0.5b",))[0].flags())[flags.index("--preset") + 1] == "repair-2025"
    row = choose(("repair-t8192-w1024-p0.5-f0.3-e1",))[0]
    before, flags = row.settings(), row.flags()
    monkeypatch.setitem(tables.REGIME_PRESET, "router_only", "repair-far")
    assert row.settings() == before
    named = row.flags()
    at = named.index("--preset")
    assert named[at + 1] == "repair-2025" and named[:at] + named[at + 2 :] == flags


def test_choosing():
    assert [row.name for row in choose(("baseline-0.5b",))] == ["baseline-0.5b"]
    assert len(choose(groups=("damage", "absorption"))) == 20 and len(choose()) == len(all_rows())
    assert [row.name for row in choose(("noise-f0.1", "baseline-0.5b") * 2)] == ["noise-f0.1", "baseline-0.5b"]
    together = [row.name for row in with_baselines(choose(("repair-t8192-w256-p0.3",)))]
    assert together == ["baseline-0.5b", "repair-t8192-w256-p0.3"]
    assert with_baselines(choose()) == all_rows()
    with pytest.raises(UserError, match="no row 'nope'"):
        choose(("nope",))
    with pytest.raises(UserError, match="expected some of main"):
        choose(groups=("nope",))


def test_the_command_lists_and_refuses(capsys):
    main = command("train/study").main
    assert main(["--list", "--group", "damage"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 18
    assert main(["--rows", "nope"]) == 2 and "no row 'nope'" in capsys.readouterr().err
    assert main(["--group", "damage"]) == 2 and "--data-dir is needed" in capsys.readouterr().err
