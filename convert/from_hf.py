"""Read a model from anywhere and write it as a folder that loads again.

    python convert/from_hf.py SOURCE OUT [--dtype bfloat16]

SOURCE is a hub id, a Hugging Face folder, or a .gguf file. OUT is a Hugging Face folder too.
"""

from __future__ import annotations

import argparse
import sys

from l2a_jax.errors import UserError
from l2a_jax.weights import convert


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Convert a Qwen2.5 model into a folder that loads again.")
    parser.add_argument("source", help="hub id, Hugging Face folder, or .gguf file")
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
