"""From a declaration (`fields`) to the command line: its parser, its help, and its table in a guide.

    parser = make_parser(__doc__, Settings)
    given = vars(parser.parse_args(arguments))    # what was given, and nothing else

Standard library alone: help must be there before JAX is.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any, NamedTuple

from l2a_jax import commands, fields
from l2a_jax.errors import UserError, shown
from l2a_jax.fields import LONGEST, Choice, Mark, Range, Unit, Written, said


class Flag(NamedTuple):
    """A field as people are told of it. `names`: --share-attention and --no-share-attention, say."""

    names: tuple[str, ...]
    unit: str
    allowed: str
    default: str
    help: str


class Parser(argparse.ArgumentParser):
    """Keeps what was given and nothing else; a mistake is told in one line."""

    def __init__(self, **given: Any):
        super().__init__(**given, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                         argument_default=argparse.SUPPRESS)

    def error(self, message: str) -> typing.NoReturn:
        known = [name for action in self._actions for name in action.option_strings]
        strange = re.findall(r"(?<= )--[\w-]+", message) if message.startswith("unrecognized") else []
        near = [name for word in strange for name in difflib.get_close_matches(word, known, n=1)]
        self.exit(2, f"error: {message}{f' (did you mean {near[0]}?)' if near else '; see --help'}\n")


def make_parser(doc: str, *kinds: type, required: bool = True, epilog: str | None = None) -> Parser:
    """A parser of every flag that the dataclasses declare, in their groups. `required`: those without a default are."""
    places = [name.upper() for kind in kinds for name, hint in fields.declared(kind).items()
              if Mark.POSITIONAL in said(hint, Mark)]
    parser = Parser(description=doc, epilog=epilog, usage=" ".join(("%(prog)s", *places, "[--flag VALUE ...]")))
    for kind in kinds:
        for title, names in groups(kind):
            group = parser.add_argument_group(title)
            for name in names:
                _add(group, kind, name, required)
    return parser


def _add(group: Any, kind: type, name: str, required: bool) -> None:
    hint, flag = fields.declared(kind)[name], describe(kind, name)
    inner = _bare(hint)
    facts = "; ".join(filter(None, (flag.allowed, flag.default and f"default {flag.default}")))
    about: dict[str, Any] = {"help": (flag.help + (f" ({facts})" if facts else "")).replace("%", "%%")}
    if inner is bool:
        about["action"] = "store_true" if len(flag.names) == 1 else argparse.BooleanOptionalAction
    elif typing.get_origin(inner) is tuple and not said(hint, Written):
        element = typing.get_args(inner)[0]
        about |= {"nargs": "+", "parse": lambda texts, _: tuple(read(text, element, flag.names[0]) for text in texts)}
    else:
        about["parse"] = lambda text, _: read(text, hint, flag.names[0])
    if "parse" in about:
        about |= {"action": commands.Parsed, "metavar": flag.unit}
    if Mark.POSITIONAL in said(hint, Mark):
        group.add_argument(name, **about)
    else:
        group.add_argument(*flag.names[:1], **about, required=required and _default(kind, name) is dataclasses.MISSING)


def read(text: str, hint: Any, flag: str) -> Any:
    """The value that a flag's text stands for. UserError where it is of another type than the annotation's."""
    for written in said(hint, Written):
        return written.read(text, flag)
    kind = _bare(hint)
    try:
        return commands.path(text, flag) if kind is Path else kind(text) if kind in (int, float) else text
    except UserError:
        raise
    except ValueError:
        raise UserError(f"{flag} is {shown(text)}; expected {fields.problem(text, hint)}") from None


def groups(kind: type) -> list[tuple[str, list[str]]]:
    """The flags of a dataclass by the class that declares them, its own first: (title, names)."""
    found = []
    for base in filter(dataclasses.is_dataclass, kind.__mro__):
        names = [name for name in inspect.get_annotations(base)
                 if name in fields.declared(kind) and Mark.RECORDED not in said(fields.declared(kind)[name], Mark)]
        title = re.split(r"[.\n]", base.__doc__ or base.__name__)[0]
        named = title.split()[0].isupper()  # RULER is a name, not the first word of a sentence
        found += [(title if named else title[0].lower() + title[1:], names)] if names else []
    return found


def describe(kind: type, name: str) -> Flag:
    """What there is to tell of a field."""
    hint, default = fields.declared(kind)[name], _default(kind, name)
    inner, flag = _bare(hint), fields.flag(name)
    parts = (hint, typing.get_args(inner)[0]) if typing.get_origin(inner) is tuple else (hint,)
    rules = [_allowed(rule) for part in parts for rule in (*said(part, Choice), *said(part, Range))]
    by_type = {bool: "", int: "n", float: "x", Path: "path"}.get(_bare(parts[-1]), name.rpartition("_")[2])
    unit = next((unit.name for part in parts for unit in said(part, Unit)), by_type)
    names = ((name.upper(),) if Mark.POSITIONAL in said(hint, Mark) else
             (flag, f"--no-{flag[2:]}") if inner is bool and default is not False else (flag,))
    return Flag(names, unit.upper(), "; ".join(rules), _spelled(default), "".join(said(hint, str)[:1]))


def flag_table(kind: type) -> str:
    """The flags of a dataclass as markdown, one table a group, for a guide."""
    lines = []
    for title, names in groups(kind):
        lines += ["", f"**{title[0].upper()}{title[1:]}**", "", "| flag | default | | allowed |", "|---|---|---|---|"]
        for flag in (describe(kind, name) for name in names):
            named = ", ".join(f"`{name} {flag.unit if name[0] == '-' else ''}".rstrip() + "`" for name in flag.names)
            cells = (named, flag.default, flag.help.replace("|", "\\|"), flag.allowed)
            lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    return "\n".join(lines[1:]) + "\n"


def _allowed(rule: Choice | Range) -> str:
    if isinstance(rule, Choice):
        return ", ".join(rule)
    bare = dataclasses.replace(rule, meaning="", high=rule.high if rule.high < LONGEST else float("inf"))
    return "" if bare == Range(0) else str(bare)


def _spelled(default: Any) -> str:
    """A default as one would write it; nothing where there is none, or where the help says what None means."""
    if default is None or default is dataclasses.MISSING or default is False:
        return ""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    if isinstance(default, (bool, str)):
        return "on" if default is True else str(default)
    return f"{default:,}" if isinstance(default, int) else f"{default:g}"


def _default(kind: type, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(kind) if field.name == name)


def _bare(hint: Any) -> Any:
    """The type of an annotation, without what is said of it and without None."""
    if typing.get_origin(hint) is typing.Annotated:
        return _bare(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _bare(next(option for option in typing.get_args(hint) if option is not type(None)))
    return hint
