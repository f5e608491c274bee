"""Held-out text for perplexity: from `--text` to one stream of token ids, and the rule by which it was joined.

A rule decides a perplexity as much as a model does, so the result names it:
  wikitext   WikiText raw, from its file or from the hub: the string that published numbers use. Lines that are blank
             become empty, all others keep their line end, and all are joined by a blank line.
  text       one document, as it stands.
  documents  several (files, records, or parts between <|endoftext|> marks), with the end-of-text token between them.
No special tokens are added.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from l2a_jax.data.encoder import check_ids, make_encoder
from l2a_jax.data.files import SUFFIXES, TEXT, find, once, suffix
from l2a_jax.data.recall import IDS
from l2a_jax.data.recipes import Hub
from l2a_jax.data.text import Fragment, hub_records, needed_columns, read_lines, read_records, record_text, separated
from l2a_jax.errors import UserError
from l2a_jax.files import sha256

WIKITEXT = "wikitext"
"""`--text wikitext` or `wikitext:validation`: WikiText-2 raw from the hub, its test split unless told."""
_SPLITS = ("test", "validation", "train")


class Text(NamedTuple):
    """Documents, how they are joined (see above), and the SHA-256 of every file by name, or by path where
    two have one name."""

    name: str
    documents: tuple[str, ...]
    rule: str
    files: dict[str, str]


def wikitext_join(raw: str) -> str:
    """The usual WikiText perplexity string of the raw file's content: rows as on the hub, which were read as Python
    reads text, so any line end is a newline, and a last line may lack its own."""
    return "\n\n".join(line if line.strip() else "" for line in io.StringIO(raw, newline=None))


def read_text(entry: str, flag: str = "--text") -> Text:
    """The text that `entry` names: `wikitext[:split]`, a file, a folder or a glob.

    Raises UserError where nothing matches, a file is not readable, or there is no text in it.
    """
    name, _, split = entry.partition(":")
    if name == WIKITEXT and not Path(entry).exists():
        return _from_hub(entry, split or "test", flag)
    paths = once(find(entry, f"{flag} {entry}"))
    if not paths:
        raise UserError(f"{flag} {entry}: no such file; expected {WIKITEXT}, a file, a folder or a glob of "
                        f"{', '.join(SUFFIXES)} (also .gz)")
    raw = [fnmatch(path.name.lower(), "wiki*raw*") and suffix(path) in TEXT for path in paths]
    documents: list[str] = []
    for path, is_raw in zip(paths, raw, strict=True):
        if is_raw:
            documents.append(wikitext_join("".join(line for _, line in read_lines(path))))
        elif suffix(path) in TEXT:
            documents += _documents(separated(line for _, line in read_lines(path)))
        else:
            documents += _documents(record_text(read_records(path, needed=needed_columns(None, None))))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{flag} {entry}: there is no text in it")
    rule = WIKITEXT if all(raw) and len(documents) == 1 else "text" if len(documents) == 1 else "documents"
    if any(raw) and rule == "documents":
        rule = "documents (WikiText raw files joined as usual)"
    names = [path.name for path in paths]
    return Text(entry if len(paths) > 1 else paths[0].name, tuple(documents), rule,
                {name if names.count(name) == 1 else str(path): sha256(path)
                 for name, path in zip(names, paths, strict=True)})


def tokenise(text: Text, tokenizer: Any, vocab_size: int) -> Int32[np.ndarray, " n"]:
    """The token ids of a text. UserError where the model's embedding has no row for one of them."""
    encoder = make_encoder(tokenizer)
    parts = encoder.encode(text.documents)
    joined = []
    for index, part in enumerate(parts):
        joined += [part] if index == 0 else [np.asarray([encoder.end_id]), part]
    ids = np.concatenate(joined)
    check_ids(ids, vocab_size, text.name)
    return ids.astype(np.int32)


def speaks_recall(tokenizer: Any) -> bool:
    """Whether this is the embedded model's tokenizer, whose words are the synthetic recall corpus's."""
    return tokenizer is not None and tokenizer.get_vocab() == IDS


def _from_hub(entry: str, split: str, flag: str) -> Text:
    if split not in _SPLITS:
        known = ", ".join(f"{WIKITEXT}:{name}" for name in _SPLITS)
        raise UserError(f"{flag} {entry}: no such split; expected {known}")
    hub = Hub("Salesforce/wikitext", "wikitext-2-raw-v1", split)
    rows = [record["text"] for _, record in hub_records(hub, f"{flag} FILE, such as wiki.test.raw")]
    joined = "\n\n".join(rows)
    return Text(f"{hub.path} {hub.config} {split}", (joined,), WIKITEXT,
                {entry: hashlib.sha256(joined.encode()).hexdigest()})


def _documents(fragments: Iterable[Fragment]) -> list[str]:
    documents: list[list[str]] = []
    for fragment in fragments:
        if fragment.starts or not documents:
            documents.append([])
        documents[-1].append(fragment.text)
    return ["".join(parts) for parts in documents]
