"""One tokenizer for every source: a `tokenizers` backend and the settings that stand beside it.

`settings` holds what `tokenizer_config.json` holds (special tokens by role, chat template). Nothing here imports
transformers, so nothing imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from l2a_jax.errors import UserError
from l2a_jax.weights.ends import END_OF_TEXT, folder_end_ids

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


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, under the names that transformers gives them. An id is None where the source names
    no such token."""

    backend_tokenizer: Backend
    settings: dict[str, Any] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    """What the source says about the ends of texts; empty where it says nothing. Read `end_ids`."""

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
        self.backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n",
                                                      encoding="utf-8")

    def _role(self, name: str) -> int | None:
        token = self.settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        return None if text is None else self.token_id(text)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder: `tokenizer.json`, or `vocab.json` with `merges.txt`; None if neither.

    Raises UserError if a file is damaged.
    """
    ends = folder_end_ids(folder)
    settings = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    template = folder / "chat_template.jinja"
    if template.exists():
        settings = {**settings, "chat_template": template.read_text(encoding="utf-8")}
    if (folder / "tokenizer.json").exists():
        try:
            backend = Backend.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(f"{folder / 'tokenizer.json'} is not a readable tokenizer: {error}") from error
        # Whoever saved it may have left these on; as in transformers, they are a caller's choice.
        backend.no_truncation()
        backend.no_padding()
        return Tokenizer(backend, settings, ends)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        vocabulary = _json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        extra = settings.get("added_tokens_decoder", {}).values()
        return byte_level_bpe(
            vocabulary=vocabulary,
            merges=merges,
            special=[token["content"] for token in extra if token.get("special")],
            added=[token["content"] for token in extra if not token.get("special")],
            settings=settings,
            normalise=True,
            ends=ends,
        )
    return None


def byte_level_bpe(
    vocabulary: Sequence[str] | dict[str, int],
    merges: Sequence[tuple[str, ...]],
    special: Sequence[str],
    added: Sequence[str],
    settings: dict[str, Any],
    normalise: bool,
    ends: tuple[int, ...] = (),
) -> Tokenizer:
    """Qwen2's byte-level BPE from its parts.

    `vocabulary` is spelled in the byte alphabet (a token that is not gets respelled); `special` and `added` tokens are
    matched whole in the text. A token marked special that is not in the byte alphabet is a mislabelled ordinary one
    and is skipped, as in transformers. `normalise` applies Unicode NFC first.
    Raises UserError if the merges do not fit the vocabulary.
    """
    spelling = _byte_alphabet()
    alphabet = set(spelling.values())

    def spelled(token: str) -> str:
        return token if set(token) <= alphabet else "".join(spelling[byte] for byte in token.encode("utf-8"))

    if not isinstance(vocabulary, dict):
        vocabulary = {spelled(token): index for index, token in enumerate(vocabulary)}
    try:
        backend = Backend(BPE(vocab=vocabulary, merges=list(merges), fuse_unk=False))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"the tokenizer's merges do not fit its vocabulary: {error}") from error
    backend.normalizer = normalizers.NFC() if normalise else None
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special if set(t) <= alphabet])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in added
                        if normalise or t in vocabulary])
    tokenizer = Tokenizer(backend, settings, ends)
    if settings.get("add_bos_token") and tokenizer.bos_token_id is not None:
        bos = settings["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer


def _byte_alphabet() -> dict[int, str]:
    """The visible character that stands for each byte in a byte-level vocabulary (GPT-2's convention)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {**{byte: chr(byte) for byte in visible}, **{byte: chr(256 + i) for i, byte in enumerate(hidden)}}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; expected an object")
    return value
