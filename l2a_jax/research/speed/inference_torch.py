"""transformers' Qwen2 measured beside our inference: prefill with SDPA, decode with a static cache, compiled."""

from __future__ import annotations

import inspect
import statistics
import time

from l2a_jax.config import ModelConfig


def measure_torch(case, config: ModelConfig, steps: int, repeats: int = 7, device: str = "cuda",
                  compiled: bool = True) -> float:
    """Milliseconds of one prefill or decode step of a plain model with random weights, in bfloat16."""
    import torch

    model = _model(config, device)
    try:
        with torch.inference_mode():
            if case.operation == "prefill":
                return _prefill(model, case, config, device, repeats)
            return _decode(model, case, config, device, repeats, steps, compiled)
    finally:
        del model
        if device == "cuda":
            torch._dynamo.reset()
            torch.cuda.empty_cache()


def _model(config, device):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    c = config
    with torch.device(device):
        return Qwen2ForCausalLM._from_config(
            Qwen2Config(
                vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
                num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
                max_position_embeddings=4 * c.max_positions, tie_word_embeddings=c.tie_embeddings,
                use_sliding_window=False),
            attn_implementation="sdpa", dtype=torch.bfloat16).eval()


def _median_ms(call, repeats, device, each=1):
    import torch

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    seconds = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        call()
        wait()
        seconds.append((time.perf_counter() - began) / each)
    return statistics.median(seconds) * 1e3


def _prefill(model, case, config, device, repeats):
    import torch

    ids = torch.randint(0, config.vocab_size, (case.batch, case.tokens), device=device)
    return _median_ms(lambda: model(ids, use_cache=True, logits_to_keep=1), repeats, device)


def _decode(model, case, config, device, repeats, steps, compiled):
    import torch
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=case.tokens + steps)
    accepted = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in accepted else "past_key_values"
    ids = torch.randint(0, config.vocab_size, (case.batch, 1), device=device)
    position = torch.full((1,), case.tokens, device=device)
    model(ids, position_ids=position[None], use_cache=True, **{name: cache})  # allocates the cache
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    # The compiled call must see the same tensors at every step, so the position is written in place.
    forward = torch.compile(model.forward, mode="reduce-overhead", dynamic=False) if compiled else model.forward
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

    return _median_ms(run, repeats, device, steps)
