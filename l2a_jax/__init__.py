"""Conditional attention routing on Qwen2.5: convert, train, run, evaluate and explain (l2a_jax/README.md).

    import l2a_jax as l2a
    model = l2a.load_pretrained("Qwen/Qwen2.5-0.5B")
    layer = l2a.L2AConfig(window=256, sinks=4)
    params = l2a.add_routing(model.params, model.config, layer)
    logits, routing = l2a.forward(params, tokens, model.config, layer)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from l2a_jax.errors import UserError
from l2a_jax.version import __version__

if TYPE_CHECKING:
    from l2a_jax import attention
    from l2a_jax.config import MODELS, L2AConfig, ModelConfig, RopeScaling
    from l2a_jax.inference.generate import Generation, generate
    from l2a_jax.models.params import abstract_params, add_routing, init_params
    from l2a_jax.models.transformer import Output, Qwen2, forward, hidden_states, unembed
    from l2a_jax.nn import routing
    from l2a_jax.runs.router import train_router
    from l2a_jax.sources import Pretrained, load_pretrained
    from l2a_jax.training.presets import PRESETS
    from l2a_jax.training.regimes import count_parameters, regime_mask
    from l2a_jax.training.tables import REGIMES

# Loaded at their first use: a command must be able to say what is wrong, and to be interrupted, before JAX is there.
_HOMES = {
    "config": ("MODELS", "L2AConfig", "ModelConfig", "RopeScaling"),
    "inference.generate": ("Generation", "generate"),
    "models.params": ("abstract_params", "add_routing", "init_params"),
    "models.transformer": ("Output", "Qwen2", "forward", "hidden_states", "unembed"),
    "training.presets": ("PRESETS",),
    "training.tables": ("REGIMES",),
    "training.regimes": ("count_parameters", "regime_mask"),
    "runs.router": ("train_router",),
    "sources": ("Pretrained", "load_pretrained"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = {"attention": "attention", "routing": "nn.routing"}

__all__ = [
    "MODELS", "PRESETS", "REGIMES", "Generation", "L2AConfig", "ModelConfig", "Output", "Pretrained", "Qwen2",
    "RopeScaling", "UserError", "__version__", "abstract_params", "add_routing", "attention", "count_parameters",
    "forward", "generate", "hidden_states", "init_params", "load_pretrained", "regime_mask", "routing",
    "train_router", "unembed",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = importlib.import_module(f"l2a_jax.{_MODULES[name]}")
    elif name in _HOME:
        found = getattr(importlib.import_module(f"l2a_jax.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'l2a_jax' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
