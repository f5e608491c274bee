"""Training steps over 8 made-up devices against one device's, in a process of their own.

`python -m tests.sharding.steps FILE` writes what it found as JSON. One process for all: it has as many devices as it
began with.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tests import garbage

DEVICES = 8
EPSILON = 1e-3
"""AdamW's. It divides each gradient by its own size: at the usual 1e-8 one that is nothing but rounding (that of the
bias of keys, which softmax ignores) moves its weight as far as any other, and over a mesh it is rounded otherwise. At
1e-3 it stays as small as it is."""
STEPS = 20


class Case(NamedTuple):
    """A training run: its regime, wiring (`tests.models.cases`), the meshes under which it is compared with one device,
    and what of layer, step and numbers is other than usual. `micro` batches make a step; `router` scales the router's
    weights."""

    regime: str
    layer: str | None
    meshes: tuple[str, ...]
    of_layer: Mapping[str, Any] = MappingProxyType({})
    of_step: Mapping[str, Any] = MappingProxyType({})
    of_dials: Mapping[str, Any] = MappingProxyType({})
    length: int = 24
    micro: int = 1
    router: float = 1.0


ODD = 23
MESHES = ("data=8", "context=8", "data=2,context=4", "data=4,context=2")
"""Every regime that trains is compared under all of them, in one case; what else can be otherwise, under some."""
CASES = {
    "everything trained": Case("full_ft", "shared", MESHES, {"leakage": 0.1, "flip": 0.1}, micro=2),
    "sequential": Case("l2a_ft", "sequential sinks", MESHES, {"leakage": 0.1},
                       {"remat": "elementwise", "unroll": True, "backend": "xla"}),
    "attention and norms": Case("l2a_paper", "shared", MESHES, {"leakage": 0.1}),
    "two sets": Case("l2a_paper", "parallel post_local", ("data=4,context=2",), {"leakage": 1.0}, {"remat": "layer"}),
    "router and norms": Case("router_only", "shared", MESHES, {"leakage": 0.0, "explore": 0.3,
                                                               "explore_by": "unsure"}),
    "divergence": Case("router_strict", "shared", MESHES, {"leakage": 1.0}, {"minimised": "mixed"}),
    "norms": Case("norms_only", None, MESHES),
    "plain": Case("pretrain", None, MESHES),
    "odd length": Case("pretrain", None, ("data=8",), {}, {"untied": True}, length=ODD),
    "everything routed": Case("router_strict", "shared", ("data=4,context=2",),
                              {"router_hidden": 3, "threshold": 0.001}, {"cost": "keys"}, router=0),
    "nothing routed": Case("l2a_ft", "shared", ("context=4",), {"leakage": 0.0, "threshold": 0.999}, router=0),
    "forced": Case("l2a_ft", "shared", ("data=2,context=4",), of_dials={"forced": (0.3, 1.0)}),
    "worth": Case("router_strict", "shared", ("data=2,context=4",), {}, {"minimised": "saliency"}),
}


def make_batch(seed, length, micro=1):
    """Micro-batches of eight rows: documents that end anywhere, padding, targets that do not count."""
    import numpy as np

    from l2a_jax.data.batch import Batch
    from tests.models.cases import CONFIG

    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, (micro, DEVICES, length), np.int32)
    ids = np.sort(rng.integers(1, 4, tokens.shape, np.int32))
    ids[:, ::3, -rng.integers(1, 9):] = 0
    weights = ((ids != 0) & (rng.random(ids.shape) < 0.8)).astype(np.float32)
    return Batch(tokens, np.roll(tokens, -1, axis=-1), weights, ids, None)


@functools.cache
def weights(layer, config, router):
    """`make_params` with the router's weights scaled; the same of a case whatever its mesh."""
    from l2a_jax.models.params import map_with_path
    from tests.models.cases import make_params

    return map_with_path(lambda path, leaf: leaf * router if "router" in path else leaf, make_params(layer, config))


def set_up(case, mesh, config=None):
    """The jitted step of a case, its state, its frozen leaves, and its numbers; over `mesh`, or on one device."""
    import jax
    import jax.numpy as jnp

    from l2a_jax.sharding import leaves
    from l2a_jax.training.memory import checkpoint_policy
    from l2a_jax.training.optimizer import Dials, OptimizerConfig, make_optimizer
    from l2a_jax.training.regimes import regime_mask
    from l2a_jax.training.step import Objective, initial_state, split_params, train_step
    from tests.models.cases import CONFIG, LAYERS, UNTIED

    step = dict(case.of_step)
    if config is None:
        config = dataclasses.replace(UNTIED if step.pop("untied", False) else CONFIG, num_layers=2)
    layer = None if case.layer is None else dataclasses.replace(LAYERS[case.layer], temperature=1.0, **case.of_layer)
    objective = Objective(config, layer, remat=checkpoint_policy(step.pop("remat", "none"), mesh is not None),
                          unroll=step.pop("unroll", False), backend=step.pop("backend", "reference"), mesh=mesh, **step)
    params = weights(layer, config, case.router)
    given = jax.tree.map(jnp.float32, dict(case.of_dials), is_leaf=lambda x: isinstance(x, tuple))
    rule, dials = OptimizerConfig(case.regime, epsilon=EPSILON), Dials(1e-3, 1e-3, STEPS, penalty=0.1, **given)
    trainable, frozen = split_params(params, regime_mask(params, case.regime), objective.unroll)
    state = initial_state(trainable, make_optimizer(rule, dials), jnp.float32)
    step = functools.partial(train_step, objective=objective, optimizer=rule)
    if mesh is None:
        return jax.jit(step), state, frozen, dials
    state, frozen = leaves.put(state, mesh), leaves.put(frozen, mesh)
    return jax.jit(step, out_shardings=(leaves.shardings(state, mesh), None)), state, frozen, dials


