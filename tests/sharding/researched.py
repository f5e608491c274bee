"""A row of the study and the rivals of a router over 2 made-up devices against one device's, in a process of its own.

`python -m tests.sharding.researched FILE` writes what it found as JSON. One process for all: it has as many devices as
it began with.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests import garbage

MESHES = (None, "data=2")
RUN = Path(__file__).parents[1] / "frozen/folders/router_only"


def study(folder: Path) -> dict[str, Any]:
    """What one trained row's file says, on one device and over a mesh."""
    from l2a_jax.research.replication.row import Measures
    from l2a_jax.research.replication.row_file import read_row
    from l2a_jax.research.replication.runner import run_rows
    from l2a_jax.research.replication.session import Session
    from l2a_jax.sources import TINY
    from tests.research.replication.conftest import make_row, write_texts

    measures = Measures(tasks=("perplexity", "residual"), text="{data}/eval/text.txt",
                        context=128, windows=3)
    row, texts, out = make_row("small", measures=measures, steps=3), write_texts(folder), {}
    for mesh in MESHES:
        place = folder / str(mesh)
        assert run_rows([row], Session({"0.5b": TINY}, texts, mesh=mesh), place) == ([], [])
        found = read_row(place / "small.json")
        results = {name: entry["result"] for name, entry in found["evaluations"].items()}
        out[str(mesh)] = {
            "hash": found["training_hash"], "mesh": found["training"].get("mesh"),
            "losses": [record["loss"] for record in found["training"]["curve"]],
            "held out": found["training"]["held_out_loss"], "nats": results["perplexity"]["window_nll"],
            "stream": results["residual"]["relative_l2"]}
    return out


def rivals(folder: Path) -> dict[str, Any]:
    """The table of a run's rivals, on one device and over a mesh."""
    from l2a_jax.data.recall import RecallCorpus
    from l2a_jax.research.rivals.compare import compare
    from l2a_jax.research.rivals.options import RivalOptions
    from l2a_jax.sources import recall_tokenizer

    texts = {}
    for name, batch in zip(("text", "calibration"), RecallCorpus(128, 3).held_out(2), strict=False):
        texts[name] = str(folder / f"{name}.txt")
        Path(texts[name]).write_text(" ".join(recall_tokenizer().decode(row.tolist()) for row in batch.tokens))
    out = {}
    for mesh in MESHES:
        result, _ = compare(RivalOptions(source=str(RUN), **texts, local=(90.0,), context=128, calibration_context=128,
                                         calibration_windows=3, out=folder / f"rivals {mesh}", mesh=mesh))
        out[str(mesh)] = {"worth": result["worth"], "layers": result["searched_layers"],
                          "heads": result["searched_heads"],
                          "rows": {f"{row['name']} {row['target']:.4f}":
                                   [row["density"], *itertools.chain(*row["sums"])] for row in result["rows"]}}
    return out


def main(file: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["L2A_CACHE"] = f"{folder}/cache"
        found = {}
        for of in (study, rivals):
            place = Path(folder) / of.__name__
            place.mkdir()
            found[of.__name__] = of(place)
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    garbage.seldom()
    main(*sys.argv[1:])
