"""A router for somebody's own model and texts, from Python: the same run as `train/run.py --regime router_strict`.

Nothing is trained but the router; every other parameter comes back bit for bit. What was given in memory is written
down first, so that the run can be repeated, resumed and used as a source like any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from l2a_jax import device
from l2a_jax.data.counts import parse_count
from l2a_jax.errors import UserError
from l2a_jax.fields import declared
from l2a_jax.files import check_writable, write_text
from l2a_jax.runs.train import train
from l2a_jax.sources import Pretrained, load_pretrained, save_pretrained
from l2a_jax.training.settings import Settings, resolve

REGIME = "router_strict"
OWN = ("regime", "given", "model", "data", "target_local", "penalty", "tokens")
"""Settings that `train_router` takes under other names, or fixes."""
TOLD = ("target", "held_out_loss", "held_out_sparsity", "steps", "tokens_seen", "trained_parameters")


def train_router(
    source: str | Path | Pretrained,
    texts: Iterable[str] | None = None,
    *,
    out: str | Path,
    data: Iterable[str | Path] = (),
    local: float | None = None,
    penalty: float | None = None,
    tokens: int | str | None = None,
    **settings: Any,
) -> tuple[Pretrained, dict[str, Any]]:
    """Train a router for the model `source`; the routed model in the dtype of the run, and a short report of it.

    `source`: a hub id, folder, run folder or `.gguf` file, or a `Pretrained` made of one's own parameters,
    configuration and tokenizer. `texts`: documents as strings; `data`: what `--data` takes (files, folders, globs,
    recipes); one of the two. `local`: the share of decisions to be local at the end; `penalty`: the price of routing;
    one of the two. `tokens` to train on, such as 4_000_000 or "4M". `settings`: any other setting of `train/run.py`,
    such as `window`, `seq_len`, `batch_size` or `preset=("repair-far",)`; those that are not given are the preset
    `repair`'s, with rows of 8,192 tokens.

    `out` is a new folder: the run is in `out/run` (`train/run.py --resume OUT/run` continues one that was stopped),
    what was given in memory beside it. Raises UserError on anything wrong with these, the source or the text; as the
    command does, it prints its progress and takes Ctrl-C as a request to save and stop.
    """
    _check(source, texts, data, local, penalty, settings)
    out = Path(out)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    names = given.pop("preset", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    given |= {name: value for name, value in (("target_local", local), ("penalty", penalty)) if value is not None}
    if tokens is not None:
        given["tokens"] = parse_count(tokens) if isinstance(tokens, str) else tokens
    in_memory = isinstance(source, Pretrained)
    if in_memory:
        given.setdefault("dtype", source.params["embed"]["embedding"].dtype.name)
    given |= {"model": str(out / "base") if in_memory else str(source),
              "data": (str(out / "texts.jsonl"),) if texts is not None else tuple(map(str, data))}
    asked = resolve(REGIME, given, names)
    check_writable(out, "out")
    if any(out.iterdir()):
        raise UserError(f"out is {out}, which is not empty; expected a new folder")
    if texts is not None:
        _write_texts(out / "texts.jsonl", texts)
    if in_memory:
        save_pretrained(out / "base", source.params, source.config, source.l2a_config, source.tokenizer,
                        carried=source.carried)
    summary = train(asked, out / "run")
    dtype = jnp.dtype(asked.dtype or device.default_dtype())  # in which it was trained, and its threshold met
    return load_pretrained(out / "run", dtype), {"run_dir": str(out / "run"),
                                                 **{name: summary[name] for name in TOLD if name in summary}}


def _check(source: Any, texts: Any, data: Any, local: Any, penalty: Any, settings: dict[str, Any]) -> None:
    if isinstance(source, Pretrained) and source.tokenizer is None:
        raise UserError("source has no tokenizer, so no text can be read with it; expected a Pretrained with one")
    if isinstance(texts, str) or isinstance(data, (str, Path)):
        raise UserError("texts and data are lists: texts of documents, data of files, folders, globs or recipes; got "
                        f"{texts if isinstance(texts, str) else data!r:.60}")
    if (texts is None) == (not data):
        raise UserError("expected either texts (documents) or data (what --data takes)")
    if (local is None) == (penalty is None):
        raise UserError("expected either local (a share of decisions, such as 0.9) or penalty (the price of routing)")
    unknown = [name for name in settings if name in OWN or name not in declared(Settings)]
    if unknown:
        raise UserError(f"{unknown[0]} is no setting of train_router; expected one of "
                        f"{', '.join(name for name in declared(Settings) if name not in OWN)}")


def _write_texts(path: Path, texts: Iterable[str]) -> None:
    lines = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"texts[{index}] is a {type(text).__name__}; expected a document as a string")
        lines.append(json.dumps({"text": text}))
    if not lines:
        raise UserError("texts is empty; expected at least one document")
    write_text(path, "\n".join(lines) + "\n")
