"""The tokenizer of a Hugging Face folder, from whichever of its files state what.

Several files may state the id of one token: `vocab.json`, `added_tokens.json`, `tokenizer_config.json` (under
`added_tokens_decoder`) and `tokenizer.json`. They are all read, and must agree. So must the two that state roles,
`tokenizer_config.json` and `special_tokens_map.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from l2a_jax.config import END_OF_TEXT
from l2a_jax.errors import UserError, shown
from l2a_jax.files import read_json, read_text
from l2a_jax.weights.hf_folder import GENERATION
from l2a_jax.weights.tokenizer import ROLES, Tokenizer, building, byte_level_bpe, content_of, post_process

VOCABULARY, MERGES, WHOLE = "vocab.json", "merges.txt", "tokenizer.json"
SETTINGS, ROLE_MAP, ADDED, TEMPLATE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                                       "chat_template.jinja")
FILES = (VOCABULARY, MERGES, WHOLE, SETTINGS, ROLE_MAP, ADDED, TEMPLATE)
_DECODER = "added_tokens_decoder"
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
_MOST = 1 << 24
"""Beyond every vocabulary there is; an id far out costs as much as all those before it."""
_FORMS = {
    **dict.fromkeys(ROLES, ("a token", lambda token: _text(content_of(token)))),
    **dict.fromkeys(_EXTRA, ("a list of tokens", lambda tokens: isinstance(tokens, list | dict) and all(
        _text(content_of(token)) for token in _listed(tokens)))),
    **dict.fromkeys(("add_bos_token", "add_eos_token"), ("true or false", lambda switch: isinstance(switch, bool))),
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder: `tokenizer.json`, or `vocab.json` with `merges.txt`; None if neither.

    Raises UserError if a file is damaged, or two of them contradict each other.
    """
    whole = folder / WHOLE
    slow = [name for name in (VOCABULARY, MERGES) if (folder / name).exists()]
    if not whole.exists() and len(slow) < 2:
        for name in (SETTINGS, ROLE_MAP):
            _optional(folder / name)
        if slow:
            raise UserError(f"{folder} has {slow[0]}, but neither {WHOLE} nor "
                            f"{MERGES if slow == [VOCABULARY] else VOCABULARY}, without which it is no tokenizer")
        return None
    settings = _settings(folder)
    added = _added(folder, settings)
    vocabulary = _vocabulary(folder / VOCABULARY)
    ends = _end_ids(folder)
    if not whole.exists():
        _agree(_ids(added), f"{SETTINGS} or {ADDED}", vocabulary, str(folder / VOCABULARY))
        lines = read_text(folder / MERGES).split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        return _with_defaults(byte_level_bpe(
            vocabulary, merges, list(added.values()), settings, normalise=True, ends=ends, ids=_ids(added)))
    backend = _whole(whole)
    # Whoever saved it may have left these on; as in transformers, they are a caller's choice.
    backend.no_truncation()
    backend.no_padding()
    stated = backend.get_vocab()
    _agree(stated, str(whole), vocabulary, str(folder / VOCABULARY))
    backend.add_tokens([token for _, token in sorted(added.items()) if token.content not in stated])
    _agree(backend.get_vocab(), str(whole), _ids(added), f"{SETTINGS} or {ADDED}")
    return _with_defaults(Tokenizer(post_process(backend, settings), settings, ends))


def _end_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a text, as transformers' generation takes them: those of `generation_config.json`, else of
    `config.json`; empty where neither says so. Raises UserError where one is no id."""
    for path in (folder / GENERATION, folder / "config.json"):
        said = _optional(path).get("eos_token_id")
        ids = [] if said is None else said if isinstance(said, list) else [said]
        if not all(type(index) is int and index >= 0 for index in ids):
            raise UserError(f"{path}: eos_token_id is {shown(said)}; expected a token id, or a list of them")
        if ids:
            return tuple(dict.fromkeys(ids))
    return ()


def _whole(path: Path) -> Backend:
    """The tokenizer of a `tokenizer.json`, with the ids that it states. Raises UserError if it is damaged."""
    fields = read_json(path)
    with building(f"{path} is not a readable tokenizer"):
        backend = Backend.from_file(str(path))
    stated = {token["content"]: token["id"] for token in fields.get("added_tokens") or []}
    if any(backend.token_to_id(content) != index for content, index in stated.items()):
        # The library adds one token after the other, and so fills the gaps between their ids.
        vocabulary = fields["model"]["vocab"]
        if not isinstance(vocabulary, dict) or max(stated.values()) >= _MOST:
            raise UserError(f"{path}: the ids of its added_tokens do not follow on its vocabulary")
        _agree(vocabulary, f"the vocabulary of {path}", stated, "its added_tokens")
        vocabulary.update(stated)
        with building(f"{path} is not a readable tokenizer"):
            backend = Backend.from_str(json.dumps(fields))
    return backend


def _settings(folder: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` says, with the roles of `special_tokens_map.json` and the template beside it."""
    settings, roles = (_checked(folder / name) for name in (SETTINGS, ROLE_MAP))
    for role in ROLES:
        here, there = content_of(settings.get(role)), content_of(roles.get(role))
        if here is None and there is not None:
            settings[role] = roles[role]
        elif there is not None and here != there:
            raise UserError(f"{folder}: {role} is {here!r} in {SETTINGS} and {there!r} in {ROLE_MAP}")
    if "additional_special_tokens" in roles:
        settings.setdefault("additional_special_tokens", roles["additional_special_tokens"])
    if (folder / TEMPLATE).exists():
        settings["chat_template"] = read_text(folder / TEMPLATE)
    return settings


