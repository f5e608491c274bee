"""How evenly the routed rows of trained routers lie on devices that share the tokens of a row.

A router reads the beginning of a text; its decisions are then dealt as `--mesh context=N` deals them. No device is
needed beside the one that reads.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float64

from l2a_jax import device
from l2a_jax.errors import UserError
from l2a_jax.evaluation import texts
from l2a_jax.evaluation.perplexity import score_windows, text_windows
from l2a_jax.evaluation.subject import check_routed
from l2a_jax.research import tables
from l2a_jax.sharding import stripes
from l2a_jax.sources import Pretrained, load_pretrained

log = logging.getLogger("l2a_jax.speed")
LENGTHS = (8_192, 32_768)
DEVICES = (2, 4, 8)


class Case(NamedTuple):
    """A run folder or other source, a text file, and the tokens of a row."""

    source: str
    text: str
    length: int

    @property
    def name(self) -> str:
        return f"{Path(self.source).name}, {Path(self.text).name}, {self.length}"


def decided(model: Pretrained, text: str, length: int) -> Bool[np.ndarray, "L T"]:
    """What the router decides of the first `length` tokens of a text file. UserError where there are fewer."""
    found = texts.read_text(text)
    ids, about = texts.tokenise(found, model.tokenizer, model.config.vocab_size), {"name": found.name}
    if len(ids) <= length:
        raise UserError(f"--text {text} has {len(ids)} tokens; expected more than {length}")
    windows = text_windows(ids, length, length, about, limit=1)
    last = np.arange(length) == length - 1  # the loss is not asked for: as little of it as can be
    decisions = score_windows(model, windows._replace(scored=windows.scored & last), label=f"{length} tokens").decisions
    check_routed(decisions, "--imbalance")
    return decisions[:, 0]


def of_devices(each: Float64[np.ndarray, "L T"], devices: int) -> Float64[np.ndarray, "L {devices}"]:
    """The sum of a number of each token over those that each device holds."""
    layers, length = each.shape
    return each.reshape(layers, -1, devices, stripes.stripe(length, devices)).sum(axis=(1, 3))


def measure(decisions: Bool[np.ndarray, "L T"], devices: int) -> dict:
    """The largest device's part over the mean one's: of routed rows over all layers as a step logs it
    (`sharding.attention.routed_imbalance`), the same of the keys that these rows read, and of the layer of most excess
    rows."""
    rows = of_devices(decisions.astype(float), devices)
    keys = of_devices(decisions * np.arange(1.0, decisions.shape[1] + 1), devices)
    worst = np.argmax(rows.max(1) - rows.mean(1))
    found = {name: part.max(1).sum() / part.mean(1).sum() if part.any() else 1.0
             for name, part in (("rows", rows), ("keys", keys), ("layer", rows[worst : worst + 1]))}
    return {"stripe": stripes.stripe(decisions.shape[1], devices), **found,
            "rows_per_layer": (rows.max(1) / np.maximum(rows.mean(1), 1e-9)).round(4).tolist()}


def markdown(result: dict) -> str:
    """The cases as one table."""
    rows = [[name, f"{case['routed']:.1%}", devices, found["stripe"], *(f"{found[part]:.3f}" for part in
                                                                        ("rows", "keys", "layer"))]
            for name, case in result["cases"].items() for devices, found in case["devices"].items()]
    return "\n".join([
        "# How evenly routed rows lie on devices that share a row", "",
        f"{tables.said(result)} The largest device's part over the mean one's: *rows*, over all layers, as "
        "`routed_imbalance` says it; *keys*, the same of the keys that these rows read; *layer*, of rows in the layer "
        "that loses most. A stripe: tokens that stay together.", "",
        *tables.grid(["router, text, tokens", "routed", "devices", "stripe", "rows", "keys", "layer"], rows)]
    ).rstrip() + "\n"


def main(sources: tuple[str, ...], files: tuple[str, ...], only: str, out: Path | None) -> None:
    """Measure the cases in whose name `only` is found; imbalance.json and imbalance.md after every one."""
    if not files:
        raise UserError("--imbalance needs --text FILE: what its routers read")
    result: dict = {**tables.heading(), "cases": {}}
    for source in sources:
        cases = tables.chosen([Case(source, text, length) for text in files for length in LENGTHS], only)
        model = load_pretrained(source, jnp.dtype(device.default_dtype())) if cases else None
        for case in cases:
            decisions = decided(model, case.text, case.length)
            result["cases"][case.name] = {"routed": float(decisions.mean()),
                                          "devices": {str(count): measure(decisions, count) for count in DEVICES}}
            log.info("%s", json.dumps({case.name: result["cases"][case.name]["routed"]}))
            tables.write(out, "imbalance", result, markdown(result))
    print(markdown(result), flush=True)
