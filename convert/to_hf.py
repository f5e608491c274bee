"""Write a trained run, or any model this library reads, as Hugging Face safetensors.

    python convert/to_hf.py RUN_OR_FOLDER OUT [--dtype bfloat16]

A plain (baseline) model loads in transformers. A model with the L2A layer keeps its local attention under the plain
names and its global one under `*_global`; this library loads it back.
"""

from __future__ import annotations

import argparse
import sys

from l2a_jax.errors import UserError
from l2a_jax.weights import convert


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Export a run or a converted model as Hugging Face safetensors.")
    parser.add_argument("source", metavar="RUN_OR_FOLDER", help="run folder, model folder, or .gguf file")
    parser.add_argument("out", help="folder to write; new, or empty")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    args = parser.parse_args(argv)
    try:
        print(convert(args.source, args.out, args.dtype))
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
