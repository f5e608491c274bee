"""What a base installation leaves out: where it is missing, one line names the extra, before anything slow."""

import ast
import pathlib
import re
import sys
import tomllib
from types import SimpleNamespace

import numpy as np
import pytest

from l2a_jax import errors
from l2a_jax.data.recipes import Hub
from l2a_jax.data.text import hub_records, read_records
from l2a_jax.evaluation import evaluate, needle
from l2a_jax.evaluation.needle import NeedleOptions
from l2a_jax.evaluation.registry import Work
from l2a_jax.evaluation.tasks import load_tasks
from l2a_jax.sources import TINY, load_pretrained
from l2a_jax.training.metrics import draw_curves

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PEERS = {"torch", "transformers", "tokamax", "triton"}
"""What speed is measured beside, where it is installed; only `research` names them, inside the functions that do."""


@pytest.fixture
def without(monkeypatch):
    """Take a library away, and what has been imported of it or holds on to it."""

    def take(library: str) -> None:
        gone = [name for name in sys.modules if name.partition(".")[0] == library]
        for name in {library, *gone}:
            monkeypatch.setitem(sys.modules, name, None)
        for name in ("l2a_jax.evaluation.harness", "l2a_jax.research.replication.effects"):
            monkeypatch.delitem(sys.modules, name, raising=False)

    return take


def reads_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    list(read_records(tmp_path / "a.parquet", lambda done: None, lambda names: names))


def scores_a_benchmark(tmp_path):
    evaluate.set_up(evaluate.Options(source=TINY, tasks=("hellaswag",), out=tmp_path))


def imports(module):
    def do(tmp_path):
        __import__(module)

    return do


def draws_a_figure(tmp_path):
    from l2a_jax.research.tables import pyplot

    pyplot()


def draws_a_text(tmp_path):
    from l2a_jax.evaluation.routed_picture import draw_routed_text

    draw_routed_text(np.zeros(1, int), np.zeros(1), lambda ids: "a", tmp_path / "a.png")


CASES = [
    ("datasets", "data", lambda tmp_path: next(hub_records(Hub("a/b", None, "train"), "--data FILE"))),
    ("pyarrow", "data", reads_parquet),
    ("lm_eval", "eval", scores_a_benchmark),
    ("lm_eval", "eval", lambda tmp_path: load_tasks(("piqa",), {}, None)),
    ("lm_eval", "eval", imports("l2a_jax.evaluation.harness")),
    ("matplotlib", "eval", lambda tmp_path: draw_curves([], tmp_path / "curves.png")),
    ("matplotlib", "eval", lambda tmp_path: needle.draw_heat_map(
        {"lengths": [1], "depths": [0], "distractors": 7}, tmp_path / "needle.png")),
    ("matplotlib", "research", draws_a_figure),
    ("matplotlib", "eval", draws_a_text),
    ("scipy", "research", imports("l2a_jax.research.replication.effects")),
]


@pytest.mark.parametrize(("library", "extra", "work"), CASES)
def test_the_extra_is_named(library, extra, work, without, tmp_path):
    without(library)
    with pytest.raises(errors.Missing) as raised:
        work(tmp_path)
    said = errors.sentence(raised.value)
    assert library in said and f"l2a-jax[{extra}]" in said and "\n" not in said
    assert library.replace("_", "-") in " ".join(requirements(extra))
    assert not list(tmp_path.glob("*.png"))


def test_a_library_that_lacks_something_itself_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        errors.needs("half_there", "eval", "a test")


def test_a_run_and_a_needle_go_without_their_pictures(without, monkeypatch, caplog, tmp_path):
    from l2a_jax.runs.train import train
    from l2a_jax.training import settings

    without("matplotlib")
    train(settings.resolve("router_strict", {"steps": 1, "batch_size": 1, "eval_batches": 1}), tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").is_file() and not (tmp_path / "run" / "curves.png").exists()
    assert "no curves.png" in caplog.text
    grid = {"lengths": [64], "depths": [0.0], "distractors": 7}
    monkeypatch.setattr(needle, "evaluate_needle", lambda *a, **k: grid)
    model = load_pretrained(TINY)
    assert needle.task(Work("needle", SimpleNamespace(backend="auto"), model, model, None, NeedleOptions(), {}, None,
                             tmp_path / "eval.json")) == grid
    assert "no needle.png" in caplog.text


def requirements(extra: str) -> set[str]:
    """Libraries of an extra and of the extras that it holds."""
    found = set()
    for line in PROJECT["optional-dependencies"][extra]:
        held = re.match(r"l2a-jax\[(\w+)\]", line)
        found |= requirements(held[1]) if held else {re.match(r"[\w-]+", line)[0]}
    return found


def test_the_library_imports_what_it_declares():
    """In the open what the base holds; by `needs`, or after it, what an extra does."""
    base = {name.replace("-", "_").replace("orbax_checkpoint", "orbax")
            for name in (re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"])}
    extras = {name.replace("-", "_") for name in requirements("research")}
    for path in sorted((ROOT / "l2a_jax").rglob("*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else [])
            for name in (name.partition(".")[0] for name in names):
                held = base | {"jaxlib", "l2a_jax"} | (PEERS if "research" in path.parts else set())
                guarded = name in extras and re.search(r"needs\(|TYPE_CHECKING", text)
                assert name in sys.stdlib_module_names or name in held or guarded, (path, name)
        assert set(re.findall(r'needs\("(\w+)', text)) <= extras, path
