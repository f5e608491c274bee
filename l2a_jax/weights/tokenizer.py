"""One tokenizer for every source: a `tokenizers` backend and the settings that stand beside it.

`settings` holds what `tokenizer_config.json` holds (special tokens by role, chat template). Nothing here imports
transformers, so nothing imports torch.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from l2a_jax.config import END_OF_TEXT
from l2a_jax.errors import UserError

QWEN2_SPLIT = "|".join((
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
    r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with the one sign (mostly a space) before it
    r"\p{N}",  # one digit at a time
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation, with the line ends after it
    r"\s*[\r\n]+",  # line ends, with the blanks before them
    r"\s+(?!\S)",  # blanks, but for the last before a word
    r"\s+",
))
"""Where Qwen2 cuts text before byte-pair merging: a parameter of the trained vocabulary."""

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_ALPHABET = frozenset(_BYTES.alphabet())

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The names under which files state what a token is for."""


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, under the names that transformers gives them. An id is None where the source names
    no such token."""

    backend_tokenizer: Backend
    settings: dict[str, Any] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    """What the source says about the ends of texts; empty where it says nothing. Read `end_ids`."""
    saves_nfc: bool = False
    """Whether a folder gets Qwen2's Unicode normalisation, which the source (a GGUF file) cannot state."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in the text (`<|im_end|>`) become their one id.

        `add_special_tokens` only matters to a tokenizer that puts a token before or after every text; Qwen2's do not.
        """
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        encoded = self.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [one.ids for one in encoded]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        """Every token, added ones included, with its id."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: one more than the largest. A model may have more (padding) rows."""
        return max(self.get_vocab().values(), default=-1) + 1

    def token_id(self, token: str) -> int | None:
        """Id of one token by its text, None if there is no such token."""
        return self.backend_tokenizer.token_to_id(token)

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text (or, for an instruct model, a turn)."""
        return self._role("eos_token")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every id at which generated text ends: as the source's files say, else that of `eos_token_id`, and of
        `<|endoftext|>` (where llama.cpp stops too)."""
        said = self.ends or (self.eos_token_id, self.token_id(END_OF_TEXT))
        return tuple(dict.fromkeys(index for index in said if index is not None))

    @property
    def bos_token_id(self) -> int | None:
        """The token that opens a text, if the model has one."""
        return self._role("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills a batch up."""
        return self._role("pad_token")

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `load_tokenizer` and transformers read."""
        backend = Backend.from_str(self.backend_tokenizer.to_str())
        if self.saves_nfc:
            backend.normalizer = normalizers.NFC()
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n",
                                                      encoding="utf-8")

    def _role(self, name: str) -> int | None:
        text = content_of(self.settings.get(name))
        return self.token_id(text) if isinstance(text, str) else None


def byte_level_bpe(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, ...]],
    added: Sequence[AddedToken],
    settings: dict[str, Any],
    normalise: bool,
    ends: tuple[int, ...] = (),
    ids: Mapping[str, int] | None = None,
) -> Tokenizer:
    """Qwen2's byte-level BPE from its parts.

    `vocabulary` is spelled in the byte alphabet. `added` tokens are matched whole in the text, however they are
    spelled; `ids` are theirs, where the vocabulary does not say them. `normalise` applies Unicode NFC first. Raises
    UserError if the merges do not fit the vocabulary.
    """
    ids = dict(ids or {})

    def build(vocabulary: dict[str, int]) -> Backend:
        with building("the tokenizer's merges do not fit its vocabulary"):
            backend = Backend(BPE(vocab=vocabulary, merges=list(merges), fuse_unk=False))
        backend.normalizer = normalizers.NFC() if normalise else None
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"), _BYTES])
        backend.decoder = decoders.ByteLevel()
        backend.add_tokens(sorted(added, key=lambda token: ids.get(token.content, -1)))
        return backend

    backend = build(vocabulary)
    if any(backend.token_to_id(content) != index for content, index in ids.items()):
        # Added one after the other they do not come to stand where the files say: then the vocabulary says it.
        backend = build({**vocabulary, **ids})
    return Tokenizer(post_process(backend, settings), settings, ends, saves_nfc=True)


def post_process(backend: Backend, settings: Mapping[str, Any]) -> Backend:
    """Let the tokens before and after every text be those of `add_bos_token` and `add_eos_token`, where these are
    stated: as in transformers, they stand above what the backend was saved with, and a role that is not named is not
    added."""
    if "add_bos_token" not in settings and "add_eos_token" not in settings:
        return backend
    around = []
    for role in ("bos_token", "eos_token"):
        content = content_of(settings.get(role)) if settings.get(f"add_{role}") else None
        index = None if content is None else backend.token_to_id(content)
        around.append((None, None) if index is None else (content, index))
    (bos, bos_id), (eos, eos_id) = around
    if backend.encode("").ids != [index for index in (bos_id, eos_id) if index is not None]:
        template = [bos, "$A", eos]
        backend.post_processor = processors.TemplateProcessing(
            single=[part for part in template if part is not None],
            pair=[part for part in (*template, bos, "$B", eos) if part is not None],
            special_tokens=[(content, index) for content, index in dict(around).items() if content is not None],
        )
    return backend


@contextlib.contextmanager
def building(wrong: str) -> Iterator[None]:
    """Whatever `tokenizers` raises in the block becomes a UserError that begins with `wrong`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exception mostly, but what panics in its Rust is none
        told = str(error).partition("\n")[0]
        raise UserError(f"{wrong}: {told[:200]}") from error


def content_of(token: Any) -> Any:
    """The text of a token, which files hold bare or with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def spelled(token: str) -> str:
    """A token in the byte alphabet, which ordinary tokens of a byte-level vocabulary are spelled in."""
    return token if _ALPHABET.issuperset(token) else "".join(part for part, _ in _BYTES.pre_tokenize_str(token))
