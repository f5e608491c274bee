"""transformers' Qwen2 measured beside our inference: prefill with SDPA, decode with a static cache, compiled."""

from __future__ import annotations

import inspect

from l2a_jax.config import ModelConfig
from l2a_jax.research.speed.timing import torch_ms


def measure_torch(case, config: ModelConfig, steps: int) -> float:
    """Milliseconds of one prefill or decode step of a plain model with random weights, in bfloat16, on CUDA."""
    import torch

    model = _model(config)
    try:
        with torch.inference_mode():
            if case.operation == "decode":
                return torch_ms(_decode(model, case, config, steps))[0] / steps
            ids = torch.randint(0, config.vocab_size, (case.batch, case.tokens), device="cuda")
            return torch_ms(lambda: model(ids, use_cache=True, logits_to_keep=1))[0]
    finally:
        del model
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def _model(config):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    c = config
    with torch.device("cuda"):
        return Qwen2ForCausalLM._from_config(
            Qwen2Config(
                vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
                num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
                max_position_embeddings=4 * c.max_positions, tie_word_embeddings=c.tie_embeddings,
                use_sliding_window=False),
            attn_implementation="sdpa", dtype=torch.bfloat16).eval()


def _decode(model, case, config, steps):
    """A function that makes `steps` steps over a filled cache."""
    import torch
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=case.tokens + steps)
    accepted = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in accepted else "past_key_values"
    ids = torch.randint(0, config.vocab_size, (case.batch, 1), device="cuda")
    position = torch.full((1,), case.tokens, device="cuda")
    model(ids, position_ids=position[None], use_cache=True, **{name: cache})  # allocates the cache
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    # The compiled call must see the same tensors at every step, so the position is written in place.
    forward = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)
    extra = {"cache_position": position} if "cache_position" in accepted else {}

    def run():
        position.fill_(case.tokens)
        for layer in cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(case.tokens)
        for _ in range(steps):
            out = forward(ids, position_ids=position[None], use_cache=True, **{name: cache}, **extra)
            ids.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
            position.add_(1)

    return run
