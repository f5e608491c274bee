"""Measure attention beside its peers on the GPU at hand, and write the table: `python eval/speed.py [--out DIR]`."""

from __future__ import annotations

import os
import re
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory on the same card

from l2a_jax import commands, flags
from l2a_jax.research.speed.options import OtherTables, SpeedOptions


def check(options: SpeedOptions, given: list[str]) -> str | None:
    """The table that is asked for in place of attention's. UserError where the flags contradict each other or cannot
    be read; says which ones change nothing."""
    from l2a_jax import fields
    from l2a_jax.errors import UserError
    from l2a_jax.files import check_file

    fields.check(options)
    modes = [name for name in fields.declared(OtherTables) if getattr(options, name)]
    if len(modes) > 1 and modes != ["training", "large"]:
        raise UserError(f"--{modes[0]} and --{modes[1]} are tables of their own; expected one of them")
    mode = modes[-1] if modes else None
    try:
        re.compile(options.only)
    except re.error as error:
        raise UserError(f"--only is {options.only!r}; expected a regular expression ({error})") from error
    commands.say_idle(given, [
        (mode != "inference", ("model",), "it is of --inference"),
        (mode != "imbalance", ("text",), "it is of --imbalance"),
        (mode in ("drift", "profile", "compile"), ("only",), f"--{mode} has no cases to choose from"),
        (mode in ("windows", "blocks", "shares", "large", "scaling", "imbalance", "drift", "profile", "compile"),
         ("no_torch",),
         f"--{mode} leaves PyTorch out anyway"),
        (mode == "profile", ("out",), "--profile writes no file")])
    if options.out is not None and mode != "profile":
        check_file(options.out / "speed.json", "--out")
    return mode


def measure(arguments: list[str] | None) -> None:
    given = vars(flags.make_parser(__doc__, SpeedOptions).parse_args(arguments))
    options = SpeedOptions(**given)
    mode = check(options, list(given))
    out, only, with_torch = options.out, options.only, not options.no_torch
    if mode == "blocks":
        from l2a_jax.research.speed import block_sizes

        block_sizes.main(out, only)
    elif mode == "shares":
        from l2a_jax.research.speed import shares

        shares.main(out, only)
    elif mode == "compile":
        from l2a_jax.research.speed import compiled

        compiled.main(out)
    elif mode == "training":
        from l2a_jax.research.speed import training_steps

        training_steps.main(training_steps.standard_cases(), only, out, "speed_training", with_torch)
    elif mode == "large":
        from l2a_jax.research.speed import training_steps

        training_steps.main(training_steps.large_cases(), only, out, "speed_training_large", with_torch=False)
    elif mode == "scaling":
        from l2a_jax.research.speed import scaling

        scaling.main(only, out)
    elif mode == "imbalance":
        from l2a_jax.research.speed import imbalance

        imbalance.main(options.imbalance, options.text, only, out)
    elif mode == "drift":
        from l2a_jax.research.speed import drift

        drift.main(options.drift, out)
    elif mode == "profile":
        # Kernels that are launched as one graph do not say where they come from.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
        from l2a_jax.research.speed import profile, training_steps

        profile.main(training_steps.StepCase(options.profile))
    elif mode == "inference":
        from l2a_jax.research.speed import inference_steps

        inference_steps.main(out, options.model, with_torch, only)
    else:
        from l2a_jax.research.speed import attention_calls, cases

        windows = mode == "windows"
        attention_calls.main(cases.window_cases() if windows else cases.standard_cases(), only, out,
                             "speed_windows" if windows else "speed", with_torch and not windows, windows)


def main(arguments: list[str] | None = None) -> int:
    return commands.run(measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
