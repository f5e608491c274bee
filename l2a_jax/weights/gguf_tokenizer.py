"""The tokenizer of a GGUF file, from the file's own fields."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken

from l2a_jax.config import END_OF_TEXT
from l2a_jax.errors import UserError, shown
from l2a_jax.weights.gguf_file import GGUFFile
from l2a_jax.weights.tokenizer import Tokenizer, byte_level_bpe, spelled

PRE_TOKENIZERS = ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez")
"""Names under which llama.cpp knows Qwen2's splitting rule; files older than the field carry none."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_MATCHED = (_UNKNOWN, _CONTROL, _USER_DEFINED)
_TYPES = range(7)


def gguf_tokenizer(file: GGUFFile) -> Tokenizer | None:
    """The file's byte-level BPE; None if it has none.

    A token's type says what it is, as in llama.cpp: control, user-defined and unknown tokens are matched whole in the
    text, whatever they are spelled in; all others are reached by merges alone. The file states no Unicode
    normalisation, so none is applied (as in llama.cpp and transformers); a folder written from it has Qwen2's own,
    NFC, which transformers applies to every folder of a Qwen2 model. The two differ only on text that is not in NFC.
    Raises UserError on another kind of tokenizer.
    """
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in file.fields.items()}
    if "tokens" not in fields:
        return None
    if fields.get("model") != "gpt2" or fields.get("pre", PRE_TOKENIZERS[0]) not in PRE_TOKENIZERS:
        raise UserError(f"{file.path} has a tokenizer of model {fields.get('model')!r} with pre-tokenizer "
                        f"{fields.get('pre')!r}; expected 'gpt2' with one of {', '.join(PRE_TOKENIZERS)}")
    tokens, types, merges = fields["tokens"], fields.get("token_type"), fields.get("merges")
    whole = _texts(tokens) and _texts(merges)
    if whole and types is None:
        types = [_NORMAL] * len(tokens)
    if not whole or not isinstance(types, list) or len(types) != len(tokens):
        raise UserError(f"{file.path} needs a list of tokens, one of their types and one of merges; it holds no such "
                        "lists, or they do not fit: corrupt")
    odd = next((index for index, kind in enumerate(types) if kind not in _TYPES), None)
    if odd is not None:
        raise UserError(f"{file.path}: token {odd} is of type {shown(types[odd])}; expected 0 to {_TYPES[-1]}")
    ids = _ids(tokens, types, file)
    texts = list(ids)

    def role(name: str) -> int | None:
        index = fields.get(name)
        if index is not None and (type(index) is not int or not 0 <= index < len(tokens)):
            raise UserError(f"{file.path}: {name} is {shown(index)}, of {len(tokens)} tokens")
        return index

    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos_token", "bos_token_id"), ("eos_token", "eos_token_id"), ("pad_token", "padding_token_id"),
                      ("unk_token", "unknown_token_id")):
        if role(key) is not None:
            settings[name] = texts[role(key)]
    for name in ("bos", "eos"):
        asked = fields.get(f"add_{name}_token", False)
        if asked and role(f"{name}_token_id") is None:
            raise UserError(f"{file.path}: add_{name}_token is true, but there is no {name}_token_id")
        if name == "bos" or asked:
            settings[f"add_{name}_token"] = bool(asked)
    templates = {key.removeprefix("tokenizer.chat_template").lstrip(".") or "default": value
                 for key, value in file.fields.items() if key.startswith("tokenizer.chat_template") and
                 isinstance(value, str)}
    if templates:
        named = [{"name": name, "template": template} for name, template in templates.items()]
        settings["chat_template"] = templates["default"] if list(templates) == ["default"] else named
    turns = [role(name) for name in ("eot_token_id", "eom_token_id") if role(name) is not None]
    ends = [role("eos_token_id"), *turns, ids.get(END_OF_TEXT)] if turns else []
    return byte_level_bpe(
        vocabulary=ids,
        merges=[tuple(merge.split(" ")) for merge in merges],
        added=[AddedToken(text, normalized=False, special=kind != _USER_DEFINED)
               for text, kind in zip(ids, types, strict=True) if kind in _MATCHED],
        settings=settings,
        normalise=False,
        ends=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )


def _ids(tokens: list[str], types: list[int], file: GGUFFile) -> dict[str, int]:
    """The id of each token by its text: as it stands where it is matched in text, else in the byte alphabet. Raises
    UserError where two are the same."""
    found: dict[str, int] = {}
    matched = {token for token, kind in zip(tokens, types, strict=True) if kind in _MATCHED}
    taken = set(tokens)
    for index, token in enumerate(tokens):
        text = token or f"[EMPTY_{index}]"
        if text not in matched and spelled(text) not in taken:
            text = spelled(text)
        if found.setdefault(text, index) != index:
            raise UserError(f"{file.path}: token {shown(token)} stands twice, with the ids {found[text]} and {index}")
    return found


def _texts(array: object) -> bool:
    return isinstance(array, list) and all(isinstance(text, str) for text in array)
