"""The guides are true: their commands run, their links and files are there, their words are those of the code.

A shell block runs, in the order of its guide and in a folder of its own, unless a comment above it says what it needs
(`<!-- needs: gpu, network -->`); then its flags at least are known to the command. Tables of flags are generated from
what declares them: `PYTHONPATH=. python tests/test_guides.py` writes them anew.
"""

from __future__ import annotations

import functools
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import jax
import pytest

from l2a_jax.config import MODELS, L2AConfig
from l2a_jax.evaluation.registry import ASKED
from l2a_jax.flags import flag_table
from l2a_jax.models.params import init_params
from l2a_jax.training.presets import PRESETS
from l2a_jax.training.regimes import count_parameters, regime_mask
from l2a_jax.training.tables import PLAIN_REGIMES, REGIME_PRESET, REGIMES
from tests.test_house import FLOORS

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOUSE = "l2a_jax/README.md"
GUIDES = ("README.md", "CONTRIBUTING.md", "train/README.md", "eval/README.md", "convert/README.md", HOUSE,
          "eval/results/README.md")
NEEDS = {"gpu", "network", "files", "minutes", "hours"}
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>[^>]*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.S)
MADE = ("runs/", "models/", "checkpoints/", "DATA", "DIR", "RUN", "layers/")
"""What commands make, what stands for a path of the reader's own, and leaves of the parameter tree."""


@functools.cache
def text(guide: str) -> str:
    return (ROOT / guide).read_text()


def blocks(guide: str, language: str) -> list[tuple[frozenset[str], str]]:
    """(what it needs, its code) for each block of a language."""
    found = [match for match in BLOCK.finditer(text(guide)) if match["language"] == language]
    return [(frozenset((match["needs"] or "").replace(" ", "").split(",")) - {""}, match["code"]) for match in found]


def commands(code: str) -> list[list[str]]:
    """Commands of this repository in a block, as words."""
    words = [shlex.split(part, comments=True) for line in code.splitlines() for part in line.split("&&")]
    return [line[1:] for line in words if line and line[0] == "python"]


@pytest.fixture
def shell(tmp_path):
    """Run a block as a reader would who stands in the checkout, but in a folder of the test's own."""
    for folder in ("train", "eval", "convert"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"  # no link: an interpreter finds its libraries by its own path
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    here = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{python.parent}:{os.environ['PATH']}",
            "L2A_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}

    def run(code: str) -> None:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=tmp_path, env=here, text=True,
                              capture_output=True, timeout=300)
        assert done.returncode == 0, f"{code}\n{done.stdout[-2_000:]}\n{done.stderr[-4_000:]}"

    return run


def test_the_front_door_is_short():
    assert len(text("README.md").split()) <= 900


@pytest.mark.parametrize("guide", ["train/README.md", "eval/README.md", "convert/README.md"])
def test_shell_blocks_run(guide, shell):
    run = [code for needs, code in blocks(guide, "bash") if not needs]
    assert run
    for code in run:
        shell(code)


def test_what_blocks_need_is_said_in_known_words():
    for guide in GUIDES:
        assert not [needs for needs, _ in blocks(guide, "bash") if not needs <= NEEDS], guide
        assert text(guide).count("```bash") == len(blocks(guide, "bash")), f"{guide}: a block that nothing reads"


@pytest.mark.parametrize("guide", [HOUSE, "train/README.md"])
def test_python_blocks_run(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L2A_CACHE", str(tmp_path / "cache"))
    found = blocks(guide, "python")
    assert found
    for _, code in found:
        exec(compile(code, guide, "exec"), {})


def test_the_first_commands_are_those_that_tests_run():
    """Nothing here installs twice: the demo and the whole suite have tests of their own."""
    runs = [code.strip() for needs, code in blocks("README.md", "bash") if not needs]
    assert runs == ["pip install -e . && python train/run.py --regime l2a_ft", 'pip install -e ".[dev]" && pytest']
    assert '"l2a_ft"' in (ROOT / "tests/training/test_demo.py").read_text()
    # The line that .ci/run takes from the README and runs in a fresh environment.
    pattern = re.search(r"sed -n '(.*)' README.md", (ROOT / ".ci/run").read_text())[1]
    found = subprocess.run(["sed", "-n", pattern, str(ROOT / "README.md")], capture_output=True, text=True).stdout
    assert found.strip() == runs[1]
    for needs, code in blocks("CONTRIBUTING.md", "bash"):
        assert not needs and code.startswith('pip install -e ".[dev]"') and not commands(code)


@functools.cache
def help_of(command: str) -> str:
    done = subprocess.run([sys.executable, str(ROOT / command), "--help"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_flags_of_every_command_are_known():
    told = [line for guide in GUIDES for _, code in blocks(guide, "bash") for line in commands(code)]
    inline = re.findall(r"`python ([\w/]+\.py [^`]*)`", "".join(map(text, GUIDES)))
    for command, *words in told + [shlex.split(line) for line in inline]:
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"(?<![\w-]){word}(?![\w-])", help_of(command)), (command, word)


@pytest.mark.parametrize("guide", GUIDES)
def test_links_and_files_are_there(guide):
    here = (ROOT / guide).parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text(guide)):
        assert (here / target).exists(), f"{guide} links to {target}"
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text(guide)):
        if not name.startswith(MADE) and ("." in name or name.endswith("/")):
            assert (ROOT / name).exists() or (here / name).exists(), f"{guide} names {name}"


