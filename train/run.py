"""Train a regime: `python train/run.py --regime l2a_ft`, or continue a run: `python train/run.py --resume RUN_DIR`.

Without --model and --data this runs the embedded demo: a tiny model on the synthetic recall corpus, on a CPU.
"""

from __future__ import annotations

import argparse
import sys

from l2a_jax import commands


def make_parser() -> argparse.ArgumentParser:
    """Every flag; those left out keep the preset's value, so they default to "not given"."""
    from l2a_jax.attention.backends import HELP

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--regime", help="baseline, router_strict, router_only, l2a_ft, l2a_paper, full_ft, pretrain")
    parser.add_argument("--resume", action=commands.Parsed, parse=commands.path, metavar="RUN_DIR",
                        help="continue this run, bit for bit")
    parser.add_argument("--run-dir", action=commands.Parsed, parse=commands.path,
                        help="new folder for the run (default: runs/REGIME-TIME)")
    parser.add_argument("--preset", nargs="+",
                        help="paper, repair, repair-far, 0.5b-24gb, 1.5b-24gb, 3b-24gb; flags override; of a routed "
                        "--model, either may change the layer's numbers, not its wiring")
    parser.add_argument("--model", help="hub id, folder, run folder (its newest checkpoint; RUN/checkpoints/best: its "
                        "best) or .gguf file")
    parser.add_argument("--data", nargs="+", help="wikitext, diverse, RECIPE=DIR, files, folders or globs")
    parser.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument("--tokens", action=commands.Parsed, parse=_count, help="tokens to train on, such as 12M")
    parser.add_argument("--seq-len", type=int, help="tokens a row")
    parser.add_argument("--batch-size", type=int, help="rows a micro-batch")
    parser.add_argument("--grad-accum", type=int, help="micro-batches a step")
    parser.add_argument("--packing", help="best_fit (documents never see each other) or concat")
    parser.add_argument("--attention-layers", metavar="LAYERS",
                        help="train attention in these layers alone, such as 3,5-8 (default: all)")
    parser.add_argument("--window", type=int, help="keys a local token sees, itself included")
    parser.add_argument("--sinks", type=int, help="first keys that every token sees")
    parser.add_argument("--topology", help="sequential or parallel")
    parser.add_argument("--share-attention", action=argparse.BooleanOptionalAction, help="one attention set for both")
    parser.add_argument("--router-input", help="pre or post_local")
    parser.add_argument("--rope", help="none, theta:FACTOR, linear:FACTOR or yarn:FACTOR")
    parser.add_argument("--temperature", type=float, help="of the router")
    parser.add_argument("--threshold", type=float, help="probability from which a token is routed")
    parser.add_argument("--leakage", type=float, help="share of layer calls that compute every row's global attention")
    parser.add_argument("--flip", type=float, help="share of decisions that training inverts at random (routing noise)")
    parser.add_argument("--echo", type=float, help="share of the rows trained on in which earlier text is repeated")
    parser.add_argument("--penalty", type=float, help="maximum of lambda, the weight of mean p^2")
    parser.add_argument("--penalty-warmup", type=float, help="share of the run with lambda 0")
    parser.add_argument("--penalty-ramp", type=float, help="share of the run over which lambda then rises")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--router-lr", type=float, help="the router's own (default: --lr)")
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--warmup", type=float, help="share of the run over which the learning rate rises")
    parser.add_argument("--clip", type=float, help="global norm of the gradient")
    parser.add_argument("--backend", help=HELP)
    parser.add_argument("--dtype", help="what the forward pass computes in: float32 or bfloat16")
    parser.add_argument("--master-dtype", help="of trained weights and optimizer: float32 or bfloat16")
    parser.add_argument("--remat", help="recomputed in the backward pass: layer (least memory), mlp, elementwise, none")
    parser.add_argument("--unroll", action=argparse.BooleanOptionalAction,
                        help="a program without a loop over layers: slower to compile, faster on a GPU")
    parser.add_argument("--deterministic", action="store_true",
                        help="bit for bit the same on a GPU too, resumed or not; slower")
    parser.add_argument("--save-every", type=int, help="steps")
    parser.add_argument("--eval-every", type=int, help="steps")
    parser.add_argument("--eval-batches", type=int, help="held-out batches an evaluation")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and stop")
    return parser


def _count(text: str, flag: str) -> int:
    from l2a_jax.data.counts import parse_count

    return parse_count(text, flag)


def train(arguments: list[str] | None) -> None:
    parser = make_parser()
    flags = vars(parser.parse_args(arguments))

    from l2a_jax.errors import UserError
    from l2a_jax.inference.pruning import parse_layers
    from l2a_jax.runs import folder as run_folder
    from l2a_jax.runs.train import dry_run, resume, train
    from l2a_jax.training import settings as presets

    run_dir = flags.pop("run_dir", None)
    if "resume" in flags:
        folder = flags.pop("resume")
        if flags or run_dir is not None:
            spelled = ", ".join(f"--{name.replace('_', '-')}" for name in flags) or "--run-dir"
            raise UserError(f"--resume continues a run with its own settings, so it takes no {spelled}; start a "
                            "new run to change them")
        resume(folder)
        return
    if "regime" not in flags:
        parser.error("--regime is needed (or --resume RUN_DIR)")
    regime, names = flags.pop("regime"), tuple(flags.pop("preset", ()))
    dry = flags.pop("dry_run", False)
    if "attention_layers" in flags:
        flags["attention_layers"] = parse_layers(flags["attention_layers"], "--attention-layers")
    settings = presets.resolve(regime, flags, names)
    commands.say_idle(flags, presets.idle(settings))
    if dry:
        print(dry_run(settings))
        return
    train(settings, run_dir or run_folder.default_run_dir(regime))


def main(arguments: list[str] | None = None) -> int:
    return commands.run(train, arguments)


if __name__ == "__main__":
    sys.exit(main())
