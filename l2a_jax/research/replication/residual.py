"""How far routing moves the residual stream from the plain model's, layer by layer, on the same tokens.

For each token t and each depth l (0: the embedding, l: after layer l), with x the plain and y the routed stream:

    relative L2  |y - x| / |x|      cosine  <x, y> / (|x| |y|)      norm ratio  |y| / |x|

Reported as means over tokens, so that the few tokens on which Qwen's stream is a hundred times longer than elsewhere
(the first of a window, above all) count as one token each.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from l2a_jax.errors import UserError
from l2a_jax.evaluation import intervals
from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.models.transformer import probe_layers
from l2a_jax.progress import progress
from l2a_jax.sources import Pretrained

BUCKETS = (0, 256, 1_024, 4_096, 16_384)
"""Where a bucket of positions begins; the last one has no end."""
BATCH_TOKENS = 8_192
MEASURES = ("relative_l2", "cosine", "norm_ratio")


def residual_distance(
    plain: Pretrained,
    routed: Pretrained,
    windows: Windows,
    decisions: Bool[np.ndarray, "L B T"] | None = None,
    *,
    buckets: Sequence[int] = BUCKETS,
    backend: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, Any]:
    """The measures above at every depth (lists of L + 1), over all real tokens and by bucket of positions.

    `decisions` override the router (None: as it decides). Standard errors take windows as clusters. Raises UserError
    where `plain` is routed or `routed` plain, the two have different widths or depths, or a stream is not finite.
    """
    if plain.l2a_config is not None or routed.l2a_config is None:
        raise UserError("the distance of residual streams compares a plain model with a routed one, in this order")
    shape = [(model.config.num_layers, model.config.hidden_size) for model in (plain, routed)]
    if shape[0] != shape[1]:
        raise UserError(f"the plain model has {shape[0]} layers and width, the routed one {shape[1]}")
    count, length = windows.tokens.shape
    rows = max(1, min(count, batch_tokens // length))
    found = np.zeros((len(MEASURES), shape[0][0] + 1, count, length))
    with progress("residual stream", count) as report:
        for start in range(0, count, rows):
            some = slice(start, min(start + rows, count))
            forced = None if decisions is None else decisions[:, some]
            found[:, :, some] = jax.device_get(_measure(plain.params, routed.params, windows.tokens[some], forced,
                                                        plain.config, routed.config, routed.l2a_config, backend))
            report(some.stop, f"{some.stop} of {count} windows")
    if not np.isfinite(found[:, :, windows.real]).all():
        raise UserError("the residual stream of one of the two models is not finite on this text")
    places = np.broadcast_to(np.arange(length), windows.real.shape)
    edges = [*(edge for edge in buckets if edge < length), length]
    return {
        "depths": list(range(shape[0][0] + 1)), "decisions": "learned" if decisions is None else "given",
        **_means(found, windows.real),
        "buckets": [{"from": low, "to": high, **_means(found, windows.real & (places >= low) & (places < high))}
                    for low, high in itertools.pairwise(edges)],
        "text": windows.about, "interval": "standard errors over windows",
    }


def _means(found, where):
    """Means and standard errors over the tokens of `where`, as lists over depths; None where there is no token."""
    tokens = where.sum(axis=1)
    out: dict[str, Any] = {"tokens": int(tokens.sum())}
    kept = tokens > 0
    for measure, values in zip(MEASURES, found, strict=True):
        sums = np.where(where, values, 0).sum(axis=2)
        pairs = [intervals.token_mean(depth[kept], tokens[kept]) if kept.any() else (None, None) for depth in sums]
        out[measure], out[f"{measure}_stderr"] = (list(column) for column in zip(*pairs, strict=True))
    return out


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _measure(plain, routed, tokens, decisions, plain_config, config, l2a_config, backend):
    """[measure, depth, B, T] in float32."""
    x = probe_layers(plain, tokens, plain_config, probe=lambda stream: stream, backend=backend)
    y = probe_layers(routed, tokens, config, l2a_config, probe=lambda stream: stream, decisions=decisions,
                     backend=backend)
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)

    def norm(stream):
        return jnp.maximum(jnp.linalg.norm(stream, axis=-1), 1e-30)

    return jnp.stack([jnp.linalg.norm(y - x, axis=-1) / norm(x), jnp.sum(x * y, axis=-1) / (norm(x) * norm(y)),
                      norm(y) / norm(x)])
