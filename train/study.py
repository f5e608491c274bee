"""The study on real weights: `python train/study.py --group damage --model-05b FILE --data-dir DIR --out DIR`.

Every row is one declared value (`l2a_jax/research/replication/rows.py`); this command trains and measures the rows it
is given, many in one process. Run it again with the same flags to continue: finished rows are skipped, and
`--time-limit` stops it cleanly between phases (exit status 75). Processes that share `--out` share the work: start the
same command on every GPU (CUDA_VISIBLE_DEVICES). `--report DIR` writes the report of what is there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from l2a_jax import commands, flags
from l2a_jax.research.deadline import AGAIN, STOPPED, after
from l2a_jax.research.replication.options import StudyOptions


def check(options: StudyOptions, given: list[str]) -> None:
    """UserError on the first flag that is out of its range; says which ones change nothing."""
    from l2a_jax import fields
    from l2a_jax.attention import api

    fields.check(options)
    api.check(options.backend)
    only = next((name for name in ("list", "report") if getattr(options, name)), None)
    commands.say_idle(given, [
        (only is not None, ("data_dir", "time_limit", "keep", "backend", "mesh", "compile_ahead", "compiled"),
         f"--{only} runs nothing"),
        (options.dry_run, ("time_limit", "keep", "compile_ahead", "compiled"), "--dry-run runs nothing")])


def study(arguments: list[str] | None) -> int:
    began = time.monotonic()
    given = vars(flags.make_parser(__doc__, StudyOptions).parse_args(arguments))
    options = StudyOptions(**given)

    import jax

    from l2a_jax import device
    from l2a_jax.research.replication import runner
    from l2a_jax.research.replication.rows import choose, with_baselines
    from l2a_jax.research.replication.session import Session

    check(options, list(given))
    rows = [row.with_limit(options.limit) for row in choose(options.rows, options.group)]
    if options.list:
        for row in rows:
            state = "" if options.out is None else "done  " if runner.is_done(row, options.out) else "      "
            print(f"{state}{row.group:<11}{row.name:<40}{row.question}")
        return 0
    if options.report is not None:
        from l2a_jax.research.replication import report

        print("written: " + ", ".join(map(str, report.write(_needed(options.out, "--out"), options.report))))
        return 0
    models = {size: source for size, source in (
        ("0.5b", options.model_05b), ("1.5b", options.model_15b), ("3b", options.model_3b)) if source is not None}
    ahead = options.compile_ahead
    if ahead is None:
        ahead = 2 if device.platform() == "gpu" else 0
    if options.compiled is not None:
        jax.config.update("jax_compilation_cache_dir", str(options.compiled.absolute()))
    session = Session(models, _needed(options.data_dir, "--data-dir"), backend=options.backend, mesh=options.mesh,
                      compile_ahead=ahead)
    rows = [row.with_limit(options.limit) for row in with_baselines(rows)]
    if options.dry_run:
        print(runner.dry_run(rows, session))
        return 0
    deadline = after(began, options.time_limit)
    try:
        left, failed = runner.run_rows(rows, session, _needed(options.out, "--out"), deadline=deadline,
                                       keep=options.keep)
    finally:
        session.close()
    if failed:
        print(f"error: rows that failed: {', '.join(failed)}; each one's file says why", file=sys.stderr)
    if left:
        print(f"stopped at the time limit, {len(left)} rows left: {', '.join(left)}; {AGAIN}",
              file=sys.stderr)
    return 2 if failed else STOPPED if left else 0


def _needed(path: Path | None, flag: str) -> Path:
    from l2a_jax.errors import UserError

    if path is None:
        raise UserError(f"{flag} is needed; see --help")
    return path


def main(arguments: list[str] | None = None) -> int:
    return commands.run(study, arguments, interrupted=f"interrupted; {AGAIN}")


if __name__ == "__main__":
    sys.exit(main())
