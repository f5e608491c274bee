"""Read a model from anywhere and write it as a folder that loads again.

    python convert/from_hf.py SOURCE OUT [--dtype bfloat16]

SOURCE is a hub id, a Hugging Face folder, or a .gguf file. OUT is a Hugging Face folder too.
"""

from __future__ import annotations

import argparse
import sys

from l2a_jax import commands


def convert_model(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description="Convert a Qwen2.5 model into a folder that loads again.")
    parser.add_argument("source", help="hub id, Hugging Face folder, or .gguf file")
    parser.add_argument("out", help="folder to write; new, or empty")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    args = parser.parse_args(arguments)

    from l2a_jax.sources import convert

    print(convert(args.source, args.out, args.dtype))


def main(arguments: list[str] | None = None) -> int:
    return commands.run(convert_model, arguments, interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