FLAGS = re.compile(r"(<!-- flags: ([\w.]+) -->\n)(.*?)(<!-- end of flags -->)", re.S)


def with_flags(guide: str) -> str:
    """The guide with the flags of every dataclass that a comment names (`<!-- flags: MODULE.CLASS -->`)."""
    def generated(match: re.Match) -> str:
        module, _, name = match[2].rpartition(".")
        return f"{match[1]}\n{flag_table(getattr(importlib.import_module(module), name)).strip()}\n\n{match[4]}"

    return FLAGS.sub(generated, text(guide))


@pytest.mark.parametrize("guide", ["train/README.md", "eval/README.md"])
def test_tables_of_flags_are_those_that_are_declared(guide):
    assert FLAGS.search(text(guide))
    assert with_flags(guide) == text(guide), "run PYTHONPATH=. python tests/test_guides.py"


def tables(guide: str, heading: str) -> list[list[str]]:
    """The rows of the table under a heading, cell by cell."""
    part = re.split(rf"^## {heading}$", text(guide), flags=re.M)[1].split("\n## ")[0]
    rows = [line.strip().strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_floors_are_those_that_imports_keep():
    told = [set(re.findall(r"`(\w+)`", row[0])) for row in tables(HOUSE, "Floors")]
    assert told == [set(floor) for floor in FLOORS]


def test_ten_questions_have_one_file_each():
    rows = tables(HOUSE, "Where an answer begins")
    assert len(rows) == 10
    for question, file in rows:
        assert (ROOT / file.strip("`")).is_file(), question


def test_the_tables_of_regimes_and_presets_are_those_of_the_code():
    separate, shared = (jax.eval_shape(functools.partial(init_params, MODELS["qwen2.5-0.5b"], l2a_config=layer),
                                       jax.random.key(0)) for layer in (L2AConfig(share_attention=False), L2AConfig()))
    rows = {name.strip("`"): counts for name, _, *counts in tables("train/README.md", "Regimes")}
    assert list(rows) == list(REGIMES)
    for regime, counts in rows.items():
        if counts != ["-", "-"] or regime not in PLAIN_REGIMES:
            trained = [count_parameters(params, regime_mask(params, regime)) for params in (separate, shared)]
            assert counts == [f"{count:,}" for count in trained], regime
    presets = {name: set(re.findall(r"`(\w+)`", of)) for names, _, of in tables("train/README.md", "Presets")
               for name in re.findall(r"`([\w.-]+)`", names)}
    assert list(presets) == list(PRESETS)
    for preset, regimes in presets.items():
        assert regimes == {regime for regime, begins in REGIME_PRESET.items() if begins == preset}, preset


def test_every_task_is_in_the_guide():
    rows = [re.findall(r"`(\w+)`", row[0]) for row in tables("eval/README.md", "Tasks")]
    assert {name for row in rows for name in row} == set(ASKED)


def test_adding_touches_at_most_four_files_and_names_what_is_in_them():
    part = text(HOUSE).split("## How to add")[1].split("\n## ")[0]
    recipes = re.split(r"^\*\*(.*)\*\*$", part, flags=re.M)[1:]
    assert len(recipes) == 10
    for title, steps in zip(recipes[::2], recipes[1::2], strict=True):
        numbered = re.findall(r"^\d\. (.*?)(?=^\d\. |\n\n|\Z)", steps, flags=re.M | re.S)
        assert 1 <= len(numbered) <= 4, title
        for step in numbered:
            file = re.match(r"`([\w/.]+)`", step)
            for name in re.findall(r"in `(\w+)`", step) if file else ():
                assert re.search(rf"\b{name}\b", (ROOT / file[1]).read_text()), f"{title}: {name} in {file[1]}"


def test_words_of_the_glossary_are_used_in_the_code():
    source = "\n".join(path.read_text() for path in (ROOT / "l2a_jax").rglob("*.py"))
    rows = tables(HOUSE, "Glossary")
    assert len(rows) == len({word for word, *_ in rows}) > 20
    for word, names, _ in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", source), f"{word}: no {name} in the code"


def test_the_table_of_extras_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = tables("CONTRIBUTING.md", "Set-up")
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row[0])] == list(project["optional-dependencies"])


def test_every_marker_is_explained():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    markers = {line.partition(":")[0] for line in tool["pytest"]["ini_options"]["markers"]}
    assert {row[0].strip("`") for row in tables("CONTRIBUTING.md", "Tests")} == markers


if __name__ == "__main__":
    for guide in GUIDES:
        (ROOT / guide).write_text(with_flags(guide))
