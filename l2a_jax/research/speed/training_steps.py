"""Speed and memory of whole training steps, regime by regime, beside the matrix-product ceiling: JSON and a table.

A step is the one that `train/run.py` runs (`training.step`), on random weights and tokens: neither changes its speed.
What does is the share of routed tokens, so each regime with a router is measured as it starts (everything routed) and
at one token in five. Operations are the model's own, not those that rematerialisation repeats.
"""

from __future__ import annotations

import functools
import json
import logging
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from l2a_jax.config import MODELS, ModelConfig
from l2a_jax.data.batch import Batch
from l2a_jax.models.params import abstract_params, init_params
from l2a_jax.research import tables
from l2a_jax.research.speed import training_peer
from l2a_jax.research.speed.timing import matmul_ceiling, median_ms
from l2a_jax.sharding import leaves
from l2a_jax.sharding.axes import Axes
from l2a_jax.sharding.mesh import STACKED, make
from l2a_jax.training.memory import checkpoint_policy, step_bytes
from l2a_jax.training.optimizer import Dials, OptimizerConfig, make_optimizer
from l2a_jax.training.regimes import regime_mask
from l2a_jax.training.settings import layer_of, resolve
from l2a_jax.training.step import Objective, initial_state, split_params, train_step
from l2a_jax.training.tables import FIRST_PRESET, PLAIN_REGIMES

log = logging.getLogger("l2a_jax.speed")


@dataclass(frozen=True)
class StepCase:
    """One training step. `routed`: share of routed tokens at the start (1.0: as a real run starts; the router learns
    while it is measured)."""

    regime: str
    model: str = "qwen2.5-0.5b"
    batch: int = 4
    length: int = 2_048
    window: int = 512
    remat: str = "elementwise"
    routed: float = 1.0
    unroll: bool = True
    backend: str = "auto"
    axes: Axes | None = None  # of a mesh; None: one device, no mesh

    @property
    def name(self) -> str:
        """Model, regime, size, and what differs from the defaults."""
        routed = "" if self.regime in PLAIN_REGIMES else f", from {self.routed:.0%} routed"
        mesh = "" if self.axes is None else f", {self.axes}"
        return (f"{self.model} {self.regime} {self.batch} x {self.length:,} W={self.window}{routed}, remat {self.remat}"
                f"{mesh}")


def standard_cases() -> list[StepCase]:
    """The three regimes that people train, as they start and at one token in five; then the others."""
    small = [StepCase(regime, routed=routed) for regime in ("router_only", "l2a_ft", "full_ft")
             for routed in (1.0, 0.2)]
    return [*small, StepCase("router_strict", routed=0.2), StepCase("l2a_paper", routed=0.2), StepCase("pretrain")]


def large_cases() -> list[StepCase]:
    """What a 24 GB card has to hold beyond 0.5B: measured under XLA_PYTHON_CLIENT_MEM_FRACTION."""
    return [StepCase("router_strict", "qwen2.5-1.5b", remat="layer", unroll=False, routed=0.2),
            StepCase("l2a_ft", "qwen2.5-1.5b", batch=2, remat="layer", unroll=False, routed=0.2),
            StepCase("router_strict", "qwen2.5-3b", batch=1, remat="layer", unroll=False, routed=0.2)]


def config_of(case: StepCase) -> ModelConfig:
    """The model's shape. Its weights are random: rows may be longer than a checkpoint of this size was made for."""
    known = MODELS[case.model]
    return replace(known, max_positions=max(known.max_positions, case.length))


