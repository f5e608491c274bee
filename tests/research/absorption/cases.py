"""One small model for all absorption tests: few shapes, few compilations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from l2a_jax.models.params import map_with_path
from l2a_jax.research.absorption import small_model
from l2a_jax.research.absorption.definitions import Recipe, TransformerConfig

CONFIG = TransformerConfig(vocab_size=19, layers=2, width=16, heads=2, hidden=24, positions=16, dropout=0.0,
                           gate_width=4, init_std=0.3, gate_std=0.5)
RECIPE = Recipe(steps=6, batch_size=4, seq_len=16, learning_rate=1e-2, warmup=2, weight_decay=0.5, distill_steps=30,
                distill_learning_rate=3e-2)
LENGTH, TOP_K = 16, 3


def params(seed: int = 0, config: TransformerConfig = CONFIG):
    """Random parameters, biases and norms too, so that no term can hide."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: small_model.init_params(config, key), jax.random.key(0))
    return map_with_path(lambda path, leaf: jnp.asarray(path.endswith("scale") + 0.3 * rng.normal(size=leaf.shape),
                                                        jnp.float32), shapes)


def tokens(seed: int = 0, rows: int = 3, length: int = LENGTH):
    return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, length)))


def numbers(k: int = TOP_K, config: TransformerConfig = CONFIG, gated=None):
    gated = jnp.ones(config.layers, bool) if gated is None else gated
    return small_model.Numbers(jnp.asarray(k, jnp.int32), gated, jnp.asarray(False))
