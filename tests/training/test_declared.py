"""One declaration a command: every flag has help, something reads it, and guides and programs follow from it."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import subprocess
import sys

import pytest

import l2a_jax
from l2a_jax import flags
from l2a_jax.config import L2AConfig
from l2a_jax.evaluation.options import NeedleFlags, Options
from l2a_jax.fields import Mark, declared, flag, said
from l2a_jax.inference.options import Continuation
from l2a_jax.runs.plan import make_plan, program_key
from l2a_jax.training.optimizer import Dials
from l2a_jax.training.presets import PRESETS
from l2a_jax.training.settings import LAYER_FIELDS, Settings, compiled_in, resolve

ROOT = pathlib.Path(l2a_jax.__file__).parent
KINDS = (Settings, Options, NeedleFlags, Continuation)
FLAGS = [(kind, name) for kind in KINDS for _, names in flags.groups(kind) for name in names]


@pytest.mark.parametrize(("kind", "name"), FLAGS, ids=lambda value: getattr(value, "__name__", value))
def test_a_flag_has_help_a_group_and_a_row_in_the_guides_table(kind, name):
    told = flags.describe(kind, name)
    assert told.help and told.names[0] in flags.flag_table(kind)


def test_titles_of_groups_begin_small_but_for_names():
    titles = {title for kind in KINDS for title, _ in flags.groups(kind)}
    assert "RULER" in titles and "what is routed" in titles and all(
        title[0].islower() or title.split()[0].isupper() for title in titles)


def read_names() -> set[str]:
    """Every name that the library takes from an object: `settings.lr`, `options["text"]`, `getattr(s, "window")`."""
    found: set[str] = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                found.add(node.slice.value)
            elif isinstance(node, ast.arg):  # a flag handed on by its name
                found.add(node.arg)
    return found


def test_something_reads_every_flag():
    read = read_names()
    unread = [flag(name) for _, name in FLAGS if name.removeprefix("needle_") not in read]
    assert not unread, f"nothing reads {unread}"


def test_layer_fields_are_those_of_the_layer():
    layer = {field.name for field in dataclasses.fields(L2AConfig)} - {"pruned_layers"}
    assert layer == {*LAYER_FIELDS, "rope"}
    assert all(getattr(Settings, name) == getattr(L2AConfig, name) for name in layer)


def test_a_dial_is_an_argument_of_the_step_and_everything_else_is_compiled_in():
    dials = {name for name, hint in declared(Settings).items() if Mark.DIAL in said(hint, Mark)}
    assert dials == {*Dials._fields, "tokens"}
    base, changed = Settings(regime="l2a_ft"), {"lr": 1.0, "steps": 7, "seed": 3, "save_every": 9}
    assert compiled_in(base) == compiled_in(dataclasses.replace(base, **changed))
    for name, value in (("remat", "layer"), ("deterministic", True), ("clip", 2.0), ("regime", "full_ft")):
        assert compiled_in(base) != compiled_in(dataclasses.replace(base, **{name: value})), name


def test_a_program_is_known_by_what_is_compiled_into_it():
    key = program_key(make_plan(resolve("l2a_ft", {})))
    for given, same in (({"lr": 1e-3, "steps": 9, "penalty": 0.1}, True), ({"dtype": "float32"}, True),
                        ({"unroll": False}, True), ({"batch_size": 3}, False), ({"window": 9}, False)):
        assert (program_key(make_plan(resolve("l2a_ft", given))) == key) == same, given


@pytest.mark.parametrize("command", ("train/run.py", "eval/run.py", "eval/generate.py"))
def test_help_says_everything_before_jax_is_there(command):
    script = ("import runpy, sys\nsys.argv = [sys.argv[1], '--help']\ntry: runpy.run_path(sys.argv[0], run_name="
              "'__main__')\nfinally: print('jax' in sys.modules)")
    said = subprocess.run([sys.executable, "-c", script, str(ROOT.parent / command)], cwd=ROOT.parent, text=True,
                          capture_output=True, timeout=60, env={"PYTHONPATH": str(ROOT.parent), "COLUMNS": "120"})
    assert said.returncode == 0 and said.stdout.endswith("False\n"), said.stderr
    if command == "train/run.py":
        assert all(preset.about in said.stdout for preset in PRESETS.values())
        assert "default 256" in said.stdout and "best_fit, concat" in said.stdout and "--window KEYS" in said.stdout


@pytest.mark.parametrize(("arguments", "line"), [
    (["--steps", "x"], "--steps is 'x'; expected a whole number, at least 1, at most 2,147,483,647"),
    (["--lr", "much"], "--lr is 'much'; expected a number, above 0"),
    (["--tokens", "12 apples"], "--tokens is '12 apples'; expected a whole number above 0"),
    (["--router-l", "1"], "unrecognized arguments: --router-l 1 (did you mean --router-lr?)"),
    (["--seq-len"], "argument --seq-len: expected one argument; see --help"),
])
def test_a_mistake_is_told_in_one_line(arguments, line):
    said = subprocess.run([sys.executable, str(ROOT.parent / "train" / "run.py"), "--regime", "l2a_ft", *arguments],
                          cwd=ROOT.parent, env={"PYTHONPATH": str(ROOT.parent)}, capture_output=True, text=True)
    assert said.returncode == 2 and said.stderr.startswith(f"error: {line}") and said.stderr.count("\n") == 1
