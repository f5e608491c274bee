"""The study on real weights: `python train/study.py --group damage --model-05b FILE --data-dir DIR --out DIR`.

Every row is one declared value (`l2a_jax/research/replication/rows.py`); this command trains and measures the rows it
is given, many in one process. Run it again with the same flags to continue: finished rows are skipped, and
`--time-limit` stops it cleanly between phases (exit status 75). Processes that share `--out` share the work: start the
same command on every GPU (CUDA_VISIBLE_DEVICES). `--report DIR` writes the report of what is there.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from typing import Annotated

from l2a_jax import commands
from l2a_jax.research.deadline import AGAIN, STOPPED, after

PATH = {"action": commands.Parsed, "parse": commands.path}


def make_parser() -> argparse.ArgumentParser:
    from l2a_jax.attention.backends import HELP

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", default=(), metavar="NAME",
                        help="rows by name, in this order, those of one compiled program side by side")
    parser.add_argument("--group", nargs="+", default=(),
                        help="main, collapse, damage, together, noise, frontier, absorption")
    for size in ("0.5b", "1.5b", "3b"):
        parser.add_argument(f"--model-{size.replace('.', '')}", dest=f"model_{size}", metavar="SOURCE",
                            help=f"the {size} model: hub id, folder or .gguf file")
    parser.add_argument("--data-dir", **PATH, help="folder with train/ (texts) and eval/ (and benchmarks)")
    parser.add_argument("--out", **PATH, help="folder for ROW.json")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop cleanly after so long")
    parser.add_argument("--limit", type=int, help="the first so many items of every benchmark")
    parser.add_argument("--keep", action="store_true", help="keep what was trained whatever its size (ROW.npz)")
    parser.add_argument("--list", action="store_true", help="say which rows there are, and which are done in --out")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, with every command, and stop")
    parser.add_argument("--report", **PATH, metavar="DIR",
                        help="write replication.md, replication.json and the figures from the rows in --out")
    parser.add_argument("--backend", default="auto", help=HELP)
    parser.add_argument("--compile-ahead", type=int, default=None, metavar="N",
                        help="threads that compile the rows to come (default: 2 on a GPU, none elsewhere)")
    parser.add_argument("--compiled", **PATH, metavar="DIR",
                        help="keep compiled programs here, so that the next process need not compile them")
    return parser


def check(flags: argparse.Namespace) -> None:
    """UserError on the first flag that is out of its range; says which ones change nothing."""
    from l2a_jax import fields
    from l2a_jax.attention import api

    for name, hint in (("time_limit", Annotated[float | None, fields.at_least(0)]),
                       ("limit", Annotated[int | None, fields.count()]),
                       ("compile_ahead", Annotated[int | None, fields.between(0, 256)])):
        fields.check_value(getattr(flags, name), hint, fields.flag(name))
    api.check(flags.backend)
    only = next((name for name in ("list", "report") if getattr(flags, name)), None)
    defaults = make_parser().parse_args([])
    commands.say_idle([name for name, value in vars(flags).items() if value != getattr(defaults, name)], [
        (only is not None, ("data_dir", "time_limit", "keep", "backend", "compile_ahead", "compiled"),
         f"--{only} runs nothing"),
        (flags.dry_run, ("time_limit", "keep", "compile_ahead", "compiled"), "--dry-run runs nothing")])


def study(arguments: list[str] | None) -> int:
    began = time.monotonic()
    flags = make_parser().parse_args(arguments)

    import jax

    from l2a_jax.research.replication import runner
    from l2a_jax.research.replication.rows import choose, with_baselines
    from l2a_jax.research.replication.session import Session

    check(flags)
    rows = [row.with_limit(flags.limit) for row in choose(tuple(flags.rows), tuple(flags.group))]
    if flags.list:
        for row in rows:
            state = "" if flags.out is None else "done  " if runner.is_done(row, flags.out) else "      "
            print(f"{state}{row.group:<11}{row.name:<40}{row.question}")
        return 0
    if flags.report is not None:
        from l2a_jax.research.replication import report

        print("written: " + ", ".join(map(str, report.write(_needed(flags.out, "--out"), flags.report))))
        return 0
    models = {size: source for size in ("0.5b", "1.5b", "3b")
              if (source := getattr(flags, f"model_{size}")) is not None}
    ahead = flags.compile_ahead
    if ahead is None:
        ahead = 2 if jax.default_backend() == "gpu" else 0
    if flags.compiled is not None:
        jax.config.update("jax_compilation_cache_dir", str(flags.compiled.absolute()))
    session = Session(models, _needed(flags.data_dir, "--data-dir"), backend=flags.backend, compile_ahead=ahead)
    rows = [row.with_limit(flags.limit) for row in with_baselines(rows)]
    if flags.dry_run:
        print(runner.dry_run(rows, session))
        return 0
    deadline = after(began, flags.time_limit)
    try:
        left, failed = runner.run_rows(rows, session, _needed(flags.out, "--out"), deadline=deadline, keep=flags.keep)
    finally:
        session.close()
    if failed:
        print(f"error: rows that failed: {', '.join(failed)}; each one's file says why", file=sys.stderr)
    if left:
        print(f"stopped at the time limit, {len(left)} rows left: {', '.join(left)}; {AGAIN}",
              file=sys.stderr)
    return 2 if failed else STOPPED if left else 0


def _needed(path: pathlib.Path | None, flag: str) -> pathlib.Path:
    from l2a_jax.errors import UserError

    if path is None:
        raise UserError(f"{flag} is needed; see --help")
    return path


def main(arguments: list[str] | None = None) -> int:
    return commands.run(study, arguments, interrupted=f"interrupted; {AGAIN}")


if __name__ == "__main__":
    sys.exit(main())
