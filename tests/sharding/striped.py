"""Attention over 4 made-up devices against one device's, in a process of its own: `python -m tests.sharding.striped
FILE` writes what it found as JSON. One process for all, because a process has as many devices as it began with."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

from tests import garbage

SHARDS, LENGTH = 4, 48
OPERATIONS = ("full", "local", "local_with_scores", "routed", "mixed", "both")
PACKINGS = {"one document": None, "packed": ((20, 1, 22), (3, 30))}
LAYERS = ("sequential sinks", "shared")


def apart(found, wanted) -> float:
    """How far two trees of arrays are apart, as a share of the norm of one; the largest of all leaves'."""
    import jax
    import numpy as np

    def of(one, other):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        return float(np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-30))

    return max(of(*pair) for pair in zip(*map(jax.tree.leaves, (found, wanted)), strict=True))


def over_shards(function, *whole):
    """`function(*parts)` of every shard, jitted: arrays [B, T, ...] are dealt, and what it returns is joined."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, PartitionSpec

    from l2a_jax.sharding import stripes

    def one(*arrays):
        parts = [x if x is None else stripes.dealt(x, "context") for x in arrays]
        return jax.tree.map(lambda x: stripes.joined(x, "context"), function(*parts))

    mesh = Mesh(np.asarray(jax.devices()), ("context",))
    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(),
                                 check_vma=False)).lower(*whole)


def operations(packing) -> dict:
    """Every operation of a layer's attention, forward and backward: how far its rows and gradients are apart."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from l2a_jax.config import L2AConfig
    from l2a_jax.models.layer import Attention
    from l2a_jax.sharding.attention import striped

    rng = np.random.default_rng(5)
    q, k, v, cotangent = (jnp.asarray(rng.standard_normal((2, LENGTH, heads, 8)), jnp.float32)
                          for heads in (6, 2, 2, 6))
    decisions = jnp.asarray(rng.random((2, LENGTH)) < np.linspace(0.1, 0.9, LENGTH))
    ids = None
    if packing is not None:
        ids = jnp.asarray([np.repeat([*range(1, len(row) + 1), 0], [*row, LENGTH - sum(row)]) for row in packing],
                          jnp.int32)
    layer = L2AConfig(window=7, sinks=2)

    def computed(attend, q, k, v, cotangent, decisions):
        def one(name):
            further = (decisions,) if name in ("routed", "mixed", "both") else ()
            found, pull = jax.vjp(lambda q, *kv: getattr(attend, name)(q, *attend.keys(*kv), *further), q, k, v)
            rows = found[0] if isinstance(found, tuple) else found
            nothing = jax.tree.map(jnp.zeros_like, found[1:]) if isinstance(found, tuple) else ()
            return found, pull((cotangent, *nothing) if isinstance(found, tuple) else cotangent * jnp.ones_like(rows))

        return {name: one(name) for name in OPERATIONS}

    arrays = (q, k, v, cotangent, decisions)
    wanted = jax.jit(lambda *arrays: computed(Attention(layer, ids, "xla"), *arrays))(*arrays)
    lowered = over_shards(lambda ids, *parts: computed(striped(Attention(layer, ids, "xla"), "context"), *parts),
                          ids, *arrays)
    found, text = lowered.compile()(ids, *arrays), lowered.as_text()
    return {"apart": {name: apart(found[name], wanted[name]) for name in OPERATIONS},
            "collectives": [name for name in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
                            if f"stablehlo.{name}" in text]}


