"""Continue a text: `python eval/generate.py RUN_OR_MODEL --prompt TEXT`. The text goes to stdout while it comes."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from l2a_jax import commands, flags


def make_parser() -> flags.Parser:
    from l2a_jax.inference.options import Continuation

    return flags.make_parser(__doc__, Continuation)


def generate(arguments: list[str] | None) -> None:
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    if len({"prompt", "prompt_file"} & given.keys()) != 1:
        parser.error("one of --prompt TEXT and --prompt-file PATH is needed")

    from l2a_jax.inference import stream
    from l2a_jax.inference.options import Continuation

    asked = dataclasses.asdict(Continuation(**given))
    stream.run(asked.pop("source"), **{**asked, "colour": asked["colour"] and sys.stdout.isatty()})


def main(arguments: list[str] | None = None) -> int:
    return commands.run(generate, arguments, interrupted="\ninterrupted", level=logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
