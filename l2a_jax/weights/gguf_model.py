"""A Qwen2 model in a GGUF file: its configuration and its tokenizer, from the file's own fields.

Tensors need no permutation of q and k: GGUF keeps Qwen2's half-split rotary layout. A stored `output.weight` makes the
model untied, as in transformers.
"""

from __future__ import annotations

from l2a_jax.config import ModelConfig, RopeScaling
from l2a_jax.errors import UserError
from l2a_jax.weights.gguf_file import GGUFFile
from l2a_jax.weights.hf_config import shortest_float32
from l2a_jax.weights.tokenizer import Tokenizer, byte_level_bpe

ARCHITECTURE = "qwen2"
PRE_TOKENIZERS = ("qwen2", "deepseek-r1-qwen")
"""Names under which GGUF files carry Qwen2's splitting rule; files older than the field carry none."""

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The model's shape. Raises UserError on another architecture, or on fields that are missing or unsupported."""
    architecture = file.fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(f"{file.path} holds a model of architecture {architecture!r}; expected {ARCHITECTURE!r}")
    if file.fields.get("split.count", 1) not in (0, 1):
        raise UserError(f"{file.path} is one of {file.fields['split.count']} parts of a model; merge them into one")
    if "token_embd.weight" not in file.shapes:
        raise UserError(f"{file.path} does not fit its configuration; missing: token_embd.weight")

    def field(name: str, default: int | None = None) -> int:
        value = file.fields.get(f"{ARCHITECTURE}.{name}", default)
        if value is None:
            raise UserError(f"{file.path} misses the field {ARCHITECTURE}.{name}")
        if not isinstance(value, int):
            raise UserError(f"{file.path}: {ARCHITECTURE}.{name} is {value!r}; expected a whole number")
        return value

    heads, hidden = field("attention.head_count"), field("embedding_length")
    head_dim = field("attention.key_length", hidden // max(heads, 1))
    for name in ("rope.dimension_count", "attention.value_length"):
        if field(name, head_dim) != head_dim:
            raise UserError(f"{file.path}: {ARCHITECTURE}.{name} is {field(name)}, the head width {head_dim}; "
                            "they must be equal")
    try:
        config = ModelConfig(
            vocab_size=file.shapes["token_embd.weight"][0],
            hidden_size=hidden,
            intermediate_size=field("feed_forward_length"),
            num_layers=field("block_count"),
            num_heads=heads,
            num_kv_heads=field("attention.head_count_kv", heads),
            head_dim=head_dim,
            rope_theta=shortest_float32(file.fields.get(f"{ARCHITECTURE}.rope.freq_base", 10_000.0)),
            rope=_rope(file),
            rms_norm_eps=shortest_float32(file.fields[f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon"]),
            tie_embeddings="output.weight" not in file.shapes,
            max_positions=field("context_length"),
        )
    except KeyError as error:
        raise UserError(f"{file.path} misses the field {error.args[0]}") from error
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{file.path} has an unusable configuration: {error}") from error
    return config


def _rope(file: GGUFFile) -> RopeScaling:
    fields = {key.removeprefix("qwen2.rope.scaling."): value for key, value in file.fields.items()
              if key.startswith("qwen2.rope.scaling.")}
    kind = fields.get("type", "none")
    if kind == "none":
        return RopeScaling()
    if kind not in ("linear", "yarn"):
        raise UserError(f"{file.path} scales RoPE by {kind!r}; expected none, linear or yarn")
    original = fields.get("original_context_length") if kind == "yarn" else None
    return RopeScaling(kind, shortest_float32(fields.get("factor", 1.0)), original)


def gguf_tokenizer(file: GGUFFile) -> Tokenizer | None:
    """The file's byte-level BPE, token for token what transformers builds from the same file; None if it has none.

    Like transformers, this applies no Unicode normalisation, because the file states none; Qwen2's own
    tokenizer.json applies NFC first. The two differ only on text that is not in NFC.
    Raises UserError on another kind of tokenizer.
    """
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in file.fields.items()}
    if "tokens" not in fields:
        return None
    if fields.get("model") != "gpt2" or fields.get("pre", PRE_TOKENIZERS[0]) not in PRE_TOKENIZERS:
        raise UserError(f"{file.path} has a tokenizer of model {fields.get('model')!r} with pre-tokenizer "
                        f"{fields.get('pre')!r}; expected 'gpt2' with one of {', '.join(PRE_TOKENIZERS)}")
    tokens, types, merges = fields["tokens"], fields.get("token_type"), fields.get("merges")
    whole = _texts(tokens) and _texts(merges)
    if whole and types is None:
        types = [_NORMAL] * len(tokens)
    if not whole or not isinstance(types, list) or len(types) != len(tokens):
        raise UserError(f"{file.path} needs a list of tokens, one of their types and one of merges; it holds no such "
                        "lists, or they do not fit: corrupt")

    def token(name: str) -> str | None:
        index = fields.get(name)
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise UserError(f"{file.path}: {name} is {index}, of {len(tokens)} tokens")
        return tokens[index]

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos_token_id"),
        "eos_token": token("eos_token_id"),
        "pad_token": token("padding_token_id"),
        "add_bos_token": bool(fields.get("add_bos_token", False)),
        "chat_template": file.fields.get("tokenizer.chat_template"),
    }
    return byte_level_bpe(
        vocabulary=tokens,
        merges=[tuple(merge.split(" ")) for merge in merges],
        special=[text for text, kind in zip(tokens, types, strict=True) if kind == _CONTROL],
        added=[text for text, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED],
        settings={key: value for key, value in settings.items() if value is not None},
        normalise=False,
    )


def _texts(array: object) -> bool:
    return isinstance(array, list) and all(isinstance(text, str) for text in array)