class Step:
    """A compiled step with its state: `run()` does one update."""

    def __init__(self, case: StepCase):
        self.case = case
        settings = replace(resolve(case.regime, {"model": "none", "data": ("none",), "window": case.window},
                                   begins=FIRST_PRESET), backend=case.backend)
        self.config = config_of(case)
        layer = layer_of(settings)
        if layer is not None and case.routed < 1:
            # z is about normal for a random router: the threshold that leaves the wanted share above it.
            level = statistics.NormalDist().inv_cdf(1 - case.routed)
            layer = replace(layer, temperature=1.0, threshold=float(1 / (1 + np.exp(-level))))
        self.layer = layer
        rule, dials = OptimizerConfig(case.regime), Dials(settings.lr, settings.router_lr or settings.lr, 1_000, 50,
                                                          settings.penalty, penalty_ramp=1_000)
        mesh = None if case.axes is None else make(case.axes)
        objective = Objective(self.config, layer, dtype=jnp.bfloat16, backend=case.backend,
                              remat=checkpoint_policy(case.remat, mesh is not None), unroll=case.unroll, mesh=mesh)
        abstract = abstract_params(self.config, layer, jnp.bfloat16)
        mask = regime_mask(abstract, case.regime)
        params = jax.jit(lambda key: init_params(self.config, key, layer, jnp.bfloat16))(jax.random.key(0))
        if layer is not None and case.routed < 1:
            kernel = params["layers"]["router"]["kernel"]
            params["layers"]["router"]["kernel"] = jax.random.normal(jax.random.key(1), kernel.shape) * (
                self.config.hidden_size**-0.5)
        begin = functools.partial(initial_state, optimizer=make_optimizer(rule, dials), master_dtype=jnp.float32)
        self.batch, dealt = _batch(case, self.config), {}
        if mesh is None:
            trainable, self.frozen = split_params(params, mask, case.unroll)
        else:
            params = leaves.put(params, mesh)
            trainable, self.frozen = leaves.put(split_params(params, mask, case.unroll), mesh)
            of_state = leaves.shardings(jax.eval_shape(begin, trainable), mesh)
            begin, dealt = jax.jit(begin, out_shardings=of_state), {
                "out_shardings": (of_state, NamedSharding(mesh, PartitionSpec()))}
            self.batch = jax.device_put(self.batch, NamedSharding(mesh, STACKED))
        del params
        self.state = begin(trainable)
        del trainable
        self.key = jax.random.key(2)
        step = jax.jit(functools.partial(train_step, dials=dials, objective=objective, optimizer=rule),
                       donate_argnums=0, **dealt)
        began = time.perf_counter()
        self.compiled = step.lower(self.state, self.frozen, self.batch, self.key).compile()
        self.compile_seconds = time.perf_counter() - began
        self.bytes = step_bytes(self.compiled)

    def run(self):
        """One update; returns its metrics."""
        self.state, metrics = self.compiled(self.state, self.frozen, self.batch, self.key)
        return metrics


def _batch(case: StepCase, config: ModelConfig) -> Batch:
    """One document a row, as `segment_ids` that the training path always has."""
    shape = (1, case.batch, case.length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (*shape[:2], case.length + 1), dtype=np.int32)
    positions = np.broadcast_to(np.arange(case.length, dtype=np.int32), shape)
    return jax.tree.map(jnp.asarray, Batch(tokens=tokens[..., :-1], targets=tokens[..., 1:],
                                           weights=np.ones(shape, np.float32), positions=positions,
                                           segment_ids=np.ones(shape, np.int32)))


def step_teraflops(case: StepCase, config: ModelConfig) -> float:
    """10^12 operations of one step: 2 per weight and token forward, 2 for the gradient of the inputs, and 2 for that
    of each trained weight; attention as 4 N H per visible pair, and 2.5 times that backward."""
    tokens = case.batch * case.length
    plain = case.regime in PLAIN_REGIMES
    c = config
    attention = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    sets = 1 if plain or FIRST_PRESET[case.regime] == "repair-2025" else 2
    mlp, head = 3 * c.hidden_size * c.intermediate_size, c.hidden_size * c.vocab_size
    weights = c.num_layers * (sets * attention + mlp) + head
    few = case.regime in ("router_strict", "router_only", "norms_only")
    trained = 0 if few else c.num_layers * sets * attention
    trained = weights if case.regime in ("full_ft", "pretrain") else trained
    seen = np.arange(1, case.length + 1, dtype=np.float64)
    pairs = seen.sum() * case.batch if plain else np.minimum(seen, case.window).sum() * case.batch
    if not plain:
        pairs += seen.sum() * case.batch * (1 if sets == 1 else case.routed)  # `repair` computes every row
    scores = 4 * c.num_heads * c.head_dim * pairs * 3.5 * c.num_layers
    return (tokens * (4 * weights + 2 * trained) + scores) / 1e12


