"""Routing absorption: `python train/absorption.py --experiment NAME... [--preset tiny|gpu|paper]`.

NAME is all, or one or more of soft_gate, hard_topk, distill, stochastic, swap, closed_loop, mechanism, sign, sweep; or
`--experiment l2a_audit RUN [OTHER_RUN]` for a trained L2A model. Without --data the synthetic recall corpus is used.
Run it again with the same flags to continue; `--time-limit` stops it cleanly (exit status 75) with all work saved.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from l2a_jax import commands, flags
from l2a_jax.research.absorption.definitions import FLAGS, PRESETS, SuiteConfig
from l2a_jax.research.absorption.options import AbsorptionOptions, PresetFlags
from l2a_jax.research.deadline import AGAIN, STOPPED, after


def read(arguments: list[str] | None) -> tuple[AbsorptionOptions, list[str]]:
    """What was asked, and the names of the flags that were given."""
    parser = flags.make_parser(__doc__, AbsorptionOptions, PresetFlags)
    given = vars(parser.parse_args(arguments))
    if not given.get("experiment") and not given.get("benchmark"):
        parser.error("--experiment or --benchmark is needed")
    numbers = {name: value for name, value in given.items() if name in FLAGS}
    rest = {name: value for name, value in given.items() if name not in FLAGS}
    return AbsorptionOptions(**rest, numbers=numbers), list(given)


def resolve(options: AbsorptionOptions) -> SuiteConfig:
    """The preset with the flags in place; UserError where one is out of its range, or they do not fit."""
    from l2a_jax import fields
    from l2a_jax.attention import api
    from l2a_jax.errors import Unsupported
    from l2a_jax.research.absorption import definitions
    from l2a_jax.training import memory

    fields.check(options)
    preset = definitions.changed(PRESETS[options.preset], options.numbers, tied=not options.untied)
    model, recipe = preset.model, preset.recipe
    if _audits(options):
        definitions.check_ranges(preset)
    else:
        definitions.check(preset)
        memory.check_batch(recipe.batch_size, recipe.seq_len, 4 * model.width,
                           eval_batches=0 if options.data else preset.eval_batches)
    if options.attention == "cudnn":
        api.check("cudnn", "--attention")
        reason = api.why_not("cudnn", api.Call("full", recipe.batch_size, recipe.seq_len, model.heads, model.heads,
                                               model.head_width, recipe.dtype))
        if reason is not None:
            raise Unsupported(f"--attention cudnn: {reason}")
    return preset


def idle(options: AbsorptionOptions) -> list[tuple[bool, tuple[str, ...], str]]:
    """Where a flag changes nothing, as rules for `commands.say_idle`."""
    return [
        (not options.data, ("tokenizer", "held_out", "cache_dir"), "it is of --data, and there is none"),
        (_audits(options), ("preset", "time_limit", "train_only", "dry_run", "attention", "untied", *(
            name for name in FLAGS if name not in ("eval_batches", "seeds", "seq_len", "batch_size"))),
         "l2a_audit trains nothing"),
        (options.dry_run, ("time_limit", "train_only"), "--dry-run runs nothing"),
        (options.benchmark, ("experiment", "data", "time_limit", "train_only", "dry_run", "eval_batches", "save_every",
                             "seeds"),
         "--benchmark measures speed alone"),
    ]


def _audits(options: AbsorptionOptions) -> bool:
    return options.experiment[:1] == ("l2a_audit",) and not options.benchmark


def absorption(arguments: list[str] | None) -> int:
    began = time.monotonic()
    options, given = read(arguments)
    if options.preset == "tiny" and "jax" not in sys.modules:  # most of a tiny suite's time is compilation
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

    import jax

    from l2a_jax import device
    from l2a_jax.files import check_file
    from l2a_jax.research.absorption import outcome, suite
    from l2a_jax.research.absorption.lab import Lab
    from l2a_jax.research.deadline import OutOfTime

    preset = resolve(options)
    run_dir = options.run_dir or Path("runs") / f"absorption-{options.preset}"
    out = options.out or run_dir / "results"
    commands.say_idle(given, idle(options))
    if _audits(options):
        from l2a_jax.research.absorption import l2a_audit

        numbers = {name: options.numbers.get(name) for name in ("eval_batches", "seeds", "seq_len", "batch_size")}
        l2a_audit.run(options.experiment[1:], options.data, out, **numbers)
        return 0
    on_gpu = device.platform() == "gpu"
    if on_gpu:  # a continued suite compiles nothing twice
        jax.config.update("jax_compilation_cache_dir", str((run_dir / "compiled").absolute()))
    backend = {"auto": "cudnn" if on_gpu and preset.recipe.dtype == "bfloat16" else None,
               "xla": None, "cudnn": "cudnn"}[options.attention]
    if options.benchmark:
        from l2a_jax.research.absorption import benchmark

        benchmark.run(preset, backend, out)
        return 0
    names = suite.check_names(options.experiment)
    for name in names:
        outcome.check_place(name, out)
    check_file(run_dir / "evaluations.json", "--run-dir")
    corpus = suite.make_corpus(preset, options.data, options.tokenizer, options.held_out, options.cache_dir)
    lab = Lab(preset, corpus, run_dir, after(began, options.time_limit), backend)
    if options.dry_run:
        print(suite.dry_run(names, lab))
        return 0
    try:
        if options.train_only:
            lab.train_unclaimed(suite.arms_of(names, lab))
        else:
            suite.run(names, lab, options.preset, out)
    except OutOfTime as stopped:
        print(f"stopped at the time limit: {stopped}; {AGAIN}", file=sys.stderr)
        return STOPPED
    return 0


def main(arguments: list[str] | None = None) -> int:
    return commands.run(absorption, arguments, interrupted=f"interrupted; {AGAIN}")


if __name__ == "__main__":
    sys.exit(main())
