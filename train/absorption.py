"""Routing absorption: `python train/absorption.py --experiment NAME... [--preset tiny|gpu|paper]`.

NAME is all, or one or more of soft_gate, hard_topk, distill, stochastic, swap, closed_loop, mechanism; or
`--experiment l2a_audit RUN [OTHER_RUN]` for a trained L2A model. Without --data the synthetic recall corpus is used.
Run it again with the same flags to continue; `--time-limit` stops it cleanly (exit status 75) with all work saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
import time
from typing import Annotated

from l2a_jax import commands
from l2a_jax.research.deadline import AGAIN, STOPPED, after

PATH = {"action": commands.Parsed, "parse": commands.path}


def make_parser() -> argparse.ArgumentParser:
    """Every flag; those left out keep the preset's value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--experiment", nargs="+", default=None, metavar="NAME", help="see above")
    parser.add_argument("--benchmark", action="store_true", help="steps per second: one seed, and three side by side")
    parser.add_argument("--preset", default="tiny", help="tiny (two CPU cores, minutes), gpu, paper")
    parser.add_argument("--data", nargs="+", default=(), help="wikitext, diverse, RECIPE=DIR, files, folders or globs")
    parser.add_argument("--tokenizer", help="folder (tokenizer.json, or vocab.json and merges.txt), file or hub name")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of the documents held out")
    parser.add_argument("--cache-dir", **PATH, help="where token stores live")
    parser.add_argument("--run-dir", **PATH, help="trained arms, scores (default: runs/absorption-PRESET)")
    parser.add_argument("--out", **PATH, help="reports (default: RUN_DIR/results)")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop cleanly after so long")
    parser.add_argument("--train-only", action="store_true", help="train the arms that no other process is training, "
                        "and stop: one for each GPU, with one --run-dir; then the same command without it")
    parser.add_argument("--attention", choices=("auto", "xla", "cudnn"), default="auto", help="of dense arms")
    for flag, kind, words in (
            ("steps", int, "of every arm"), ("batch-size", int, "rows a step"), ("seq-len", int, "tokens a row"),
            ("lr", float, "peak learning rate"), ("warmup", int, "steps"), ("weight-decay", float, ""),
            ("distill-steps", int, ""), ("distill-lr", float, ""), ("dtype", str, "float32 or bfloat16"),
            ("dropout", float, ""), ("top-k", int, "keys kept"), ("eval-batches", int, "held-out batches, at most"),
            ("together", int, "arms trained side by side"), ("save-every", int, "steps")):
        parser.add_argument(f"--{flag}", type=kind, help=words)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--untied", action="store_true", help="a head of its own instead of the embedding")
    return parser


def resolve(flags: argparse.Namespace):
    """The preset with the flags in place; UserError where one is out of its range, or they do not fit."""
    from l2a_jax import fields
    from l2a_jax.attention import api
    from l2a_jax.errors import Unsupported
    from l2a_jax.research.absorption import definitions, suite
    from l2a_jax.training import memory

    preset = suite.check_preset(flags.preset)
    recipe = {"steps": flags.steps, "batch_size": flags.batch_size, "seq_len": flags.seq_len,
              "learning_rate": flags.lr, "warmup": flags.warmup, "weight_decay": flags.weight_decay,
              "distill_steps": flags.distill_steps, "distill_learning_rate": flags.distill_lr, "dtype": flags.dtype}
    top = {"top_k": flags.top_k, "eval_batches": flags.eval_batches, "together": flags.together,
           "save_every": flags.save_every, "seeds": None if flags.seeds is None else tuple(flags.seeds)}
    model = dataclasses.replace(preset.model, tied=not flags.untied, **_given({"dropout": flags.dropout}))
    preset = dataclasses.replace(preset, model=model, recipe=dataclasses.replace(preset.recipe, **_given(recipe)),
                                 **_given(top))
    if preset.top_k not in preset.top_ks:
        preset = dataclasses.replace(preset, top_ks=tuple(sorted({*preset.top_ks, preset.top_k})))
    fields.check_value(flags.held_out, Annotated[float, fields.Range(0, 1, low_included=False, high_included=False)],
                       "--held-out")
    fields.check_value(flags.time_limit, Annotated[float | None, fields.at_least(0)], "--time-limit")
    if _audits(flags):
        definitions.check_ranges(preset)
    else:
        definitions.check(preset)
        memory.check_batch(preset.recipe.batch_size, preset.recipe.seq_len, 4 * preset.model.width,
                           eval_batches=0 if flags.data else preset.eval_batches)
    if flags.attention == "cudnn":
        model, recipe = preset.model, preset.recipe
        api.check("cudnn", "--attention")
        reason = api.why_not("cudnn", api.Call("full", recipe.batch_size, recipe.seq_len, model.heads, model.heads,
                                               model.head_width, recipe.dtype))
        if reason is not None:
            raise Unsupported(f"--attention cudnn: {reason}")
    return preset


