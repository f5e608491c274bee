"""Evaluate a model: `python eval/run.py SOURCE --tasks perplexity,needle,hellaswag,piqa,arc_challenge --text FILE`.

SOURCE is a run folder, a hub id, a folder or a .gguf file. Results are merged by task into RUN/eval.json (a run folder;
eval-VARIANT.json where flags change the model), into --out DIR/eval.json, or into runs/eval-NAME/eval.json.
A routed model's perplexity always comes with the routing audit; --tasks collapse adds a verdict on its health.
"""

from __future__ import annotations

import argparse
import sys

from l2a_jax import commands

LAYER = ("window", "sinks", "topology", "share_attention", "router_input", "rope", "temperature", "threshold")
NEEDLE = ("lengths", "depths", "seeds", "needles", "generate", "haystack")


def make_parser() -> argparse.ArgumentParser:
    """Every flag; those left out are "not given"."""
    from l2a_jax.attention.backends import HELP
    from l2a_jax.evaluation.registry import ASKED

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("source", metavar="SOURCE", help="run folder (its newest checkpoint; "
                        "RUN/checkpoints/best: its best), hub id, folder or .gguf file")
    parser.add_argument("--tasks", required=True, action=commands.Parsed, parse=_names,
                        help=f"some of {', '.join(ASKED)}")
    parser.add_argument("--out", action=commands.Parsed, parse=commands.path, help="folder for eval.json")

    text = parser.add_argument_group("text (perplexity, audit, collapse)")
    text.add_argument("--text", help="file, folder, glob, or wikitext[:test|validation] from the hub")
    text.add_argument("--context", type=int, help="tokens a window (default: 2048, or what the model can take)")
    text.add_argument("--stride", type=int, help="tokens between windows (default: the context, disjoint windows)")
    text.add_argument("--max-windows", type=int, help="the first so many windows only (default: the whole text)")
    text.add_argument("--audit-seeds", type=int, help="draws of random and shuffled routing (default: 3)")

    tasks = parser.add_argument_group("benchmarks")
    tasks.add_argument("--limit", type=int, help="the first so many items of each task")
    tasks.add_argument("--num-fewshot", type=int, help="worked examples before each question")
    tasks.add_argument("--task-data", action=commands.Parsed, parse=commands.path,
                       help="folder of local task files (default: the hub)")
    tasks.add_argument("--log-samples", action="store_true", help="write every item's log-likelihoods beside eval.json")

    needle = parser.add_argument_group("needle")
    needle.add_argument("--needle-lengths", action=commands.Parsed, parse=_integers,
                        help="context lengths in tokens, such as 512,1024,2048")
    needle.add_argument("--needle-depths", type=int, help="how many depths, from the beginning to the end")
    needle.add_argument("--needle-seeds", type=int, help="how many draws of each cell")
    needle.add_argument("--needle-needles", type=int, help="how many needles in a haystack; one is asked for")
    needle.add_argument("--needle-generate", type=int, help="continue so many prompts by real decoding, to be read")
    needle.add_argument("--haystack", dest="needle_haystack", nargs="+",
                        help="files, folders or globs of text to hide needles in")

    layer = parser.add_argument_group("layer", "put an untrained L2A layer on a plain source, or change the numbers of "
                                      "a trained one")
    layer.add_argument("--window", type=int, help="keys a local token sees, itself included")
    layer.add_argument("--sinks", type=int, help="first keys that every token sees")
    layer.add_argument("--topology", help="sequential or parallel")
    layer.add_argument("--share-attention", action=argparse.BooleanOptionalAction, help="one attention set for both")
    layer.add_argument("--router-input", help="pre or post_local")
    layer.add_argument("--rope", help="none, theta:FACTOR, linear:FACTOR or yarn:FACTOR")
    layer.add_argument("--temperature", type=float, help="of the router")
    layer.add_argument("--threshold", type=float, help="probability from which a token is routed")
    layer.add_argument("--route", help="learned (default), all, or none (every layer pruned)")
    layer.add_argument("--prune-layers", help="layers without global attention, such as 3,5-8")
    layer.add_argument("--prune-sparsity", type=float, help="prune the layers sparser than this on --calibration")
    layer.add_argument("--calibration", help="text to measure --prune-sparsity on")

    parser.add_argument("--dtype", help="float32 (exact products too) or bfloat16")
    parser.add_argument("--backend", help=HELP)
    parser.add_argument("--batch-tokens", type=int, help="tokens a batch of windows (default: 16384; on a CPU 4096)")
    parser.add_argument("--seed", type=int, help="of sampled text in the collapse report")
    return parser


def _names(text: str, flag: str) -> tuple[str, ...]:
    return tuple(name for name in text.replace(" ", "").split(",") if name)


def _integers(text: str, flag: str) -> tuple[int, ...]:
    from l2a_jax.errors import UserError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} is {text[:60]!r}; expected whole numbers with commas, such as 512,1024") from None


def evaluate(arguments: list[str] | None) -> None:
    flags = vars(make_parser().parse_args(arguments))

    from l2a_jax.evaluation import evaluate
    from l2a_jax.inference.pruning import parse_layers

    layer = {name: flags.pop(name) for name in LAYER if name in flags}
    needle = {name: flags.pop(f"needle_{name}") for name in NEEDLE if f"needle_{name}" in flags}
    if "prune_layers" in flags:
        flags["prune_layers"] = parse_layers(flags["prune_layers"])
    found, path = evaluate.evaluate(evaluate.Options(**flags, layer=layer, needle=needle))
    print(evaluate.summary(found))
    print(f"results: {path}")


def main(arguments: list[str] | None = None) -> int:
    return commands.run(evaluate, arguments, interrupted="interrupted; finished tasks are in eval.json")


if __name__ == "__main__":
    sys.exit(main())
