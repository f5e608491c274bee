"""Text to batches: recipes and files, a token store, packing, mixing, and random access by micro-batch index."""

from l2a_jax.data.batch import Batch, TrainingData, decode_row
from l2a_jax.data.changes import difference
from l2a_jax.data.counts import format_count, parse_count, parse_weights
from l2a_jax.data.dataset import PackedData, open_data
from l2a_jax.data.recipes import RECIPES

__all__ = [
    "RECIPES",
    "Batch",
    "PackedData",
    "TrainingData",
    "decode_row",
    "difference",
    "format_count",
    "open_data",
    "parse_count",
    "parse_weights",
]
