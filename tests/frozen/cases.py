"""What a rebuild must not change, computed through the commands and the public names alone.

`python -m tests.frozen.make_frozen` writes `values.json` from the tree it runs in: run it before a rebuild, never after
one, unless a change of results is what was wanted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pathlib
import platform

ROOT = pathlib.Path(__file__).resolve().parents[2]
VALUES = pathlib.Path(__file__).with_name("values.json")
REGIMES = ("router_strict", "router_only", "l2a_ft", "l2a_paper", "full_ft", "pretrain")
SHORT = ("--steps", "3", "--batch-size", "2", "--eval-batches", "1", "--eval-every", "3", "--save-every", "3")
# The embedded demo as it was when the values were taken.
FIRST_DEMO = ("--router-input", "pre", "--penalty", "0.2", "--answer-weight", "1")
RUNS = {
    **{regime: ("--regime", regime, *SHORT, *FIRST_DEMO) for regime in REGIMES},
    # The release's layer with its draws, accumulated: every key that a step folds.
    "paper": ("--regime", "l2a_ft", *SHORT, *FIRST_DEMO, "--topology", "sequential", "--no-share-attention", "--sinks",
              "0", "--leakage", "0.5", "--flip", "0.2", "--grad-accum", "2", "--penalty", "0.1", "--weight-decay",
              "0.1"),
    "post_local": ("--regime", "l2a_ft", *SHORT, *FIRST_DEMO, "--no-share-attention", "--router-input", "post_local",
                   "--leakage", "0.5", "--remat", "layer"),
}
LAYERS = {
    "shared": {}, "parallel": {"share_attention": False}, "post_local": {"router_input": "post_local"},
    "sequential": {"share_attention": False, "topology": "sequential"},
}


def machine() -> str:
    """What floating-point results may depend on: the version of JAX and the processor."""
    import jax

    cpu = platform.machine()
    if pathlib.Path("/proc/cpuinfo").exists():
        first = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        lines = dict(line.split(":", 1) for line in first.split("\n") if ":" in line)
        cpu += "".join(value for name, value in lines.items() if name.strip() in ("model name", "flags", "Features"))
    return f"jax {jax.__version__}, processor {hashlib.sha256(cpu.encode()).hexdigest()[:12]}"


def command(path: str):
    """`main` of a command, as its script holds it."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def losses(name: str, folder: pathlib.Path) -> dict:
    """Losses and routing of a short run, and what it reports at its end."""
    assert command("train/run")([*RUNS[name], "--run-dir", str(folder)]) in (0, None)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return {"loss": [record["loss"] for record in records], "grad_norm": [record["grad_norm"] for record in records],
            "sparsity": [record.get("sparsity", 0.0) for record in records], "held_out_loss": summary["held_out_loss"],
            "trained_parameters": summary["trained_parameters"], "tokens_seen": summary["tokens_seen"]}


def logits(name: str) -> dict:
    """Numbers of the logits of the tiny model with an untrained layer, decisions forced and half of them local."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import l2a_jax as l2a

    model = l2a.load_pretrained("qwen2.5-tiny", np.float32)
    layer = l2a.L2AConfig(window=5, sinks=2, **LAYERS[name])
    params = l2a.add_routing(model.params, model.config, layer)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, model.config.vocab_size, (2, 31), dtype=np.int32)
    decisions = rng.random((model.config.num_layers, *tokens.shape)) < 0.5
    segments = np.repeat([[1] * 17 + [2] * 14, [1] * 29 + [0] * 2], 1, axis=0).astype(np.int32)
    given = {"segment_ids": jnp.asarray(segments), "decisions": jnp.asarray(decisions), "backend": "xla"}
    out = jax.jit(lambda p: l2a.forward(p, jnp.asarray(tokens), model.config, layer, **given))(params)
    found = np.asarray(out.logits, np.float64)
    return {"some": found[:, [0, 7, 16, 17, 28], 3:9].ravel().tolist(), "sum": found[segments > 0].sum(),
            "router": np.asarray(out.routing.logits, np.float64)[:, 0, ::9].ravel().tolist()}


def hashes() -> dict[str, str]:
    """The training hash of every declared row of the study: what is run is known by it."""
    from l2a_jax.research.replication.rows import choose

    return {row.name: row.training_hash for row in choose((), ())}


def counts() -> dict[str, int]:
    """Trained parameters by model, layer and regime."""
    import l2a_jax as l2a

    found = {}
    for size in ("0.5b", "1.5b", "3b"):
        config = l2a.MODELS[f"qwen2.5-{size}"]
        for layer, shares in (("separate", False), ("shared", True)):
            shapes = l2a.abstract_params(config, l2a.L2AConfig(share_attention=shares))
            for regime in REGIMES[:-1]:
                found[f"{size} {layer} {regime}"] = l2a.count_parameters(shapes, l2a.regime_mask(shapes, regime))
    return found


def as_the_tests_run() -> None:
    """The compiler's settings of `tests/conftest.py`, before JAX is imported."""
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
