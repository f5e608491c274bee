"""Measure attention beside its peers on the GPU at hand, and write the table: `python eval/speed.py [--out DIR]`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory on the same card

from l2a_jax import commands

MODES = ("windows", "blocks", "shares", "training", "large", "profile", "inference", "compile")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", action=commands.Parsed, parse=commands.path,
                        help="folder for the JSON and the markdown table")
    parser.add_argument("--only", default="", help="measure the cases whose name this regular expression finds")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    parser.add_argument("--windows", action="store_true", help="ratios of length to window, instead of the table")
    parser.add_argument("--blocks", action="store_true", help="every block size of every kernel, instead of the table")
    parser.add_argument("--shares", action="store_true",
                        help="how many programs share a block of keys in the backward pass, instead of the table")
    parser.add_argument("--training", action="store_true", help="whole training steps, instead of the table")
    parser.add_argument("--large", action="store_true",
                        help="steps of the larger models; cap the memory with XLA_PYTHON_CLIENT_MEM_FRACTION")
    parser.add_argument("--profile", metavar="REGIME", help="the kernels of one training step")
    parser.add_argument("--inference", action="store_true", help="prefill and decode steps, beside transformers")
    parser.add_argument("--model", help="with --inference: real weights (default: random ones of the 0.5B)")
    parser.add_argument("--compile", action="store_true",
                        help="registers, spills and shared memory of every kernel for sm_89 and sm_90, without a GPU")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """UserError where the flags contradict each other or cannot be read; says which ones change nothing."""
    from l2a_jax.errors import UserError
    from l2a_jax.files import check_file
    from l2a_jax.training.tables import check_regime

    modes = [name for name in MODES if getattr(arguments, name)]
    if len(modes) > 1 and modes != ["training", "large"]:
        raise UserError(f"--{modes[0]} and --{modes[1]} are tables of their own; expected one of them")
    mode = modes[-1] if modes else None
    try:
        re.compile(arguments.only)
    except re.error as error:
        raise UserError(f"--only is {arguments.only!r}; expected a regular expression ({error})") from error
    if arguments.profile is not None:
        check_regime(arguments.profile, "--profile")
    defaults = make_parser().parse_args([])
    commands.say_idle([name for name, value in vars(arguments).items() if value != getattr(defaults, name)], [
        (mode != "inference", ("model",), "it is of --inference"),
        (mode in ("profile", "compile"), ("only",), f"--{mode} has no cases to choose from"),
        (mode in ("windows", "blocks", "shares", "large", "profile", "compile"), ("no_torch",),
         f"--{mode} leaves PyTorch out anyway"),
        (mode == "profile", ("out",), "--profile writes no file")])
    if arguments.out is not None and mode != "profile":
        check_file(arguments.out / "speed.json", "--out")


def measure(arguments: list[str] | None) -> None:
    arguments = make_parser().parse_args(arguments)
    check(arguments)
    out, only, with_torch = arguments.out, arguments.only, not arguments.no_torch
    if arguments.blocks:
        from l2a_jax.research.speed import block_sizes

        block_sizes.main(out, only)
    elif arguments.shares:
        from l2a_jax.research.speed import shares

        shares.main(out, only)
    elif arguments.compile:
        from l2a_jax.research.speed import compiled

        compiled.main(out)
    elif arguments.training or arguments.large:
        from l2a_jax.research.speed import training_steps

        large = arguments.large
        chosen = training_steps.large_cases() if large else training_steps.standard_cases()
        training_steps.main([case for case in chosen if re.search(only, case.name)], out,
                            "speed_training_large" if large else "speed_training", with_torch and not large)
    elif arguments.profile:
        # Kernels that are launched as one graph do not say where they come from.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
        from l2a_jax.research.speed import profile, training_steps

        profile.main(training_steps.StepCase(arguments.profile))
    elif arguments.inference:
        from l2a_jax.research.speed import inference_steps

        inference_steps.main(out, arguments.model, with_torch, only)
    else:
        from l2a_jax.research.speed import attention_calls, cases

        windows = arguments.windows
        chosen = cases.window_cases() if windows else cases.standard_cases()
        attention_calls.main([case for case in chosen if re.search(only, case.name)], out,
                             "speed_windows" if windows else "speed", with_torch and not windows, windows)


def main(arguments: list[str] | None = None) -> int:
    return commands.run(measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
