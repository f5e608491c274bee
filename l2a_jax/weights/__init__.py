"""Weights in and out: names, shapes, configurations and tokenizers, to and from our parameter tree."""

from l2a_jax.weights.export import convert, save_pretrained
from l2a_jax.weights.pretrained import Pretrained, load_pretrained, read_config, source_hash
from l2a_jax.weights.tokenizer import Tokenizer
from l2a_jax.weights.tokenizer_folder import load_tokenizer

__all__ = [
    "Pretrained",
    "Tokenizer",
    "convert",
    "load_pretrained",
    "load_tokenizer",
    "read_config",
    "save_pretrained",
    "source_hash",
]
