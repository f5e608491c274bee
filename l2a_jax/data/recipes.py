"""What `--data` may say, and the domains it stands for.

An entry is a recipe (`wikitext`, `diverse`), a recipe over local files (`diverse=DIR`), files, folders or globs, or
files under a name of their own (`notes=DIR`), which gives them a weight. All files without a name are one domain.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from l2a_jax.data.files import SUFFIXES, find, once
from l2a_jax.errors import UserError

FILES = "files"
"""The domain of all files given without a name."""


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub, read as a stream up to `characters` of text (None: whole)."""

    path: str
    config: str | None = None
    split: str = "train"
    characters: int | None = None


@dataclass(frozen=True)
class Domain:
    """One kind of text, with a share in the mix.

    `weight` is relative to the other domains of the same entry (None: by size). `text_field` and `join` are those of
    `l2a_jax.data.text.record_text`. `by_heading` splits plain text at WikiText's headings. `pattern` and `exclude`
    choose the files of a folder that replaces the hub; `entry` is the `--data` entry.
    """

    name: str
    entry: str
    weight: float | None = None
    files: tuple[Path, ...] = ()
    hub: Hub | None = None
    text_field: str | None = None
    join: str | None = None
    by_heading: bool = False
    pattern: str = "*"
    exclude: tuple[str, ...] = ()


# 40 million characters are some 10 million tokens: a run of 12 million tokens repeats nothing, and no recipe
# downloads a terabyte.
_SOME = 40_000_000

RECIPES: dict[str, tuple[Domain, ...]] = {
    "wikitext": (
        Domain("wikitext", "wikitext", 1.0, hub=Hub("Salesforce/wikitext", "wikitext-103-raw-v1"), by_heading=True,
               pattern="wiki*", exclude=("*test*", "*valid*")),
    ),
    "diverse": (
        Domain("narrative", "diverse", 1.0, hub=Hub("emozilla/pg19", characters=_SOME), join="source",
               pattern="narrative_*"),
        Domain("math", "diverse", 1.0, hub=Hub("open-web-math/open-web-math", characters=_SOME), pattern="math_*"),
        Domain("code", "diverse", 1.0, hub=Hub("codeparrot/codeparrot-clean", characters=_SOME), pattern="code_*"),
        Domain("science", "diverse", 1.0, hub=Hub("ccdv/arxiv-summarization", "document", characters=_SOME),
               text_field="article", pattern="science_*"),
    ),
}


def resolve(spec: str | Iterable[str]) -> tuple[Domain, ...]:
    """The domains that `--data` entries stand for, in the order given, each with its files (see `data.files`).

    Raises UserError on an unknown recipe, an entry that matches no file, a format that is not read.
    """
    domains: dict[str, Domain] = {}
    for entry in [spec] if isinstance(spec, str) else list(spec):
        for domain in _entry(entry):
            known = domains.get(domain.name)
            if known is None:
                domains[domain.name] = domain
            elif known.hub != domain.hub or known.entry != domain.entry:
                raise UserError(f"--data {entry}: the domain {domain.name!r} is already given by another entry")
            else:
                domains[domain.name] = replace(known, files=known.files + domain.files)
    if not domains:
        raise UserError(f"--data names nothing; expected a recipe ({', '.join(RECIPES)}) or files")
    return tuple(replace(domain, files=once(domain.files)) for domain in domains.values())


def absolute(entry: str) -> str:
    """The entry as it is read from any folder: its place, if it has one, as an absolute path."""
    name, place = _split(entry)
    if place is None:
        return entry
    whole = Path(place).expanduser().absolute()
    return str(whole) if name is None else f"{name}={whole}"


def _split(entry: str) -> tuple[str | None, str | None]:
    """Name and place of an entry: a recipe alone has no place, files need no name, and theirs may hold a `=`."""
    name, equals, place = entry.partition("=")
    if entry in RECIPES:
        return entry, None
    return (name, place) if equals and (name in RECIPES or not find(entry, f"--data {entry}")) else (None, entry)


def _entry(entry: str) -> tuple[Domain, ...]:
    name, place = _split(entry)
    if place is None:
        return RECIPES[name]
    if name is None:
        return (Domain(FILES, FILES, files=_files(place, entry)),)
    if name in RECIPES:
        return _local_recipe(name, place)
    similar = difflib.get_close_matches(name, RECIPES, n=1)
    if similar or not name.isidentifier():
        raise UserError(f"--data {entry}: no recipe is called {name!r}; " + _expected(similar))
    return (Domain(name, name, files=_files(place, entry)),)


def _local_recipe(name: str, place: str) -> tuple[Domain, ...]:
    """A recipe with local files instead of the hub; in a folder, those named for each domain."""
    entry = f"{name}={place}"
    recipe = RECIPES[name]
    found = _files(place, entry)
    domains = []
    for domain in recipe:
        files = tuple(file for file in found if fnmatch(file.name, domain.pattern)
                      and not any(fnmatch(file.name.lower(), pattern) for pattern in domain.exclude))
        if not files and len(recipe) == 1 and not Path(place).is_dir():
            files = found  # named one by one: the user has chosen
        if not files:
            patterns = ", ".join(d.pattern for d in recipe)
            raise UserError(
                f"--data {entry}: no file is named {domain.pattern} for the domain {domain.name!r}; "
                f"expected {patterns} ({', '.join(SUFFIXES)}, also .gz)"
            )
        # A record says itself where its text is: the field of the hub data set need not be the file's.
        domains.append(replace(domain, files=files, hub=None, text_field=None))
    return tuple(domains)


def _files(place: str, entry: str) -> tuple[Path, ...]:
    found = find(place, f"--data {entry}")
    if not found:
        path = Path(os.path.expanduser(place))
        if path.is_dir():
            raise UserError(f"--data {entry}: the folder holds no {', '.join(SUFFIXES)} file (also .gz)")
        if path.parent == Path(".") and not path.suffix and not glob.has_magic(place):
            raise UserError(f"--data {entry}: neither a recipe nor a file; "
                            + _expected(difflib.get_close_matches(place, RECIPES, n=1)))
        raise UserError(f"--data {entry}: no file matches {place}")
    return tuple(found)


def _expected(similar: list[str]) -> str:
    hint = f"did you mean {similar[0]!r}? " if similar else ""
    return f"{hint}expected {' or '.join(map(repr, RECIPES))}, or files, folders and globs, or NAME=FILES"
