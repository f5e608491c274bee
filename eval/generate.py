"""Continue a text: `python eval/generate.py RUN_OR_MODEL --prompt TEXT`. The text goes to stdout while it comes."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from l2a_jax import commands


def make_parser() -> argparse.ArgumentParser:
    from l2a_jax.attention.backends import HELP

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("source", metavar="RUN_OR_MODEL", help="hub id, folder, run folder (its newest checkpoint; "
                        "RUN/checkpoints/best: its best) or .gguf file")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="the text to continue")
    text.add_argument("--prompt-file", action=commands.Parsed, parse=commands.path, help="a UTF-8 file with it")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--window", type=int, help="on a plain model: an untrained router (all routed), this window")
    parser.add_argument("--sinks", type=int, help="the same, with this many first keys always seen")
    parser.add_argument("--prune-layers", metavar="LAYERS", help="layers without global attention, such as 3,5-8")
    parser.add_argument("--colour", action="store_true",
                        help="on a terminal: the more layers routed a token, the warmer; plain text elsewhere")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default: float32 on a CPU, else bfloat16)")
    parser.add_argument("--backend", default="auto", help=HELP)
    return parser


def generate(arguments: list[str] | None) -> None:
    flags = make_parser().parse_args(arguments)

    from l2a_jax.inference import stream

    stream.run(flags.source, prompt=flags.prompt, prompt_file=flags.prompt_file, window=flags.window,
               sinks=flags.sinks, prune_layers=flags.prune_layers, colour=flags.colour and sys.stdout.isatty(),
               dtype=flags.dtype, seed=flags.seed, max_new_tokens=flags.max_new_tokens,
               temperature=flags.temperature, top_p=flags.top_p, backend=flags.backend)


def main(arguments: list[str] | None = None) -> int:
    return commands.run(generate, arguments, interrupted="\ninterrupted", level=logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
