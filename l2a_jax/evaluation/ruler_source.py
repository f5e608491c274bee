"""RULER (arXiv 2404.06654) as the installed lm-eval has it: its settings, templates, generators and scores, by name.

Its files import together what only some of them need (transformers, wonderwords, nltk's data), partly from the
network, and draw from the one generator of the process. So single definitions of theirs are executed here, with the
word lists and the generator of the caller.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import threading
from importlib import metadata
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

from l2a_jax.errors import UserError, needs

QUESTIONS = {"qa_squad": "read_squad", "qa_hotpot": "read_hotpotqa"}
"""Tasks about documents of others, and the function that reads those."""
USUAL = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
         "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")
RULER_TASKS = (*USUAL, *QUESTIONS)
"""Named as lm-eval's files are."""
_PARSING = threading.Lock()


class Settings(NamedTuple):
    """What lm-eval's file of a task says. `maker`: (file, function) of its prompts; `new_tokens`: of an answer at most;
    `delimiter`: between the question and how the answer begins; `scorer`: the function of `common_utils` that scores.
    """

    maker: tuple[str, str]
    new_tokens: int
    delimiter: str
    scorer: str


def settings(task: str) -> Settings:
    """Those of a task, named as its file is. Raises UserError where lm-eval is not installed, or has it otherwise."""
    said: dict[str, str] = {}
    file: str | None = f"{task}.yaml"
    while file is not None:  # what a file does not say, the one that it includes does
        lines = dict(re.findall(r"^ *(\w+): *(.*?) *$", _read(file), re.MULTILINE))
        said = {**lines, **said}
        file = lines.get("include")
    try:
        maker, scorer = (said[name].removeprefix("!function ").split(".") for name in ("custom_dataset",
                                                                                       "process_results"))
        return Settings((maker[0], maker[1]), int(said["max_gen_toks"]), json.loads(said["target_delimiter"]),
                        scorer[1])
    except (LookupError, ValueError) as error:
        raise UserError(f"lm-eval {version()} says RULER's task {task} in another way ({error!r}); expected 0.4.13's"
                        ) from None


def definitions(file: str, names: tuple[str, ...], **given: Any) -> dict[str, Any]:
    """Functions and constants of a file of lm-eval's RULER, executed anew among the `given` names.

    Raises UserError where lm-eval is not installed, or its file does not define one of `names`.
    """
    found = dict(given)
    exec(_compiled(file, names), found)
    return found


def version() -> str:
    """lm-eval's."""
    return metadata.version("lm_eval")


def score(task: str, answers: list[str], written: str) -> float:
    """What lm-eval gives for what was written: the share of the answers in it, letter case aside."""
    names = ("DEFAULT_SEQ_LENGTHS", "postprocess_pred", "string_match_all", "string_match_part")
    scorer = settings(task).scorer
    found = definitions("common_utils", (*names, scorer), re=re)
    return float(found[scorer]({"max_length": 0, "outputs": answers}, [written])["0"])


@functools.cache
def _read(file: str) -> str:
    path = Path(needs("lm_eval", "eval", "--tasks ruler").__path__[0]) / "tasks" / "ruler" / file
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"lm-eval {version()} has no RULER: {path} cannot be read ({error.strerror}); expected 0.4.13 "
                        "or later") from error


@functools.cache
def _compiled(file: str, names: tuple[str, ...]) -> CodeType:
    text = _read(f"{file}.py")
    with _PARSING:  # Python 3.11 counts the depth of all threads' trees in one place, and raises SystemError by chance
        tree = ast.parse(text)
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.Assign) and _name(node) in names]
    for node in kept:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []  # caches, which would keep the draws of one caller for another
    for name in names:
        if name not in map(_name, kept):
            raise _lacking(file, name)
    tree.body = kept
    # As in this file, annotations are not looked up: they may name what was not imported.
    return compile(tree, f"lm_eval.tasks.ruler.{file}", "exec")


def _name(node: ast.FunctionDef | ast.Assign) -> str | None:
    if isinstance(node, ast.FunctionDef):
        return node.name
    return node.targets[0].id if isinstance(node.targets[0], ast.Name) else None


def _lacking(file: str, name: str) -> UserError:
    return UserError(f"lm-eval {version()} does not define {name} in its RULER's {file}.py; expected 0.4.13's")
