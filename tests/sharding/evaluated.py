"""Evaluation and generation over 4 made-up devices against one device's, in a process of its own.

`python -m tests.sharding.evaluated FILE` writes what it found as JSON. One process for all: it has as many devices as
it began with.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests import garbage

DEVICES = 4
MESHES = ("data=4", "data=2,context=2")


def apart(found, wanted) -> float:
    """The largest difference, as a share of the largest number."""
    import numpy as np

    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))


def tiny(layer):
    from l2a_jax.sources import Pretrained
    from tests.models.cases import CONFIG, LAYERS, make_params

    return Pretrained(CONFIG, LAYERS[layer], make_params(LAYERS[layer]), None, "tiny")


def windows(mesh) -> dict[str, Any]:
    """Five windows of odd length, the last one short; then three of which few places are scored, decisions forced."""
    import jax
    import numpy as np

    from l2a_jax.evaluation.perplexity import score_windows, text_windows
    from l2a_jax.nn import routing

    rng, model = np.random.default_rng(0), tiny("shared")
    ids = rng.integers(0, model.config.vocab_size, 4 * 23 + 9).astype(np.int32)
    asked = text_windows(ids, 23, 23, {"name": "random"})
    one, other = (score_windows(model, asked, batch_tokens=48, mesh=over) for over in (None, mesh))
    few = text_windows(ids, 33, 33, {"name": "random"}, limit=3)
    few = few._replace(scored=few.scored & (rng.random(few.scored.shape) < 0.15))
    forced = np.asarray(routing.random(jax.random.key(3), np.full(model.config.num_layers, 0.5), 3, 33))
    least, same = (score_windows(model, few, forced, batch_tokens=66, mesh=over) for over in (None, mesh))
    return {"nll": apart(other.token_nll, one.token_nll), "entropy": apart(other.entropy, one.entropy),
            "picked": apart(same.token_nll, least.token_nll), "local": float(1 - one.decisions.mean()),
            "same": all(map(np.array_equal, (other.decisions, other.correct, same.correct, same.decisions),
                            (one.decisions, one.correct, least.correct, least.decisions)))}


def requests(mesh) -> dict[str, Any]:
    """Packed rows of requests, several to an input."""
    import numpy as np

    from l2a_jax.evaluation.loglikelihood import Request, log_likelihoods

    rng, model = np.random.default_rng(1), tiny("shared")
    texts = [rng.integers(0, model.config.vocab_size, length).tolist() for length in rng.integers(4, 90, 24)]
    asked = [Request(text[:cut], text[cut:]) for text in texts for cut in (len(text) - 1, len(text) // 2)]
    one, other = (log_likelihoods(model, asked, batch_tokens=256, mesh=over) for over in (None, mesh))
    return {"log-probabilities": apart(other.log_probabilities, one.log_probabilities),
            "same": bool((one.greedy == other.greedy).all())}


def texts(mesh) -> dict[str, Any]:
    """Three prompts, of which a stop token ends some; their last tokens are routed whatever is decided."""
    import numpy as np

    from l2a_jax.inference.generate import generate

    model, rng = tiny("shared"), np.random.default_rng(2)
    asked = [rng.integers(0, model.config.vocab_size, length).tolist() for length in (21, 5, 13)]
    forced = rng.random((model.config.num_layers, 3, 21)) < 0.5
    one, other = (generate(model.params, model.config, model.l2a_config, asked, max_new_tokens=7, decisions=forced,
                           route_last=4, stop_tokens=range(0, 61, 3), mesh=over) for over in (None, mesh))
    return {"log-probabilities": apart(other.log_probabilities, one.log_probabilities),
            "lengths": one.lengths.tolist(),
            "same": all(bool((getattr(one, name) == getattr(other, name)).all())
                        for name in ("tokens", "lengths", "stopped", "decisions", "finite"))}


def benchmark(mesh) -> dict[str, Any]:
    """Seven prompts in a batch of few rows, which they come to and leave."""
    from l2a_jax.evaluation.continuations import continuations
    from tests.evaluation.test_continuations import made, prompts

    asked = prompts(7, most=20, longest=200)
    one, other = (continuations(made(), asked, batch_tokens=256, mesh=over) for over in (None, mesh))
    return {"same": one.texts == other.texts and one.counts.tolist() == other.counts.tolist()}


def command(mesh: str | None, folder: Path) -> dict[str, Any]:
    """`eval.json` of the embedded model under an untrained layer."""
    from l2a_jax.evaluation.evaluate import evaluate
    from l2a_jax.evaluation.options import Options

    options = Options("qwen2.5-tiny", ("perplexity", "needle"), out=folder / (mesh or "one"), mesh=mesh,
                      max_windows=3, context=32, audit_seeds=1, layer={"window": 12, "sinks": 2}, route="none",
                      needle={"lengths": (64,), "depths": 2, "seeds": 2, "generate": 3})
    return evaluate(options)[0]["tasks"]


def commands() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        one, other = (command(mesh, Path(folder)) for mesh in (None, MESHES[1]))
    return {"nll": apart(other["perplexity"]["window_nll"], one["perplexity"]["window_nll"]),
            "same": [entry["needle"]["generated"] for entry in (one, other)],
            "ranks": [[row["rank"] for row in entry["needle"]["prompts"]] for entry in (one, other)],
            "mesh": other["perplexity"]["provenance"]["settings"]["mesh"]}


CASES = {MESHES[0]: (windows, texts), MESHES[1]: (windows, requests, texts, benchmark)}


def main(file: str) -> None:
    from l2a_jax.sharding import mesh as meshes
    from l2a_jax.sharding.axes import parse

    found = {axes: {of.__name__: of(meshes.make(parse(axes))) for of in cases} for axes, cases in CASES.items()}
    Path(file).write_text(json.dumps(found | {"command": commands()}))


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    garbage.seldom()
    main(*sys.argv[1:])
