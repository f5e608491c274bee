"""What is said of a run before it begins: what it trains and reads, and what a step needs."""

from __future__ import annotations

import logging

import jax

from l2a_jax import device
from l2a_jax.data.batch import decode_row
from l2a_jax.data.counts import format_count
from l2a_jax.data.curriculum import Curriculum
from l2a_jax.data.tokenise import cache_folder
from l2a_jax.models.params import abstract_params
from l2a_jax.runs.plan import RunPlan, compile_run, estimate, make_plan
from l2a_jax.sharding import mesh as meshes
from l2a_jax.sharding import processes
from l2a_jax.sharding.axes import parse
from l2a_jax.training import memory
from l2a_jax.training.presets import PRESETS
from l2a_jax.training.regimes import count_parameters, regime_mask
from l2a_jax.training.settings import Settings, unread_of_presets
from l2a_jax.training.tables import MIXED, NEXT_TOKEN, SALIENCY

log = logging.getLogger("l2a_jax")


def announce(plan: RunPlan) -> None:
    if plan.is_demo:
        log.info("embedded demo: a tiny model and the synthetic recall corpus; for a real Qwen2.5 give --model (a hub "
                 "id, folder or .gguf) and --data")
    for line in _about(plan):
        log.info("%s", line)


def _about(plan: RunPlan) -> list[str]:
    """What is trained, in words: regime, layer, steps."""
    s, layer = plan.settings, plan.l2a_config
    abstract = abstract_params(plan.config, layer)
    total = count_parameters(abstract)
    trained = count_parameters(abstract, regime_mask(abstract, s.regime), s.attention_layers)
    tokens = plan.data.tokens_read(plan.steps * s.grad_accum)
    lines = [f"regime: {s.regime} trains {trained:,} of {total:,} parameters of {plan.source or 'a fresh model'}, in "
             f"{plan.dtype.name} on {device.kind()}"]
    if plan.axes is not None:
        lines.append(f"mesh: {plan.axes}; weights, gradients and optimizer are dealt over all {plan.axes.devices} "
                     "devices")
    if layer is not None:
        sets = "one attention set" if layer.share_attention else "two attention sets"
        lines.append(f"layer: {layer.topology}, {sets}, window {layer.window}, sinks {layer.sinks}, rope "
                     f"{s.rope or 'that of the model'}, temperature {layer.temperature:g}, threshold "
                     f"{layer.threshold:g}, leakage {layer.leakage:g}"
                     + (f", router sees {', '.join(layer.router_sees)}" if layer.router_sees else "")
                     + (f", router of {layer.router_hidden} hidden units" if layer.router_hidden else "")
                     + (f", explore {layer.explore:g} {layer.explore_by}" if layer.explore else ""))
    named = [name for name in s.preset if unread_of_presets(s.regime) & {*PRESETS[name].values}]
    if named:
        lines.append(f"layer: none, as --regime {s.regime} runs a plain model; what --preset {' '.join(named)} says of "
                     "a layer, its router and their training is not read")
    if s.forced is not None:
        lines.append(f"decisions: forced, {', '.join(f'{share:g}' for share in s.forced)} of the tokens routed"
                     + (" in every layer" if len(s.forced) == 1 else ", layer by layer"))
    if s.objective != NEXT_TOKEN:
        shares = {MIXED: f", {s.distill_share:g} of it the divergence",
                  SALIENCY: f", worth taken with {s.saliency_share:g} of decisions routed"}
        lines.append(f"objective: {s.objective}{shares.get(s.objective, '')}")
    each = f", {tokens / trained:.3g} for each trained parameter" if trained else ""
    shape = f"{s.grad_accum} x {s.batch_size} x {s.seq_len}"
    if isinstance(plan.data, Curriculum):
        shape = ", then ".join(f"{stage.accumulate} x {stage.data.batch_size} x {stage.seq_len} up to step {stage.end}"
                               for stage in plan.data.stages)
    return [*lines, f"steps: {plan.steps} of {shape} tokens, {tokens:,} in all{each}; seed {s.seed}"]


def _about_data(plan: RunPlan) -> list[str]:
    """What there is to read, and how much of it this run would."""
    source = plan.data.base if isinstance(plan.data, Curriculum) else plan.data
    data = source.describe()
    if not hasattr(source, "usage"):
        return [f"data: {data['name']}, made as it is read"]
    used = source.usage(plan.steps * plan.settings.grad_accum)["domains"]
    return [f"data: {name}, {entry['documents']:,} documents of {format_count(entry['tokens'])} tokens in "
            f"{entry['rows']:,} rows ({entry['packing_efficiency']:.0%} full), {entry['held_out_documents']:,} more "
            f"held out; this run reads {format_count(used[name]['tokens'])}, {used[name]['epochs']:.2f} epochs"
            for name, entry in data["domains"].items()]


def _about_memory(plan: RunPlan, made_up: bool) -> list[str]:
    """What a step needs. UserError where that is more than a device has, unless devices are `made_up`."""
    if plan.axes is None:
        return [f"memory: {compile_run(plan).memory_bytes / 1e9:.2f} GB for a step"]
    held, lines, on_each = estimate(plan), [], f"on each of {plan.axes.devices} devices"
    if plan.axes.devices <= jax.device_count():
        compiled = compile_run(plan, refuse=not made_up)
        lines = [f"memory: {compiled.memory_bytes / 1e9:.2f} GB for a step {on_each}"]
    else:
        memory.refuse(held.total, str(held))
    return [*lines, f"by shapes alone, an estimate on the high side: {held.total / 1e9:.2f} GB {on_each}: {held}"]


def dry_run(settings: Settings) -> str:
    """What a run would train, in a dozen lines: regime, layer, steps, data, memory, and how one packed row begins.

    Makes no run folder. Data that is read for the first time is tokenised, and kept for the training to come. A mesh
    need not be there: of CPUs it is made up, and of other devices estimated.
    """
    alone = processes.count() == 1
    made_up = alone and settings.mesh is not None and meshes.make_up(parse(settings.mesh))
    plan = make_plan(settings, present=False)
    lines = [*_about(plan), *_about_data(plan), *_about_memory(plan, made_up)]
    kept = "" if plan.is_demo else f"; the tokens of the data are kept in {cache_folder()}"
    lines += [f"written: no run folder{kept}", "first row:",
              decode_row(plan.data.batch(0), 0, plan.tokenizer, documents=2)]
    return "\n".join(lines)