def trained(case, mesh):
    """The loss and the share of local decisions of each step, the first moments after the first step, which are its
    gradients, and the state after the last."""
    import jax
    import numpy as np

    step, state, frozen, dials = set_up(case, mesh)
    told, gradients = [], None
    for index in range(STEPS):
        state, metrics = step(state, frozen, make_batch(index, case.length, case.micro), jax.random.key(7), dials)
        told.append([float(metrics["loss"]), float(metrics.get("sparsity", 0.5))])
        if gradients is None:
            gradients = {path: np.asarray(leaf) for path, leaf in first_moments(state.optimizer).items()}
    return told, gradients, state


def first_moments(optimizer) -> dict[str, Any]:
    """Of AdamW, by path; after the first step a tenth of the gradient."""
    import jax

    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(optimizer)
            if ".mu" in jax.tree_util.keystr(path)}


def apart(found, wanted) -> float:
    """How far two leaves are apart, as a share of the norm of one."""
    import numpy as np

    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))


def compared(case) -> dict[str, Any]:
    """Of each mesh: how far what it trains is from what one device does, and in how many parts each leaf lies."""
    import jax
    import numpy as np

    from l2a_jax.models.params import by_path
    from l2a_jax.sharding import mesh as meshes
    from l2a_jax.sharding.axes import parse

    wanted, gradients, one = trained(case, None)
    report = {"local": [local for _, local in wanted]}
    for axes in case.meshes:
        mesh = meshes.make(parse(axes))
        told, found, state = trained(case, mesh)
        pairs = {path: (leaf, by_path(one.trainable)[path]) for path, leaf in by_path(state.trainable).items()}
        moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
        report[axes] = {
            "told": float(np.max(np.abs(np.array(told) - wanted) / np.maximum(wanted, 0.1))),
            "gradients": {path: apart(found[path], leaf) for path, leaf in gradients.items()},
            "gradient": apart(*(np.concatenate([leaf.ravel() for leaf in of.values()]) for of in (found, gradients))),
            "parameters": {path: apart(*pair) for path, pair in pairs.items()},
            "parts": {path: _parts(leaf) for path, (leaf, _) in pairs.items()},
            "parts of moments": [_parts(leaf) for leaf in moments],
        }
    return report


def _parts(leaf) -> int:
    return leaf.size // leaf.addressable_shards[0].data.size


def program() -> dict[str, Any]:
    """What the compiled step of a deep, wide model holds and moves, whose layers are nearly all of it."""
    import jax

    from l2a_jax.config import ModelConfig
    from l2a_jax.models.params import by_path
    from l2a_jax.sharding import mesh as meshes
    from l2a_jax.sharding.axes import Axes
    from l2a_jax.training.estimate import held
    from tests.models.cases import LAYERS

    config = ModelConfig(61, 256, 1_024, 8, 4, 2, 64, rope_theta=10_000.0, max_positions=128)
    axes = Axes(2, 4)
    step, state, frozen, dials = set_up(Case("full_ft", "shared", ()), meshes.make(axes), config)
    compiled = step.lower(state, frozen, make_batch(0, 24, micro=2), jax.random.key(0), dials).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    reckoned = held(state, frozen, config, LAYERS["shared"], axes=axes, rows=DEVICES, seq_len=24,
                    remat="none", dtype="float32", accumulate=2)
    moved = re.findall(r"= (\w+)\[([\d,]*)\]\S* (all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)",
                       text)
    return {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
            "estimated": reckoned._asdict(), "model": sum(leaf.nbytes for leaf in jax.tree.leaves(state.trainable)),
            "shapes": {path: leaf.shape for path, leaf in by_path(state.trainable).items()},
            "moved": sorted({(name, dtype, tuple(map(int, filter(None, shape.split(",")))))
                             for dtype, shape, name in moved})}


