"""What `eval/rivals.py` does: a run's router beside its rivals at equal densities, as one table and one figure.

    options -> windows, prompts (all that can be wrong) -> model -> rows, or what is left of them -> result
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from l2a_jax import device, fields
from l2a_jax.attention import api as attention
from l2a_jax.errors import UserError
from l2a_jax.evaluation.perplexity import BATCH_TOKENS
from l2a_jax.evaluation.subject import check_routed
from l2a_jax.files import check_file, check_writable, write_json, write_text
from l2a_jax.provenance import provenance
from l2a_jax.research.rivals import report
from l2a_jax.research.rivals.options import RivalOptions
from l2a_jax.research.rivals.prepare import Prepared, prepare
from l2a_jax.research.rivals.rows import rows_of
from l2a_jax.research.rivals.unfinished import Unfinished, unfinished
from l2a_jax.sharding import whole
from l2a_jax.sharding.mesh import axes_of, named
from l2a_jax.sources import Pretrained, load_pretrained, locate, read_config, run_source

NAME = "rivals"


def compare(options: RivalOptions) -> tuple[dict[str, Any], Path]:
    """The table in JSON types, and the folder that holds it. Raises UserError on bad input before weights are read."""
    fields.check(options)
    attention.check(options.backend)
    mesh = _mesh(options)
    config, layer = read_config(options.source)
    check_routed(layer, "rivals", "they stand beside a router", options.source)
    folder = _folder(options)
    with unfinished(folder) as kept:
        prepared = prepare(options, config, layer)
        result = _result(options, prepared, mesh, kept)
        write_json(folder / f"{NAME}.json", result)
        write_text(folder / f"{NAME}.md", report.markdown(result))
        report.draw(result, folder / f"{NAME}.png")
        kept.end()
    return result, folder


def _result(options: RivalOptions, prepared: Prepared, mesh: Mesh | None, kept: Unfinished) -> dict[str, Any]:
    dtype = options.dtype or device.default_dtype()
    model = load_pretrained(options.source, jnp.dtype(dtype))
    model = model._replace(params=whole.put(model.params, mesh))
    passes = {"backend": options.backend, "batch_tokens": device.batch_tokens(BATCH_TOKENS), "mesh": mesh}
    made = provenance()
    kept.ask(_question(options, model, prepared, {**passes, "mesh": axes_of(mesh), "dtype": dtype}, made))
    with jax.default_matmul_precision("float32" if dtype == "float32" and device.platform() != "cpu" else None):
        rows, about = rows_of(options, model, prepared, passes, kept)
    layer = model.l2a_config
    return {"source": options.source, "source_hash": model.source_hash, "context": options.context,
            "window": layer.window, "sinks": layer.sinks, "text": prepared.text.about,
            "calibration": prepared.calibration.about, "ruler_items": options.ruler_items,
            "lengths": list(options.lengths or ()), "answers": "choice" if options.lengths else None, **about,
            "rows": rows, **provenance()}


def _question(options: RivalOptions, model: Pretrained, prepared: Prepared, passes: dict[str, Any],
              made: dict[str, Any]) -> dict[str, Any]:
    """Everything that a number of the rows hangs on."""
    digest = hashlib.sha256()
    for (task, length), items in prepared.prompts.items():
        for item in items:
            digest.update(f"{task} {length} {item.answers} ".encode() + np.ascontiguousarray(item.tokens).tobytes())
    return {"source_hash": model.source_hash, "context": options.context, "text": prepared.text.about["hash"],
            "calibration_context": options.calibration_context, "calibration": prepared.calibration.about["hash"],
            "local": sorted(options.local), "lengths": list(options.lengths or ()),
            "prompts": digest.hexdigest()[:16] if prepared.prompts else None, "times": options.times, **passes,
            "device": made["device"], "revision": made["revision"],
            **{f"version of {name}": version for name, version in made["versions"].items()}}


def _mesh(options: RivalOptions) -> Mesh | None:
    """The devices over which the work is dealt; None: one device."""
    if options.mesh is not None and options.times:
        raise UserError(f"--times measures one device, and --mesh is {options.mesh}; leave out one of them")
    return named(options.mesh)


def _folder(options: RivalOptions) -> Path:
    run = run_source(locate(options.source))
    if options.out is None and run is None:
        raise UserError(f"{options.source} is no run folder: say with --out where the table goes")
    folder = options.out or run.folder
    for end in ("json", "md", "png", "unfinished.json"):
        check_file(folder / f"{NAME}.{end}", "--out")
    check_writable(folder, "--out")
    return folder


