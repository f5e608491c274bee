"""Train a regime: `python train/run.py --regime l2a_ft`, or continue a run: `python train/run.py --resume RUN_DIR`.

Without --model and --data this runs the embedded demo: a tiny model on the synthetic recall corpus, on a CPU.
"""

from __future__ import annotations

import sys
import textwrap

from l2a_jax import commands, flags
from l2a_jax.fields import flag


def make_parser() -> flags.Parser:
    """Every setting as a flag; those left out keep the preset's value."""
    from l2a_jax.sharding import cluster
    from l2a_jax.training.settings import Settings

    parser = flags.make_parser(__doc__, Settings, required=False, epilog=describe())
    run = parser.add_argument_group("the run itself")
    run.add_argument("--resume", action=commands.Parsed, parse=commands.path, metavar="RUN_DIR",
                     help="continue this run, bit for bit, with its own settings (but for --mesh)")
    run.add_argument("--run-dir", action=commands.Parsed, parse=commands.path,
                     help="new folder for the run (default: runs/REGIME-TIME)")
    run.add_argument("--distributed", action=commands.Parsed, parse=cluster.parse,
                     help="one of several processes: auto, or HOST:PORT,INDEX,COUNT (where process 0 listens, this "
                          "process's number from 0, and how many there are); --mesh is over the devices of all")
    run.add_argument("--dry-run", action="store_true", help="say what would be trained, and stop")
    return parser


def describe() -> str:
    """What the names of regimes and presets stand for."""
    from l2a_jax.training.presets import PRESETS
    from l2a_jax.training.tables import REGIME_PRESET, REGIMES

    lines = ["A default holds where no preset says otherwise; without --model and --data the demo's sizes do.", "",
             "regimes, what each trains, and its preset:"]
    for name, groups in REGIMES.items():
        preset = f"({REGIME_PRESET[name]})" if name in REGIME_PRESET else "(a plain model)"
        lines.append(f"  {name:<14}{', '.join(groups) or 'nothing'} {preset}")
    lines += ["", "presets:"]
    for name, preset in PRESETS.items():
        values = ", ".join(f"{flag(key)[2:]} {f'{value:.4g}' if isinstance(value, float) else value}"
                           for key, value in preset.values.items())
        lines += [f"  {name:<14}{preset.about}", textwrap.indent(textwrap.fill(values, 100), " " * 16)]
    return "\n".join(lines)


def train(arguments: list[str] | None) -> None:
    parser = make_parser()
    given = vars(parser.parse_args(arguments))

    from l2a_jax.errors import UserError
    from l2a_jax.runs import folder as run_folder
    from l2a_jax.runs.about import dry_run
    from l2a_jax.runs.train import resume, train
    from l2a_jax.sharding import processes
    from l2a_jax.training.settings import idle, resolve

    if "distributed" in given:
        processes.join(given.pop("distributed"))
    run_dir = given.pop("run_dir", None)
    if "resume" in given:
        folder = given.pop("resume")
        mesh = given.pop("mesh", None)
        if given or run_dir is not None:
            raise UserError(f"--resume continues a run with its own settings, so it takes no "
                            f"{', '.join(map(flag, given)) or '--run-dir'}; start a new run to change them")
        resume(folder, mesh)
        return
    if "regime" not in given:
        parser.error("--regime is needed (or --resume RUN_DIR)")
    regime, names, dry = given.pop("regime"), given.pop("preset", ()), given.pop("dry_run", False)
    settings = resolve(regime, given, names)
    commands.say_idle(given, idle(settings))
    if dry:
        told = dry_run(settings)
        if processes.first():
            print(told)
        return
    train(settings, run_dir or run_folder.default_run_dir(regime))


def main(arguments: list[str] | None = None) -> int:
    return commands.run(train, arguments)


if __name__ == "__main__":
    sys.exit(main())
