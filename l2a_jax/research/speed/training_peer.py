"""The same training steps written plainly in PyTorch and compiled: the peer of `speed_training`.

Qwen2.5 with a straightforward dual-path layer: flex_attention over the window, SDPA over everything, both for every
token (PyTorch has no routed attention), a straight-through decision between. bfloat16 weights, float32 router, fused
AdamW, cross-entropy over float32 logits, as a PyTorch user would write it.
"""

from __future__ import annotations

from l2a_jax.config import MODELS, ModelConfig
from l2a_jax.research.speed.timing import torch_ms
from l2a_jax.training.tables import FIRST_PRESET, PLAIN_REGIMES


def _model(config: ModelConfig, window: int, length: int, wiring: str | None):
    """The model as a torch module. `wiring`: None (plain), "sequential" (two sets) or "shared" (parallel, one set)."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    c = config
    mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < window), None, None, length, length, device="cuda",
                             _compile=True)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(c.hidden_size, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
            self.o = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)

        def heads(self, h, cos, sin):
            sizes = [c.num_heads, c.num_kv_heads, c.num_kv_heads]
            x = self.qkv(h).view(*h.shape[:2], sum(sizes), c.head_dim).transpose(1, 2)
            q, k, v = x.split(sizes, dim=1)
            return self.rotate(q, cos, sin), self.rotate(k, cos, sin), v

        @staticmethod
        def rotate(x, cos, sin):
            one, two = x.float().chunk(2, dim=-1)
            return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1).to(x.dtype)

        def out(self, rows):
            return self.o(rows.transpose(1, 2).flatten(2))

    def near(q, k, v):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    def far(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.norm_attention = Attention(), nn.RMSNorm(c.hidden_size)
            if wiring == "sequential":
                self.attention_global, self.norm_global = Attention(), nn.RMSNorm(c.hidden_size)
            if wiring is not None:
                self.router = nn.Parameter(torch.zeros(c.hidden_size))
            self.norm_mlp = nn.RMSNorm(c.hidden_size)
            self.gate_up = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
            self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

        def decide(self, h):
            p = torch.sigmoid((h.float() @ self.router.float()) / 0.1)
            return ((p >= 0.5).float() + p - p.detach())[:, None, :, None]

        def forward(self, x, cos, sin):
            h = self.norm_attention(x)
            qkv = self.attention.heads(h, cos, sin)
            if wiring is None:
                x = x + self.attention.out(far(*qkv))
            elif wiring == "shared":
                d = self.decide(h)
                x = x + self.attention.out((d * far(*qkv) + (1 - d) * near(*qkv)).to(x.dtype))
            else:
                x = x + self.attention.out(near(*qkv))
                h = self.norm_global(x)
                rows = far(*self.attention_global.heads(h, cos, sin))
                x = x + self.attention_global.out((self.decide(h) * rows).to(x.dtype))
            gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * up)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
            self.layers = nn.ModuleList(Layer() for _ in range(c.num_layers))
            self.norm_final = nn.RMSNorm(c.hidden_size)

        def forward(self, tokens, targets, cos, sin):
            x = self.embed(tokens)
            for layer in self.layers:
                x = layer(x, cos, sin)
            logits = F.linear(self.norm_final(x), self.embed.weight)
            return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return Model()


_TRAINED = {  # which names of the module a regime trains
    "router_strict": ("router",), "router_only": ("router", "norm_attention", "norm_global"),
    "norms_only": ("norm_attention",),
    "l2a_ft": ("router", "norm_attention", "norm_global", "attention"), "full_ft": ("",), "pretrain": ("",),
}


def measure(case, repeats: int = 5, each: int = 4) -> dict:
    """{"tokens_per_second", "memory_gb", "ms", "compile_seconds"} of a `StepCase` in PyTorch.

    Raises ImportError without PyTorch, RuntimeError without a CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no CUDA device")
    config = MODELS[case.model]
    plain = case.regime in PLAIN_REGIMES
    wiring = None if plain else "shared" if FIRST_PRESET[case.regime] == "repair-2025" else "sequential"
    torch._dynamo.reset()
    torch.cuda.reset_peak_memory_stats()
    model = _model(config, case.window, case.length, wiring).to("cuda", torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in _TRAINED[case.regime]))
        if "router" in name:
            parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5, weight_decay=0.0,
                                  fused=True)
    tokens = torch.randint(0, config.vocab_size, (case.batch, case.length + 1), device="cuda")
    turns = torch.arange(case.length, device="cuda").float()[:, None] * (
        config.rope_theta ** (-torch.arange(0, config.head_dim, 2, device="cuda").float() / config.head_dim))
    cos, sin = turns.cos(), turns.sin()
    compiled = torch.compile(model)

    def step():
        optimizer.zero_grad(set_to_none=True)
        compiled(tokens[:, :-1], tokens[:, 1:], cos, sin).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()

    ms, compile_seconds = torch_ms(step, repeats=repeats, each=each)
    found = {"tokens_per_second": case.batch * case.length / ms * 1e3, "ms": ms,
             "memory_gb": torch.cuda.max_memory_allocated() / 1e9, "compile_seconds": compile_seconds}
    del model, compiled, optimizer
    torch.cuda.empty_cache()
    return found
