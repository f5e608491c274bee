"""PyTorch's attention, measured beside ours: SDPA for dense causal calls, compiled flex_attention for windows."""

from __future__ import annotations

from l2a_jax.research import tables
from l2a_jax.research.speed.cases import HEADS, SpeedCase
from l2a_jax.research.speed.timing import torch_ms


def torch_peers(case: SpeedCase) -> tuple[dict, dict]:
    """({name: [fwd ms, fwd+bwd ms]}, {name: why it was not measured}). Raises ImportError without PyTorch."""
    import torch

    if not torch.cuda.is_available():
        return {}, {"torch": "sees no CUDA device"}
    heads, kv_heads = HEADS[case.width]

    def draw(count):
        shape = (case.batch, count, case.length, case.width)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    sets = [(draw(heads), draw(kv_heads), draw(kv_heads)) for _ in range(case.sets)]
    cotangent = torch.randn_like(sets[0][0])
    times, failed = {}, {}
    name, function = ("flex_attention", _flex(case)) if case.operation == "local" else ("SDPA", _sdpa)

    def forward():
        with torch.no_grad():
            for inputs in sets:
                function(*inputs)

    def both():
        for inputs in sets:
            for x in inputs:
                x.grad = None
            function(*inputs).backward(cotangent)

    try:
        times[name] = [torch_ms(run)[0] / len(sets) for run in (forward, both)]
    except Exception as error:
        failed[name] = tables.reason(error)
    del sets, cotangent
    torch.cuda.empty_cache()
    return times, failed


def _sdpa(q, k, v):
    import torch

    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _flex(case: SpeedCase):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b, h, q, k):
        return (q >= k) & (q - k < case.window)

    torch._dynamo.reset()  # else the third window is a recompilation with dynamic shapes, which is slower
    mask = create_block_mask(visible, None, None, case.length, case.length, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)
