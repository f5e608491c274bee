"""Which tokens end a text: said in one place for generation, evaluation and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l2a_jax.errors import UserError
from l2a_jax.files import read_json

GENERATION = "generation_config.json"
END_OF_TEXT = "<|endoftext|>"


def folder_end_ids(folder: Path) -> tuple[int, ...]:
    """The ids that a Hugging Face folder says end a text, as transformers' generation takes them: those of
    `generation_config.json`, else of `config.json`; empty where neither says so.

    Raises UserError if a file is damaged, or its `eos_token_id` is no id and no list of ids.
    """
    for name in (GENERATION, "config.json"):
        if (folder / name).exists():
            ids = _ids(read_json(folder / name).get("eos_token_id"), f"{folder / name}: eos_token_id")
            if ids:
                return ids
    return ()


def _ids(value: Any, where: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
        raise UserError(f"{where} is {str(value)[:60]}; expected a token id, or a list of them")
    return tuple(dict.fromkeys(ids))
