"""Fill the parameter tree from stored tensors: everything used, everything filled, block by block.

A leaf (all layers stacked) is allocated once and filled from blocks of rows, so that converting needs the model, one
leaf on its way to the device, and a few megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.errors import UserError, few
from l2a_jax.models.params import Tree, by_path, map_with_path, param_dtype, param_shapes
from l2a_jax.progress import gigabytes
from l2a_jax.weights.names import IGNORED, Place, put, tensor_map

BLOCK_ELEMENTS = 1 << 20
"""Elements read at a time (rounded to whole rows): 4 MB once they are float32."""

MAX_LAYERS = 10_000


@runtime_checkable
class Tensors(Protocol):
    """A file or folder of named tensors. `kind` picks the column of the name table; `where` names it in messages."""

    kind: str
    where: str
    shapes: Mapping[str, tuple[int, ...]]

    def rows(self, name: str, start: int, stop: int) -> Float[np.ndarray, "rows ..."]:
        """Rows [start, stop) along the first dimension, in a floating dtype. Raises UserError if unreadable."""
        ...


def assemble(
    tensors: Tensors, config: ModelConfig, l2a_config: L2AConfig | None = None, dtype: Any = jnp.bfloat16
) -> Tree:
    """The parameter tree of `tensors` as jax arrays in `dtype` (the router in float32).

    Raises UserError, before anything is allocated, with every tensor that is missing, left over or of the wrong shape;
    and on a NaN or infinity, naming the tensor.
    """
    dtype = floating(dtype)
    # A corrupt layer count would otherwise be noticed only after naming every tensor of billions of layers.
    if config.num_layers > MAX_LAYERS:
        raise UserError(f"{tensors.where} claims {config.num_layers} layers; expected at most {MAX_LAYERS}")
    places = tensor_map(config, l2a_config, tensors.kind)
    check(tensors, places)
    by_leaf: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places.items():
        by_leaf.setdefault(place.path, []).append((name, place))

    def fill(path: str, shape: tuple[int, ...]) -> jax.Array:
        leaf = np.empty(shape, param_dtype(path, dtype))
        for name, place in by_leaf[path]:
            _copy(tensors, name, place, leaf if place.layer is None else leaf[place.layer])
        loaded(leaf.nbytes)
        return jnp.asarray(leaf)

    tree = param_shapes(config, l2a_config)
    shapes = by_path(tree)
    # The largest leaf first: the copy of a leaf on its way to the device then never stands on top of the whole model.
    total = sum(math.prod(shape) * jnp.dtype(param_dtype(path, dtype)).itemsize for path, shape in shapes.items())
    with gigabytes(f"loading {tensors.where}", total) as loaded:
        leaves = {path: fill(path, shapes[path]) for path in sorted(shapes, key=lambda path: -math.prod(shapes[path]))}
    return map_with_path(lambda path, _: leaves[path], tree)


def floating(dtype: Any) -> np.dtype:
    """`dtype` as a numpy dtype. Raises UserError unless it is float32, bfloat16 or float16."""
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        raise UserError(f"dtype is {dtype!r}; expected float32, bfloat16 or float16")
    return resolved


def check(tensors: Tensors, places: Mapping[str, Place]) -> None:
    """Raise one UserError that lists the missing, left-over and misshapen tensors; of many, the first and how many."""
    shapes = tensors.shapes
    problems = {
        "missing": [name for name in places if name not in shapes],
        "left over": [name for name in shapes if name not in places and not IGNORED.fullmatch(name)],
        "wrong shape": [f"{name} is {list(shapes[name])}, expected {list(place.shape)}"
                        for name, place in places.items() if shapes.get(name, place.shape) != place.shape],
    }
    told = "; ".join(f"{title}: {few(names)}" for title, names in problems.items() if names)
    if told:
        raise UserError(f"{tensors.where} does not fit its configuration; {told}")


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The rows of a tensor in blocks of about BLOCK_ELEMENTS elements, as [start, stop)."""
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _copy(tensors: Tensors, name: str, place: Place, leaf: np.ndarray) -> None:
    for start, stop in blocks(place.shape):
        stored = tensors.rows(name, start, stop)
        # Cast here, where the block is contiguous: it is several times faster than casting across a transpose.
        with np.errstate(over="ignore"):
            rows = stored.astype(leaf.dtype, copy=False)
        if not np.isfinite(rows).all():
            problem = f"values beyond {leaf.dtype.name}" if np.isfinite(stored).all() else "a NaN or an infinity"
            raise UserError(f"{tensors.where} holds {problem} in {name}, rows {start} to {stop - 1}")
        put(leaf, place.transform, rows, start)
