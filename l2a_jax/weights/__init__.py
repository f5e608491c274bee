"""Weights in and out: names, shapes, configurations and tokenizers, to and from our tree. Knows files alone."""

from l2a_jax.weights.export import save_pretrained
from l2a_jax.weights.tokenizer import Tokenizer
from l2a_jax.weights.tokenizer_folder import load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer", "save_pretrained"]
