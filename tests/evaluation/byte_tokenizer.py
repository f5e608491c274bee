"""A tokenizer without training: one token a byte, and one that ends a text."""

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from l2a_jax.weights.tokenizer import Tokenizer


def byte_tokenizer():
    """Ids 0 to 255 are bytes, 256 is `<|endoftext|>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend, {"eos_token": "<|endoftext|>"})
