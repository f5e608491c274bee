"""Write `reference_logits.npz`: what transformers computes for every tiny model (needs torch).

    python tests/weights/make_reference.py

The default tests compare with it, so they need no torch. The weights come from a formula (`tiny_qwen.weight`); only logits
are stored: float32 [2, 48, 96] for each family, kept for every fourth position.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tiny_qwen import FAMILIES, TOKENS, write_folder

KEPT = slice(3, None, 4)


def reference_logits(folder: Path) -> np.ndarray:
    """float32 logits [B, T, V] of transformers, on the CPU."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        logits = {
            name: reference_logits(write_folder(Path(root) / name, fields))[:, KEPT] for name, fields in FAMILIES.items()
        }
    path = Path(__file__).with_name("reference_logits.npz")
    np.savez_compressed(path, transformers_version=transformers.__version__, **logits)
    print(f"{path.name}: {len(logits)} models, {path.stat().st_size:,} bytes")
