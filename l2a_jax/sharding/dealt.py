"""What a device holds of a call that a mesh computes: rows over "data", tokens over "context", leaves over both.

    jax.shard_map(computes, ...)     one program on every device, over what it holds
      Dealt.tokens                   its part of the rows that it was given
      Dealt.ends, Dealt.gathered     weights whole: outside the layers at once, inside layer by layer
      Dealt.attention                its queries against the keys of all

What is summed is summed over what a device holds and then over devices (`total`). What is drawn is drawn for all tokens
on every device, which takes its part: draws do not depend on the mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from l2a_jax.attention.reference import Ids
from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.models.layer import Attention
from l2a_jax.models.params import Tree, by_path, map_with_path, param_dtype, param_shapes
from l2a_jax.nn.shard import Shard
from l2a_jax.sharding import leaves, stripes
from l2a_jax.sharding.attention import routed_imbalance, striped
from l2a_jax.sharding.axes import Axes
from l2a_jax.sharding.mesh import CONTEXT, DATA, NAMES, axes_of


@dataclass(frozen=True)
class Dealt(Shard):
    """One device's part, inside `shard_map`. `dimensions`: that of each leaf of the model that is dealt, by its path;
    within one layer for those of layers. `dtype`: what the leaves compute in (None: what they are in)."""

    axes: Axes
    dimensions: dict[str, int | None]
    dtype: Any = None

    def ends(self, params: Tree) -> Tree:
        return map_with_path(lambda path, part: part if path.startswith("layers/") else self._whole(path, part), params)

    def gathered(self, layer: Tree) -> Tree:
        return map_with_path(lambda path, part: self._whole(f"layers/{path}", part), layer)

    def _whole(self, path: str, part: Array) -> Array:
        dtype = part.dtype if self.dtype is None else param_dtype(path, self.dtype)
        return leaves.gathered(part, self.dimensions[path], dtype)

    def drawn(self, draw: Callable[[tuple[int, ...]], Array], shape: tuple[int, ...]) -> Shaped[Array, "*A B T"]:
        *front, rows, length = shape
        whole = draw((*front, rows * self.axes.data, length * self.axes.context))
        mine = jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(DATA) * rows, rows, axis=-2)
        return self.tokens(mine)

    def total(self, found: Any) -> Any:
        return jax.lax.psum(found, NAMES)

    def tokens(self, x: Shaped[Array, "*A B T"]) -> Shaped[Array, "*A B t"]:
        if self.axes.context == 1:
            return x
        return stripes.dealt(x.reshape(-1, x.shape[-1]), CONTEXT).reshape(*x.shape[:-1], -1)

    def joined(self, x: Shaped[Array, "*A B t"]) -> Shaped[Array, "*A B T"]:
        if self.axes.context == 1:
            return x
        return stripes.joined(x.reshape(-1, x.shape[-1]), CONTEXT).reshape(*x.shape[:-1], -1)

    def chosen(self, x: Shaped[Array, "B t D"], picks: Int[Array, "B M"]) -> Shaped[Array, "B M D"]:
        return super().chosen(x, picks) if self.axes.context == 1 else stripes.chosen(x, picks, CONTEXT)

    def spread(self, x: Shaped[Array, "B t D"], picks: Int[Array, " M"]) -> Shaped[Array, " m D"]:
        rows, places = jnp.divmod(picks, x.shape[1] * self.axes.context)
        rows = rows - jax.lax.axis_index(DATA) * x.shape[0]
        at, mine = stripes.held(places, x.shape[1], CONTEXT)
        mine = mine & (rows >= 0) & (rows < x.shape[0])
        found = jnp.where(mine[:, None], x[jnp.clip(rows, 0, x.shape[0] - 1), at], 0)
        return jax.lax.psum_scatter(found, NAMES, scatter_dimension=0, tiled=True)

    def positions(self, segment_ids: Ids | None, shape: tuple[int, int]) -> Int[Array, "B t"]:
        ids = None if segment_ids is None else self.joined(segment_ids)
        return self.tokens(super().positions(ids, (shape[0], shape[1] * self.axes.context)))

    def attention(self, plain: Attention) -> Attention:
        return plain if self.axes.context == 1 else striped(plain, CONTEXT)

    def imbalance(self, decisions: Bool[Array, "L B t"]) -> Float[Array, ""]:
        return routed_imbalance(decisions, NAMES) / self.axes.devices


def dealt(mesh: Mesh, config: ModelConfig, l2a: L2AConfig | None, dtype: Any) -> Dealt:
    """What a device of `mesh` holds of a model that computes in `dtype`."""
    shapes = by_path(param_shapes(config, l2a))
    found = {path: leaves.dimension(shape, mesh.size, path.startswith("layers/")) for path, shape in shapes.items()}
    return Dealt(axes_of(mesh), {path: None if at is None else at - path.startswith("layers/")
                                      for path, at in found.items()}, dtype)
