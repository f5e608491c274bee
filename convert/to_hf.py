"""Write a trained run, or any model this library reads, as Hugging Face safetensors.

    python convert/to_hf.py RUN_OR_FOLDER OUT [--dtype bfloat16]

A plain (baseline) model loads in transformers. A model with the L2A layer keeps its local attention under the plain
names and its global one under `*_global`; this library loads it back.
"""

from __future__ import annotations

import argparse
import sys

from l2a_jax import commands


def convert_model(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description="Export a run or a converted model as Hugging Face safetensors.")
    parser.add_argument("source", metavar="RUN_OR_FOLDER", help="run folder (its newest checkpoint; "
                        "RUN/checkpoints/best: its best), model folder, or .gguf file")
    parser.add_argument("out", help="folder to write; new, or empty")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    args = parser.parse_args(arguments)

    from l2a_jax.sources import convert

    print(convert(args.source, args.out, args.dtype))


def main(arguments: list[str] | None = None) -> int:
    return commands.run(convert_model, arguments, interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