def idle(flags: argparse.Namespace) -> list[tuple[bool, tuple[str, ...], str]]:
    """Where a flag changes nothing, as rules for `commands.say_idle`."""
    return [
        (not flags.data, ("tokenizer", "held_out", "cache_dir"), "it is of --data, and there is none"),
        (_audits(flags), ("preset", "time_limit", "train_only", "attention", "steps", "lr", "warmup", "weight_decay",
                          "distill_steps", "distill_lr", "dtype", "dropout", "top_k", "together", "save_every",
                          "untied"), "l2a_audit trains nothing"),
        (flags.benchmark, ("experiment", "data", "time_limit", "train_only", "eval_batches", "save_every", "seeds"),
         "--benchmark measures speed alone"),
    ]


def _audits(flags: argparse.Namespace) -> bool:
    return bool(flags.experiment) and flags.experiment[0] == "l2a_audit" and not flags.benchmark


def _given(values: dict) -> dict:
    return {name: value for name, value in values.items() if value is not None}


def absorption(arguments: list[str] | None) -> int:
    began = time.monotonic()
    parser = make_parser()
    flags = parser.parse_args(arguments)
    if flags.preset == "tiny" and "jax" not in sys.modules:  # most of a tiny suite's time is compilation
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

    import jax

    from l2a_jax.files import check_file
    from l2a_jax.research.absorption import outcome, suite
    from l2a_jax.research.absorption.lab import Lab
    from l2a_jax.research.deadline import OutOfTime

    if flags.experiment is None and not flags.benchmark:
        parser.error("--experiment or --benchmark is needed")
    run_dir = flags.run_dir or pathlib.Path("runs") / f"absorption-{flags.preset}"
    out = flags.out or run_dir / "results"
    preset = resolve(flags)
    defaults = parser.parse_args([])
    commands.say_idle([name for name, value in vars(flags).items() if value != getattr(defaults, name)], idle(flags))
    if _audits(flags):
        from l2a_jax.research.absorption import l2a_audit

        l2a_audit.run(flags.experiment[1:], flags.data, out, flags.eval_batches, flags.seeds, flags.seq_len,
                      flags.batch_size)
        return 0
    if jax.default_backend() == "gpu":  # a continued suite compiles nothing twice
        jax.config.update("jax_compilation_cache_dir", str((run_dir / "compiled").absolute()))
    backend = {"auto": "cudnn" if jax.default_backend() == "gpu" and preset.recipe.dtype == "bfloat16" else None,
               "xla": None, "cudnn": "cudnn"}[flags.attention]
    if flags.benchmark:
        from l2a_jax.research.absorption import benchmark

        benchmark.run(preset, backend, out)
        return 0
    names = suite.check_names(flags.experiment)
    for name in names:
        outcome.check_place(name, out)
    check_file(run_dir / "evaluations.json", "--run-dir")
    corpus = suite.make_corpus(preset, flags.data, flags.tokenizer, flags.held_out, flags.cache_dir)
    deadline = after(began, flags.time_limit)
    lab = Lab(preset, corpus, run_dir, deadline, backend)
    try:
        if flags.train_only:
            lab.train_unclaimed(suite.arms_of(names, lab))
        else:
            suite.run(names, lab, flags.preset, out)
    except OutOfTime as stopped:
        print(f"stopped at the time limit: {stopped}; {AGAIN}", file=sys.stderr)
        return STOPPED
    return 0


def main(arguments: list[str] | None = None) -> int:
    return commands.run(absorption, arguments, interrupted=f"interrupted; {AGAIN}")


if __name__ == "__main__":
    sys.exit(main())