def measure(case: StepCase, repeats: int = 5, each: int = 4) -> dict:
    """Milliseconds a step (median over `repeats` of `each` steps), tokens/s, memory, losses, sparsity."""
    step = Step(case)
    losses = [float(step.run()["loss"]) for _ in range(3)]
    last: dict = {}

    def wait(metrics):
        losses.append(float(metrics["loss"]))
        last.update(metrics)

    ms = median_ms(step.run, wait, repeats=repeats, each=each)
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"{case.name}: losses {losses}")
    return {"case": case.name, "regime": case.regime, "ms": ms,
            "tokens_per_second": case.batch * case.length / ms * 1e3, "memory_gb": step.bytes / 1e9,
            "compile_seconds": step.compile_seconds, "losses": losses,
            "sparsity": None if step.layer is None else float(last["sparsity"]),
            "teraflops": step_teraflops(case, step.config)}


def markdown(result: dict) -> str:
    """The result as a short table."""
    ceiling = result["matmul_teraflops_per_second"]
    rows = []
    for row in result["steps"]:
        rate, peer = row["teraflops"] / row["ms"] * 1e3, row["torch"]
        rows.append([
            row["case"], "-" if row["sparsity"] is None else f"{row['sparsity']:.0%}", f"{row['ms']:.1f}",
            f"**{row['tokens_per_second'] / 1e3:.1f}K**", f"{row['memory_gb']:.2f}", f"{rate:.0f}",
            f"{rate / ceiling:.0%}", *(("-", "-") if not peer else (
                f"{peer['tokens_per_second'] / 1e3:.1f}K", f"{peer['memory_gb']:.1f}"))])
    return "\n".join([
        "# Speed of training steps", "",
        f"{tables.said(result)} Medians, bfloat16; random weights and tokens, one document a row, "
        "AdamW with float32 masters, default backend. Memory is the compiled step's (arguments and temporaries). "
        "Operations are the model's own (rematerialised ones are not counted, nor are keys beyond a window), beside a "
        f"matrix product 8,192^3 at {ceiling:.0f} TFLOP/s. *PyTorch*: the same step, compiled, with both paths dense "
        "(`training_peer`), in the same run, where it was measured.", "",
        *tables.grid(["step", "local", "ms", "tokens/s", "GB", "TFLOP/s", "of ceiling", "PyTorch tokens/s", "GB"],
                     rows),
        *(f"- not measured, {name}: {why}" for name, why in result["failed"].items())]).rstrip() + "\n"


def _peer(case: StepCase, result: dict) -> dict | None:
    """PyTorch's figures, once a regime (it knows no routed share); None where it cannot be measured, with the reason in
    `result`."""
    known = [row["torch"] for row in result["steps"][:-1] if row["regime"] == case.regime]
    if known:
        return known[0]
    try:
        return training_peer.measure(case)
    except Exception as error:  # whatever PyTorch raises is a reason, not our failure
        result["failed"][f"PyTorch {case.regime}"] = tables.reason(error)
        return None


def main(cases: list[StepCase], only: str, out: Path | None, name: str, with_torch: bool) -> None:
    """Measure the cases in whose name `only` is found, print the table, and write NAME.json and NAME.md to `out`, after
    every case."""
    result = {**tables.heading(), "matmul_teraflops_per_second": matmul_ceiling(), "steps": [], "failed": {}}
    for case in tables.chosen(cases, only):
        try:
            result["steps"].append(measure(case))
            log.info("%s", json.dumps({k: result["steps"][-1][k] for k in ("case", "ms", "memory_gb")}))
        except jax.errors.JaxRuntimeError as error:
            result["failed"][case.name] = tables.reason(error)
            continue
        result["steps"][-1]["torch"] = _peer(case, result) if with_torch else None
        tables.write(out, name, result, markdown(result))
    print(markdown(result), flush=True)
