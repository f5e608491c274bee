"""A run's router beside its rivals at the same density: `python eval/rivals.py RUN --text FILE --calibration FILE`.

Rivals are whole layers (ranked by learned rates, searched, alternating), searched heads, random tokens, and an oracle.
Writes rivals.json, a table and a figure into the run folder, or into --out. Of several runs one figure:
`python eval/rivals.py --compare A/rivals.json B/rivals.json --out DIR [--names "new recipe" "old recipe"]`.
"""

from __future__ import annotations

import sys

from l2a_jax import commands, flags
from l2a_jax.research.rivals.options import FrontierOptions, RivalOptions


def measure(arguments: list[str] | None) -> None:
    if "--compare" in (sys.argv[1:] if arguments is None else arguments):
        return draw(arguments)
    given = vars(flags.make_parser(__doc__, RivalOptions).parse_args(arguments))

    from l2a_jax.research.rivals import compare, report

    options = RivalOptions(**given)
    commands.say_idle(list(given), [(options.lengths is None, ("ruler_items", "haystack", "seed"),
                                     "without --lengths RULER is not asked")])
    result, folder = compare.compare(options)
    print(report.markdown(result))
    print(f"results: {folder}/{compare.NAME}.json, .md, .png")


def draw(arguments: list[str] | None) -> None:
    given = vars(flags.make_parser(__doc__, FrontierOptions).parse_args(arguments))

    from l2a_jax.research.rivals import frontier

    print(f"written: {frontier.compare(FrontierOptions(**given))}")


def main(arguments: list[str] | None = None) -> int:
    return commands.run(measure, arguments, interrupted="interrupted; the same command goes on from what is finished")


if __name__ == "__main__":
    sys.exit(main())
