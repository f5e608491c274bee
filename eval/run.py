"""Evaluate a model: `python eval/run.py SOURCE --tasks perplexity,needle,hellaswag,piqa,arc_challenge --text FILE`.

SOURCE is a run folder, a hub id, a folder or a .gguf file. Results are merged by task into RUN/eval.json (a run folder;
eval-VARIANT.json where flags change the model), into --out DIR/eval.json, or into runs/eval-NAME/eval.json.
A routed model's perplexity always comes with the routing audit; --tasks collapse adds a verdict on its health.
Flags of the layer put an untrained one on a plain source, or change the numbers of a trained one.
"""

from __future__ import annotations

import sys

from l2a_jax import commands, flags
from l2a_jax.fields import declared


def make_parser() -> flags.Parser:
    """Every flag; those left out are "not given"."""
    from l2a_jax.evaluation.options import NeedleFlags, Options
    from l2a_jax.training.settings import LayerSettings

    return flags.make_parser(__doc__, Options, NeedleFlags, LayerSettings)


def evaluate(arguments: list[str] | None) -> None:
    given = vars(make_parser().parse_args(arguments))

    from l2a_jax.evaluation import evaluate
    from l2a_jax.evaluation.options import NeedleFlags, Options
    from l2a_jax.training.settings import LayerSettings

    layer = {name: given.pop(name) for name in declared(LayerSettings) if name in given}
    needle = {name.removeprefix("needle_"): given.pop(name) for name in declared(NeedleFlags) if name in given}
    found, path = evaluate.evaluate(Options(**given, layer=layer, needle=needle))
    print(evaluate.summary(found))
    print(f"results: {path}")


def main(arguments: list[str] | None = None) -> int:
    return commands.run(evaluate, arguments, interrupted="interrupted; finished tasks are in eval.json")


if __name__ == "__main__":
    sys.exit(main())
