"""Write the stored reference values: what transformers computes for the tiny models (needs torch).

    python tests/weights/make_reference.py

The default tests compare with it, so they need no torch. The weights come from a formula (`tiny_qwen.weight`); only
logits are stored: float32 [2, 48, 96] for each family, kept for every fourth position. `reference_tokens.json` holds
what transformers' Qwen2Tokenizer makes of the texts in `tiny_tokens.py` with the toy vocabulary of `tiny_gguf.py`.
"""

from __future__ import annotations

import json
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import torch
import transformers
from tiny_gguf import ADDED, MERGES, SPECIAL, vocabulary
from tiny_qwen import FAMILIES, TOKENS, write_folder
from tiny_tokens import TEXTS

KEPT = slice(3, None, 4)


def reference_logits(folder: Path) -> np.ndarray:
    """float32 logits [B, T, V] of transformers, on the CPU."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def reference_tokens() -> list[list[int]]:
    """Token ids of every text, as given and in NFD."""
    tokens, _ = vocabulary()
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[tuple(merge.split(" ")) for merge in MERGES]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens(ADDED)
    return [tokenizer(unicodedata.normalize(form, text))["input_ids"] for form in ("NFC", "NFD") for text in TEXTS]


if __name__ == "__main__":
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as root:
        logits = {
            name: reference_logits(write_folder(Path(root) / name, fields))[:, KEPT]
            for name, fields in FAMILIES.items()
        }
    np.savez_compressed(here / "reference_logits.npz", transformers_version=transformers.__version__, **logits)
    (here / "reference_tokens.json").write_text(json.dumps(reference_tokens()) + "\n")
    print(f"{len(logits)} models, {len(TEXTS)} texts, transformers {transformers.__version__}")