def sums() -> dict[str, Any]:
    """In what gradients are summed where bfloat16 computes over float32 masters, and a sum that bfloat16 cannot hold:
    256 from one device, and 1 from each other."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec as P

    from l2a_jax.sharding import leaves
    from l2a_jax.sharding import mesh as meshes
    from l2a_jax.sharding.axes import Axes

    mesh = meshes.make(Axes(data=DEVICES))
    step, state, frozen, dials = set_up(Case("full_ft", "shared", (), {}, {"dtype": jnp.bfloat16}), mesh)
    text = step.lower(state, frozen, make_batch(0, 24), jax.random.key(0), dials).as_text()

    def summed(part, given):
        whole, pull = jax.vjp(lambda part: leaves.gathered(part, 0, jnp.bfloat16), part)
        return pull(jnp.broadcast_to(given.astype(whole.dtype), whole.shape))[0]

    given = np.where(np.arange(DEVICES) == 0, 256.0, 1.0)
    found = jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=P(meshes.NAMES), out_specs=P(meshes.NAMES),
                                  check_vma=False))(jnp.zeros(DEVICES, jnp.float32), jnp.float32(given))
    scattered = re.findall(r'"stablehlo.reduce_scatter".*?\^bb0\(%\w+: tensor<(\w+)>', text, re.S)
    gathered = re.findall(r'"stablehlo.all_gather".*?-> tensor<[\dx]*(\w+)>', text)
    return {"scattered": sorted({*scattered}), "gathered": sorted({*gathered}),
            "sum": np.asarray(found).tolist()}


def scored() -> dict[str, Any]:
    """Held-out rows over a mesh and on one device, and the tokens whose nats change with one token of one row."""
    import jax
    import numpy as np

    from l2a_jax.sharding import mesh as meshes
    from l2a_jax.sharding.axes import parse
    from l2a_jax.training.step import Objective, evaluate_batch
    from tests.models.cases import CONFIG, LAYERS, make_params

    batch, layer = jax.tree.map(lambda x: x[0], make_batch(0, 24)), LAYERS["parallel"]
    row, token = 1, 9
    other = batch._replace(tokens=batch.tokens.copy())
    other.tokens[row, token] += 1
    found = []
    for mesh in (None, meshes.make(parse("data=2,context=4"))):
        score = jax.jit(functools.partial(evaluate_batch, objective=Objective(CONFIG, layer, mesh=mesh)))
        found.append(jax.device_get([score(make_params(layer), rows, None) for rows in (batch, other)]))
    (one, _), (many, moved) = found
    return {"nll": apart(many.nll, one.nll), "same": bool((many.decisions == one.decisions).all()
                                                          and (many.real == one.real).all()),
            "moved": np.argwhere(many.nll != moved.nll).tolist(), "at": (row, token),
            "document": np.flatnonzero(batch.segment_ids[row] == batch.segment_ids[row, token]).tolist()}


def restored() -> dict[str, list]:
    """A state written over one mesh, read onto others and onto one device: whether every bit is there, and in how many
    parts it lies."""
    import jax
    import numpy as np

    from l2a_jax.sharding import leaves
    from l2a_jax.sharding import mesh as meshes
    from l2a_jax.sharding.axes import parse
    from l2a_jax.training.checkpoints import LATEST, Checkpoints

    case, found = CASES["sequential"], {}
    _, state, _, _ = set_up(case, meshes.make(parse("data=8")))
    plain = jax.eval_shape(lambda: jax.tree.map(np.asarray, jax.device_get(state)))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        checkpoints.save(LATEST, state, {})
        for axes in ("data=2,context=4", "data=1", None):
            like = plain if axes is None else leaves.described(plain, meshes.make(parse(axes)))
            again = checkpoints.load(LATEST, like)
            same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), again, state)
            parts = {_parts(leaf) for leaf in jax.tree.leaves(again.trainable)}
            found[str(axes)] = [all(jax.tree.leaves(same)), *parts]
    return found


def resumed() -> dict[str, Any]:
    """A run over a mesh, and from its middle on over another one."""
    from l2a_jax.runs.train import resume, train
    from l2a_jax.training.settings import resolve

    given = {"steps": 4, "save_every": 2, "batch_size": 2, "eval_batches": 1, "mesh": "data=2,context=4"}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(resolve("pretrain", given), run)
        before = _losses(run)
        shutil.rmtree(run / "checkpoints" / "latest" / "4")
        resume(run, "data=1")
        return {"before": before, "after": _losses(run),
                "recorded": json.loads((run / "config.json").read_text())["settings"]["mesh"]}


def refused() -> dict[str, str]:
    """What is said of meshes that do not fit, before anything is compiled."""
    from l2a_jax.errors import UserError
    from l2a_jax.runs.plan import make_plan
    from l2a_jax.training.settings import resolve

    found = {}
    for axes in ("data=16", "data=3", "context=5"):
        try:
            make_plan(resolve("router_only", {"mesh": axes, "batch_size": 16}))
        except UserError as error:
            found[axes] = str(error)
    return found


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def main(file: str) -> None:
    found = {"cases": {name: compared(case) for name, case in CASES.items()}, "scored": scored(),
             "restored": restored(), "resumed": resumed(), "refused": refused(), "program": program(),
             "sums": sums()}
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    garbage.seldom()
    main(*sys.argv[1:])
