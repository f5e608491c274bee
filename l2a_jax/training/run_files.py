"""What a run folder says of its run: the one reader of its `config.json` and `summary.json`, with their schema.

`metrics.jsonl` is read by `training.metrics.read_metrics`, checkpoints by `training.checkpoint.Checkpoints`. Folders of
older versions stay readable: a setting that did not exist yet has its default.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from l2a_jax import fields
from l2a_jax.config import L2AConfig, ModelConfig, l2a_config_from_dict, model_config_from_dict
from l2a_jax.errors import UserError, shown
from l2a_jax.files import from_plain, read_json
from l2a_jax.shapes import nullable, number, require
from l2a_jax.training.settings import Settings
from l2a_jax.training.tables import PLAIN_REGIMES

LATER = {"unroll", "flip", "echo", "ask", "answer_weight", "unique", "attention_layers", "given", "cost", "objective",
         "distill_share", "saliency_share", "explore", "explore_by", "router_sees", "router_hidden",
         "target_local", "target_tokens", "forced", "curriculum", "mesh"}
"""Settings that came after the first run folders: their defaults are what those runs did."""
CALIBRATED = "calibrated_threshold"
CONFIG = {
    "settings": dict, "model_source": nullable(str), "source_hash": str, "model_config": dict, "l2a_config?": dict,
    "data?": dict, "data_fingerprint?": str, "data_source?": [str], "dtype?": str, "device?": str, "steps?": int,
    "control?": int, f"{CALIBRATED}?": number,
}
SUMMARY = {f"{name}?": number for name in (
    "trained_parameters", "tokens_seen", "tokens_per_trained_parameter", "steps", "loss_last_5_percent",
    "held_out_loss", "held_out_perplexity")}


class RunConfig(NamedTuple):
    """A run as its `config.json` records it. `missing`: the settings that it does not name, which have their defaults;
    what other keys it lacks is None. `control`: the edition of a target's. `l2a_config` is the layer of the trained
    model, `trained_layer` that of its training and of every checkpoint before the last: a run with a target moves the
    threshold at its end."""

    path: Path
    settings: Settings
    missing: tuple[str, ...]
    source: str | None
    source_hash: str
    model_config: ModelConfig
    l2a_config: L2AConfig | None
    trained_layer: L2AConfig | None
    data: dict[str, Any]
    data_fingerprint: str | None
    data_source: tuple[str, ...] | None
    dtype: str | None
    device: str | None
    steps: int | None
    control: int | None

    def whole(self) -> RunConfig:
        """This, where it says all that repeating the run needs, within the ranges of today. UserError where not."""
        fields.check(self.settings, spell=_speller(self.path))
        lacking = [f"settings.{name}" for name in self.missing if name not in LATER]
        lacking += ["data_fingerprint"] if self.data_fingerprint is None else []
        if lacking:
            raise UserError(f"{self.path} does not say {', '.join(lacking)}, which the run needs to be repeated")
        return self


def _speller(path: Path) -> Callable[[str], str]:
    return lambda name: f"{path}: settings.{name}"


def describes_run(config: dict[str, Any]) -> bool:
    """Whether the object in a `config.json` is a run's, and not a model's."""
    return "model_source" in config or "settings" in config


def read_run(run_dir: Path) -> RunConfig:
    """The run that `run_dir/config.json` records. UserError names the file, the key, and what was expected."""
    path = run_dir / "config.json"
    found = read_json(path)
    if not describes_run(found):
        raise UserError(f"{path} is not that of a training run: it has no settings; expected the folder of a run")
    require(found, CONFIG, str(path))
    settings, missing = _settings(found["settings"], path)
    for key, kind in (("model_config", ModelConfig), ("l2a_config", L2AConfig)):
        _check_types(found.get(key) or {}, kind, f"{path}: {key}")
    try:
        model = model_config_from_dict(found["model_config"])
        layer = trained = l2a_config_from_dict(found.get("l2a_config"))
        if layer is not None and CALIBRATED in found:
            layer = dataclasses.replace(layer, threshold=found[CALIBRATED])
    except ValueError as error:
        raise UserError(f"{path} does not describe a model: {error}") from error
    if (layer is None) != (settings.regime in PLAIN_REGIMES):
        raise UserError(f"{path}: l2a_config is {'missing' if layer is None else 'given'}, but settings.regime is "
                        f"{settings.regime!r}, which {'trains an' if layer is None else 'has no'} L2A layer")
    entries = found.get("data_source")
    return RunConfig(path, settings, missing, found["model_source"], found["source_hash"], model, layer,
                     trained,
                     found.get("data") or {}, found.get("data_fingerprint"),
                     None if entries is None else tuple(entries), found.get("dtype"), found.get("device"),
                     found.get("steps"), found.get("control"))


def _settings(found: dict[str, Any], path: Path) -> tuple[Settings, tuple[str, ...]]:
    known = fields.declared(Settings)
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise UserError(f"{path}: settings.{unknown[0]} is not a setting of this version; expected those of "
                        "train/run.py")
    if "regime" not in found:
        raise UserError(f"{path} has no settings.regime; expected the config.json that training wrote")
    if isinstance(found.get("remat"), bool):  # the first runs knew only these two
        found = {**found, "remat": "layer" if found["remat"] else "none"}
    # Types, and what reading a model turns on; ranges may be narrower now than when the run was trained.
    _check_types(found, Settings, f"{path}: settings")
    settings = Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})
    fields.check(settings, spell=_speller(path), names=("regime", "master_dtype"))
    return settings, tuple(name for name in known if name not in found)


def _check_types(values: dict[str, Any], kind: type, where: str) -> None:
    """UserError on the first value that cannot be that of the dataclass's field of its name."""
    for name, hint in typing.get_type_hints(kind).items():
        value = values.get(name)
        if name not in values:
            continue
        inner = [one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)]
        if inner and isinstance(value, dict):
            _check_types(value, inner[0], f"{where}.{name}")
            continue
        optional = value is None and type(None) in typing.get_args(hint)
        wrong = fields.problem(tuple(value) if isinstance(value, list) else value, hint)
        if wrong is not None and not optional:
            raise UserError(f"{where}.{name} is {shown(value)}; expected {'an object' if inner else wrong}")


def read_summary(run_dir: Path) -> dict[str, Any]:
    """What `summary.json` says; empty where there is none (an unfinished run). UserError where it is damaged."""
    path = run_dir / "summary.json"
    if not path.exists():
        return {}
    found = read_json(path)
    require(found, SUMMARY, str(path))
    return from_plain(found)