def layers(name) -> float:
    """A whole model, packed rows: its hidden states over shards, how far apart from those of one device."""
    import jax
    import jax.numpy as jnp

    from l2a_jax.attention.reference import segment_starts
    from l2a_jax.models.layer import Attention
    from l2a_jax.models.transformer import hidden_states
    from l2a_jax.sharding.attention import striped
    from tests.models.cases import CONFIG, LAYERS, make_params, make_tokens, packed

    tokens, ids, layer = make_tokens(), packed(), LAYERS[name]
    params = make_params(layer)
    positions = jnp.arange(tokens.shape[1]) - segment_starts(ids, tokens.shape)
    decisions = None
    if layer.topology == "sequential":  # forced, and uneven
        decisions = jnp.broadcast_to(jnp.arange(tokens.shape[1]) % 5 < 2, (CONFIG.num_layers, *tokens.shape))

    def states(attend, tokens, ids, positions, decisions):
        hidden, routing = hidden_states(params, tokens, CONFIG, layer, positions=positions, segment_ids=ids,
                                        decisions=decisions, attend=attend)
        return hidden, jnp.moveaxis(routing.decisions, 0, 2)

    def part(tokens, ids, positions, decisions):
        decisions = None if decisions is None else jnp.moveaxis(decisions, 2, 0)
        return states(striped(Attention(layer, ids, "xla"), "context"), tokens, ids, positions, decisions)

    wanted = jax.jit(lambda *given: states(None, *given))(tokens, ids, positions, decisions)
    given = (tokens, ids, positions, None if decisions is None else jnp.moveaxis(decisions, 0, 2))
    return apart(over_shards(part, *given).compile()(*given), wanted)


def prompts(shards: int = SHARDS) -> dict:
    """Prompts of uneven lengths, read over shards: how far logits and caches are apart, where rows have keys; whether
    the decisions are the same, and the texts."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from l2a_jax.inference.cache import layout_of
    from l2a_jax.inference.forward import prefill
    from l2a_jax.inference.generate import generate
    from l2a_jax.sharding.axes import Axes
    from l2a_jax.sharding.mesh import make
    from tests.models.cases import CONFIG, LAYERS, make_params, make_tokens

    mesh = make(Axes(context=shards))
    tokens, lengths, layer = make_tokens(length=LENGTH), jnp.asarray([LENGTH, 17]), LAYERS["parallel"]
    params, layout = make_params(layer), layout_of(CONFIG, layer, LENGTH + 8)

    def read(*given, of=1):
        return prefill(*given, CONFIG, layer, layout, backend="xla", shards=of)

    over = jax.shard_map(functools.partial(read, of=shards), mesh=mesh, in_specs=PartitionSpec(),
                         out_specs=PartitionSpec(), check_vma=False)
    (logits, cache, decided), (*wanted, decisions) = (jax.jit(run)(params, tokens, lengths) for run in (over, read))
    filled = jnp.arange(layout.slots) < lengths[:, None]
    filled = filled[None, :, :, None, None]
    full = [jax.tree.map(lambda x: jnp.where(filled, x, 0), of.full) for of in (cache, wanted[1])]

    layer = LAYERS["shared"]
    params, asked = make_params(layer), [tokens[0, :30].tolist(), tokens[1, :9].tolist()]
    one, other = (generate(params, CONFIG, layer, asked, max_new_tokens=4, mesh=over) for over in (mesh, None))
    return {"logits": apart(logits, wanted[0]), "full": apart(*full), "ring": apart(cache.ring, wanted[1].ring),
            "same": bool((decided == decisions).all() and (one.tokens == other.tokens).all()
                         and (one.decisions == other.decisions).all())}


def imbalance() -> float:
    """Of 48 tokens routed in two of three layers, in the last of which one shard has all."""
    import jax.numpy as jnp

    from l2a_jax.sharding import stripes
    from l2a_jax.sharding.attention import routed_imbalance

    decisions = jnp.zeros((2, LENGTH, 3), bool).at[:, :, 0].set(True)
    decisions = decisions.at[:, stripes.places(LENGTH, SHARDS, 1), 2].set(True)
    found = over_shards(lambda part: jnp.full(part.shape[:2], routed_imbalance(jnp.moveaxis(part, 2, 0), "context")),
                        decisions).compile()(decisions)
    return float(found[0, 0])


def main(file: str) -> None:
    found = {"operations": {name: operations(packing) for name, packing in PACKINGS.items()},
             "layers": {name: layers(name) for name in LAYERS}, "prompts": prompts(),
             "imbalance": imbalance()}
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={SHARDS}"
    garbage.seldom()
    main(*sys.argv[1:])
