"""The main results table of several evaluated runs: `python eval/table.py RUN... [--baseline RUN] [--out table.md]`.

RUN is a folder that holds eval.json, or such a file. --out writes the table as markdown, and its numbers as JSON.
`python eval/table.py eval/results/replication.json` prints the study's main tables from its numbers.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys

from l2a_jax import commands


def tabulate(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder with eval.json, or such a file")
    parser.add_argument("--baseline", metavar="RUN", help="compare every run with this one, pair by pair")
    parser.add_argument("--out", action=commands.Parsed, parse=commands.path,
                        help="table.md (table.json goes beside it), or a folder")
    parser.add_argument("--markdown", action="store_true", help="print markdown, for a page")
    flags = parser.parse_args(arguments)

    from l2a_jax.evaluation import table

    if len(flags.runs) == 1 and pathlib.Path(flags.runs[0]).name == "replication.json":
        from l2a_jax.research.replication import report

        print(report.main_tables(pathlib.Path(flags.runs[0])), end="")
        return
    runs = [table.load(run) for run in flags.runs]
    made = table.make_table(runs, None if flags.baseline is None else table.load(flags.baseline))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(table.markdown(made) if flags.markdown else table.plain(made, width), end="")
    if flags.out is not None:
        print("written: " + ", ".join(map(str, table.write(made, flags.out))), file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    return commands.run(tabulate, arguments)


if __name__ == "__main__":
    sys.exit(main())
