"""The same transformer in PyTorch, an oracle for logits. Imported only where torch is there."""

from __future__ import annotations

from typing import Any

import numpy as np

from l2a_jax.research.absorption.definitions import TransformerConfig


def make_model(config: TransformerConfig, gated: bool) -> Any:
    """The tied model without dropout: `module(tokens) -> logits`; `gated` with the soft multiplicative gate."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            d, gates = config.width, config.heads * config.gate_width
            self.norm_attention, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d)
            self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
            self.gate_q, self.gate_k = (nn.Linear(d, gates, bias=False) for _ in range(2))
            self.up, self.down = nn.Linear(d, config.hidden), nn.Linear(config.hidden, d)

        def forward(self, x, causal):
            normed = self.norm_attention(x)

            def heads(y):
                return y.unflatten(-1, (config.heads, -1)).transpose(1, 2)

            q, k, v = heads(self.q(normed)), heads(self.k(normed)), heads(self.v(normed))
            if gated:
                scores = q @ k.transpose(-1, -2) * config.head_width**-0.5
                g = heads(self.gate_q(normed)) @ heads(self.gate_k(normed)).transpose(-1, -2) * config.gate_width**-0.5
                scores = (scores * torch.sigmoid(g)).masked_fill(~causal, float("-inf"))
                out = torch.softmax(scores, dim=-1).to(v.dtype) @ v
            else:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(out.transpose(1, 2).flatten(-2))
            return x + self.down(F.gelu(self.up(self.norm_mlp(x))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(config.vocab_size, config.width)
            self.positions = nn.Embedding(config.positions, config.width)
            self.blocks = nn.ModuleList(Block() for _ in range(config.layers))
            self.norm_final = nn.LayerNorm(config.width)
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=config.init_std)

        def forward(self, tokens):
            length = tokens.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
            x = self.embedding(tokens) + self.positions.weight[:length]
            for block in self.blocks:
                x = block(x, causal)
            return self.norm_final(x) @ self.embedding.weight.T

    return Model()


def copy_params(module: Any, params: Any) -> None:
    """Fill the module with our parameters (one member's)."""
    import torch

    def put(target, value, transpose=False):
        value = np.asarray(value)
        target.data.copy_(torch.from_numpy(np.array(value.T if transpose else value)))

    put(module.embedding.weight, params["embed"]["embedding"])
    put(module.positions.weight, params["embed"]["positions"])
    put(module.norm_final.weight, params["norm_final"]["scale"])
    put(module.norm_final.bias, params["norm_final"]["bias"])
    layers = params["layers"]
    for index, block in enumerate(module.blocks):
        for name in ("norm_attention", "norm_mlp"):
            put(getattr(block, name).weight, layers[name]["scale"][index])
            put(getattr(block, name).bias, layers[name]["bias"][index])
        for name in "qkvo":
            put(getattr(block, name).weight, layers["attention"][name]["kernel"][index], transpose=True)
        for name in "qk":
            put(getattr(block, f"gate_{name}").weight, layers["gate"][name]["kernel"][index], transpose=True)
        for name in ("up", "down"):
            put(getattr(block, name).weight, layers["mlp"][name]["kernel"][index], transpose=True)
            put(getattr(block, name).bias, layers["mlp"][name]["bias"][index])
