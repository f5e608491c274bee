"""Weights in and out: names, shapes, configurations and tokenizers, to and from our parameter tree."""

from l2a_jax.weights.pretrained import Pretrained, load_pretrained, read_config, source_hash
from l2a_jax.weights.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Pretrained", "Tokenizer", "load_pretrained", "load_tokenizer", "read_config", "source_hash"]
