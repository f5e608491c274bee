"""Static choices that are searched: the layers or key/value heads whose global attention lowers a text's loss most.

Greedy, by the loss itself (for layers as in arXiv 2606.27791; for heads the aim of DuoAttention, arXiv 2410.10819,
which gates them by gradient): from nothing routed, the unit that lowers the loss beyond the window most is opened, and
so on. One program computes the loss under any mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float64

from l2a_jax.errors import UserError
from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.models.transformer import hidden_states
from l2a_jax.nn.shard import ALONE
from l2a_jax.progress import progress
from l2a_jax.research.rivals.beyond import beyond
from l2a_jax.sharding import whole
from l2a_jax.sharding.mesh import ROWS
from l2a_jax.sources import Pretrained
from l2a_jax.training.loss import cross_entropy

UNITS = ("layers", "heads")


class Losses:
    """Nats a token beyond the window of a calibration text, for masks of `units`: layers [M, L] or heads [M, L, K].
    `mesh`: deals windows, and their tokens."""

    def __init__(self, model: Pretrained, windows: Windows, units: str, backend: str = "auto",
                 mesh: Mesh | None = None):
        if units not in UNITS:
            raise ValueError(f"units are {units!r}; expected one of {', '.join(UNITS)}")
        layer, config = model.l2a_config, model.config
        if units == "heads" and (not layer.share_attention or layer.pruned_layers):
            raise UserError("heads see everything beside a window only where both paths share one attention set, and "
                            "no layer is pruned")
        self.shape = (config.num_layers,) if units == "layers" else (config.num_layers, config.num_kv_heads)
        self.able = [unit for unit in np.ndindex(*self.shape) if unit[0] not in layer.pruned_layers]
        given = beyond(windows, model, "--calibration-context", mesh)
        self._scored = given[-1].sum()
        self._call = functools.partial(_losses, whole.put(model.params, mesh), *given, config=config, l2a_config=layer,
                                       units=units, backend=backend, mesh=mesh)

    def __call__(self, masks: Bool[np.ndarray, " M *U"]) -> Float64[np.ndarray, " M"]:
        return np.asarray(self._call(jnp.asarray(masks)), np.float64) / self._scored


@functools.partial(jax.jit, static_argnames=("config", "l2a_config", "units", "backend", "mesh"))
def _losses(params, tokens, targets, weights, masks, *, config, l2a_config, units, backend, mesh
            ) -> Float[Array, " M"]:
    """Summed nats under each mask, one window after the other, so that memory holds one."""
    how = {"config": config, "l2a_config": l2a_config, "units": units, "backend": backend}
    if mesh is None:
        return _losses_here(params, masks, tokens, targets, weights, ALONE, **how)
    shard = whole.dealt(mesh, config, l2a_config)
    on_device = jax.shard_map(lambda params, masks, *windows: shard.total(
        _losses_here(params, masks, *map(shard.tokens, windows), shard, **how)), mesh=mesh,
                              in_specs=(P(), P(), ROWS, ROWS, ROWS), out_specs=P(), check_vma=False)
    return on_device(params, masks, tokens, targets, weights)


def _losses_here(params, masks, tokens, targets, weights, shard, *, config, l2a_config, units, backend):
    """`_losses` of the tokens that `shard` holds."""

    def one(mask, window):
        tokens, targets, weights = (part[None] for part in window)
        by_layer = mask if units == "layers" else jnp.zeros(mask.shape[0], bool)
        decisions = jnp.broadcast_to(by_layer[:, None, None], (mask.shape[0], *tokens.shape))
        hidden, _ = hidden_states(params, tokens, config, l2a_config, decisions=decisions,
                                  heads=mask if units == "heads" else None, backend=backend, shard=shard)
        return cross_entropy(params, hidden, targets, weights, config, logits_dtype=jnp.float32).nll

    return jax.lax.map(lambda mask: jnp.sum(jax.lax.map(lambda window: one(mask, window),
                                                        (tokens, targets, weights))), masks)


def greedy(losses: Losses, count: int, label: str, before: Sequence[Sequence[int]] = (),
           keep: Callable[[list[tuple[int, ...]]], None] = lambda order: None) -> list[tuple[int, ...]]:
    """The first `count` units in the order in which greedy search opens them; a unit is an index (layer,) or
    (layer, head) of a layer that can route. `before`: the first of them, where they are known; `keep` is given the
    order so far after each. UserError where there are not so many, or a loss is not finite."""
    units = losses.able
    if not 0 <= count <= len(units):
        raise UserError(f"{label}: no choice has {count} of {len(units)} units")
    chosen = [tuple(unit) for unit in before]
    if len(chosen) == count:
        return chosen
    mask = opened(chosen, losses.shape)
    with progress(label, count, start=len(chosen)) as report:
        for step in range(len(chosen), count):
            # As many masks each time, so that one program serves: units that are open already are asked again.
            masks = np.repeat(mask[None], len(units), axis=0)
            for row, unit in zip(masks, units, strict=True):
                row[unit] = True
            found = losses(masks)
            if not np.isfinite(found).all():
                bad = units[int(np.argmin(np.isfinite(found)))]
                raise UserError(f"{label}: the loss with {bad} open is not finite")
            found[[unit in chosen for unit in units]] = np.inf
            best = units[int(np.argmin(found))]
            chosen.append(best)
            mask[best] = True
            keep(chosen)
            report(step + 1, f"{best}: {found.min():.4f} nats a token")
    return chosen


def opened(units: list[tuple[int, ...]], shape: tuple[int, ...]) -> Bool[np.ndarray, "*U"]:
    """The mask in which these units are open."""
    mask = np.zeros(shape, bool)
    for unit in units:
        mask[unit] = True
    return mask