def _added(folder: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by the id that `tokenizer_config.json` and `added_tokens.json` state."""
    special = {content_of(settings.get(role)) for role in ROLES}
    special |= {content_of(token) for name in _EXTRA for token in _listed(settings.get(name))}
    found: dict[int, tuple[AddedToken, str]] = {}

    def state(index: Any, token: AddedToken, name: str) -> None:
        number = int(index) if str(index).isdecimal() else -1
        if isinstance(index, bool) or not 0 <= number < _MOST:
            raise UserError(f"{folder / name} gives {token.content!r} the id {shown(index)}; expected a whole number "
                            f"below {_MOST:,}")
        other, where = found.setdefault(number, (token, name))
        if other.content != token.content:
            raise UserError(f"{folder}: id {number} is {other.content!r} in {where} and {token.content!r} in {name}")
        twin = next((i for i, (known, _) in found.items() if known.content == token.content and i != number), None)
        if twin is not None:
            raise UserError(f"{folder}: {token.content!r} has the id {twin} in {found[twin][1]} and {number} in {name}")

    decoder = settings.get(_DECODER) or {}
    if not isinstance(decoder, dict) or not all(_text(content_of(token)) for token in decoder.values()):
        raise UserError(f"{folder / SETTINGS}: {_DECODER} is not readable; expected tokens by their id")
    for index, token in decoder.items():
        flags = {name: bool(token[name]) for name in _FLAGS if isinstance(token, dict) and name in token}
        state(index, AddedToken(content_of(token), **{"normalized": False, **flags}), SETTINGS)
    for content, index in _optional(folder / ADDED).items():
        if not _text(content):
            raise UserError(f"{folder / ADDED} holds a token that is no text")
        state(index, AddedToken(content, normalized=content not in special, special=content in special), ADDED)
    return {index: token for index, (token, _) in found.items()}


def _checked(path: Path) -> dict[str, Any]:
    """A file of settings. Raises UserError where one has not the form that `_FORMS` says."""
    fields = _optional(path)
    for name, (expected, fits) in _FORMS.items():
        if fields.get(name) is not None and not fits(fields[name]):
            raise UserError(f"{path}: {name} is {shown(fields[name])}; expected {expected}")
    return fields


def _listed(tokens: Any) -> list[Any]:
    return list(tokens.values() if isinstance(tokens, dict) else tokens or [])


def _text(content: Any) -> bool:
    """Whether it is a text that can stand in UTF-8: JSON can spell others."""
    try:
        return isinstance(content, str) and content.encode() is not None
    except UnicodeEncodeError:
        return False


def _ids(added: dict[int, AddedToken]) -> dict[str, int]:
    return {token.content: index for index, token in added.items()}


def _agree(first: dict[str, int], where: str, second: dict[str, int], other: str) -> None:
    """UserError where two statements give one token two ids, or one id two tokens."""
    for content, index in second.items():
        if first.get(content, index) != index:
            raise UserError(f"{content!r} has the id {first[content]} in {where} and {index} in {other}")
    names = {index: content for content, index in first.items()}
    for content, index in second.items():
        if names.get(index, content) != content:
            raise UserError(f"id {index} is {names[index]!r} in {where} and {content!r} in {other}")


def _vocabulary(path: Path) -> dict[str, int]:
    vocabulary = _optional(path)
    odd = next((token for token, index in vocabulary.items() if type(index) is not int or not 0 <= index < _MOST), None)
    if odd is not None:
        raise UserError(f"{path} gives {odd!r} the id {shown(vocabulary[odd])}; expected a whole number below "
                        f"{_MOST:,}")
    if not all(map(_text, vocabulary)):
        raise UserError(f"{path} holds a token that is no text")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise UserError(f"{path} gives one id to two tokens")
    return vocabulary


def _with_defaults(tokenizer: Tokenizer) -> Tokenizer:
    """Roles that no file states are those of transformers' Qwen2 tokenizer, where the token exists."""
    if tokenizer.token_id(END_OF_TEXT) is not None:
        for role in ("eos_token", "pad_token"):
            tokenizer.settings.setdefault(role, END_OF_TEXT)
    return tokenizer


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
