"""The places that search and oracle ask about: those that see more than the window."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int32

from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.evaluation.reach import distances
from l2a_jax.sharding.mesh import axes_of
from l2a_jax.sources import Pretrained


def beyond(windows: Windows, model: Pretrained, flag: str, mesh: Mesh | None
           ) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"], Float32[np.ndarray, "B T"]]:
    """Tokens, targets, and 1 for each target that is scored and sees more than the window, 0 for others; filled up
    with windows and tokens that count nothing, so that the `mesh` divides them. UserError, naming the `flag`, where no
    place is beyond the window."""
    axes, shape = axes_of(mesh), windows.tokens.shape
    weights = (distances(windows, model, flag)[1] > 0).astype(np.float32)
    missing = [(0, -size % parts) for size, parts in zip(shape, axes, strict=True)]
    return tuple(np.pad(x, missing) for x in (windows.tokens, windows.targets, weights))
