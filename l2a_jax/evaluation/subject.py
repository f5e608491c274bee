"""What is evaluated: a source, the layer that flags put on it or change in it, and what is routed.

A plain source may get an untrained layer (`--window` ...), whose router routes everything. `route="none"` prunes every
layer, so only windows and sinks are read; `route="all"` sets the router to zero, which by definition routes every
token. Both hold for every task, generation included, and neither needs decisions to be passed around.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp

from l2a_jax import fields
from l2a_jax.config import MODELS, L2AConfig, ModelConfig, to_dict
from l2a_jax.errors import UserError
from l2a_jax.models.params import abstract_params, add_routing
from l2a_jax.sources import Pretrained, RunSource, locate, run_source
from l2a_jax.training.checkpoints import BEST, Checkpoints
from l2a_jax.training.regimes import count_parameters
from l2a_jax.training.run_files import read_run, read_summary
from l2a_jax.training.settings import LayerSettings, adapt_layer, make_layer, parse_rope

log = logging.getLogger("l2a_jax.eval")

INSTEAD = "give a routed one, or --window to put an untrained layer on it"
"""What a user of `eval/run.py` can do."""


def check_routed(routed: object | None, asked: str, instead: str = "expected a routed one",
                 model: str = "this") -> None:
    """UserError, beginning with what `asked`, where a model is plain: `routed`, its layer or its decisions, is None."""
    if routed is None:
        raise UserError(f"{asked}: {model} is a plain model, which routes nothing; {instead}")


def layer_of(config: ModelConfig, own: L2AConfig | None, given: dict[str, Any], route: str,
             prune: tuple[int, ...], source: str) -> tuple[ModelConfig, L2AConfig | None]:
    """The configurations to evaluate with. UserError where the flags contradict the source or each other."""
    fields.check_given(given, LayerSettings)
    run = run_source(locate(source)) if own is not None and route == "learned" else None
    if run is not None and read_run(run.folder).settings.forced is not None:
        log.warning("%s was trained under forced decisions, which its router did not make; it is scored under its "
                    "router's (the study scores under those of training)", source)
    if own is None and set(given) <= {"rope"}:
        if route != "learned" or prune:
            raise UserError(f"{source} is a plain model, which has nothing to route or prune; give --window (and "
                            "--sinks, --topology) to put an untrained layer on it")
        return (dataclasses.replace(config, rope=parse_rope(given["rope"])) if given else config), None
    if own is None:
        layer = make_layer({"share_attention": given.get("topology") != "sequential", **given})
        if route == "learned":
            log.info("the layer on %s is untrained: its router routes every token (--route none: no token)", source)
    else:
        layer = adapt_layer(own, given, source)
    beyond = [index for index in prune if not 0 <= index < config.num_layers]
    if beyond:
        raise UserError(f"--prune-layers names {beyond[0]}; {source} has layers 0 to {config.num_layers - 1}")
    pruned = range(config.num_layers) if route == "none" else {*layer.pruned_layers, *prune}
    if route == "all":
        layer = dataclasses.replace(layer, threshold=0.5)  # where a zero router routes everything
    return config, dataclasses.replace(layer, pruned_layers=tuple(pruned))


def with_layer(model: Pretrained, config: ModelConfig, layer: L2AConfig | None, route: str) -> Pretrained:
    """The loaded model as `layer_of` decided."""
    params = model.params
    if layer is not None and model.l2a_config is None:
        params = add_routing(params, config, layer)
    if route == "all" and layer is not None:
        router = jax.tree.map(jnp.zeros_like, params["layers"]["router"])
        params = {**params, "layers": {**params["layers"], "router": router}}
    return model._replace(config=config, l2a_config=layer, params=params)


def describe(model: Pretrained, source: str, route: str, own: L2AConfig | None) -> dict[str, Any]:
    """The head of `eval.json`: which model this is, and of a run, what was trained."""
    size = next((name for name, known in MODELS.items() if (known.hidden_size, known.num_layers) ==
                 (model.config.hidden_size, model.config.num_layers)), None)
    head = {"source": source, "source_hash": model.source_hash, "size": size,
            "model_config": to_dict(model.config),
            "l2a_config": None if model.l2a_config is None else to_dict(model.l2a_config), "route": route,
            "parameters": count_parameters(abstract_params(model.config, model.l2a_config)),
            "regime": "baseline" if model.l2a_config is None else "untrained layer" if own is None else "routed",
            "run": None}
    run = run_source(locate(source))
    if run is not None:
        head |= {"regime": read_run(run.folder).settings.regime, "run": run_facts(run)}
    return head


def run_facts(run: RunSource) -> dict[str, Any]:
    """What a run's own files say of its training; numbers that are not there (an unfinished run) are None.

    The summary is about the run's end: of another checkpoint than the newest, only its step and loss are known.
    """
    names = ("trained_parameters", "tokens_seen", "tokens_per_trained_parameter", "steps", "loss_last_5_percent",
             "held_out_perplexity")
    settings, summary = read_run(run.folder).settings, read_summary(run.folder)
    facts = {name: summary.get(name) for name in names}
    if run.label:
        saved = Checkpoints(run.folder).metadata(run.kind, run.step) or {"step": None}
        loss = saved.get("best") if run.kind == BEST else None
        facts = {**dict.fromkeys(names), "trained_parameters": facts["trained_parameters"], "steps": saved["step"],
                 "held_out_perplexity": None if loss is None else math.exp(loss), "checkpoint": run.label}
    told = {"data": list(settings.data) or "synthetic recall corpus", "seed": settings.seed, "model": settings.model}
    rest = {name: value for name, value in vars(settings).items() if name not in (*told, "regime", "preset", "given")}
    return {**told, "preset": list(settings.preset), "settings": rest, **facts}
