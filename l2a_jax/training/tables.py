"""Tables that settings choose from: regimes, and what a layer keeps for its backward pass. To add one, add a line.

Every leaf belongs to exactly one group, and a regime is a set of groups; a leaf that no pattern covers, or two do, is
an error, never a silently frozen or trained parameter. Free of JAX, so that help is quick.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from l2a_jax.config import L2AConfig
from l2a_jax.errors import UserError
from l2a_jax.fields import Choice, check_value

GROUPS: dict[str, str] = {
    "router": r"layers/router/(kernel|signals|hidden/(kernel|bias|signals|out))",
    "attention": r"layers/attention(_local|_global)?/(q|k|v|o)/(kernel|bias)",
    "attention_norms": r"layers/norm_(attention|local|global)/scale",
    "mlp": r"layers/mlp/(gate|up|down)/kernel",
    "other_norms": r"(layers/norm_mlp|norm_final)/scale",
    "embeddings": r"(embed/embedding|unembed/kernel)",
}

REGIMES: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "router_strict": ("router",),
    "router_only": ("router", "attention_norms"),
    "norms_only": ("attention_norms",),
    "l2a_ft": ("router", "attention_norms", "attention"),
    "l2a_paper": ("router", "attention_norms", "attention", "other_norms"),
    "full_ft": tuple(GROUPS),
    "pretrain": tuple(GROUPS),
}
# The preset that a regime begins with, for the layer above all.
REGIME_PRESET = {"router_strict": "repair", "router_only": "repair-2025", "l2a_ft": "paper", "l2a_paper": "paper",
                 "full_ft": "paper"}
# The same when the study's rows and the timings were declared: their settings are these presets', whatever a regime
# begins with now.
FIRST_PRESET = {**REGIME_PRESET, "router_strict": "repair-2025"}
# The others run a plain model: they add no router. In a shared layer with everything routed that is the same model, so
# that `norms_only` is what `router_only` gains without any routing.
PLAIN_REGIMES = tuple(name for name in REGIMES if name not in REGIME_PRESET)

# What each mode of --remat keeps (`memory`); "elementwise": what is expensive of matrix products and attention.
KEPT = {
    "layer": (),
    "mlp": ("qkv", "attention", "residual"),
    "elementwise": ("qkv", "attention", "residual", "mlp"),
}
Cost = Annotated[str, Choice("tokens", "keys"),
                 "what the penalty counts of a routed token: 1, or the keys that it reads beyond the window's (mean 1)"]
# What a router can learn from; all but the first need a model that stands still (`check_objective`).
NEXT_TOKEN, DISTILL, MIXED, SALIENCY = OBJECTIVES = ("next-token", "distill", "mixed", "saliency")
Minimised = Annotated[str, Choice(*OBJECTIVES), "what is minimised beside the penalty: next-token loss, the divergence "
                      "from the same model with everything routed, or both; saliency: the router is fitted to what "
                      "decisions are worth, the penalty their price"]
TargetTokens = Annotated[str, Choice("all", "beyond"),
                         "tokens that --target-local counts: all real ones, or those with keys beyond window and sinks"]
Regime = Annotated[str, Choice(*REGIMES), "which parameters are trained"]
Remat = Annotated[str, Choice(*KEPT, "none"), "recomputed in the backward pass: layer needs the least memory"]


def group_of(path: str) -> str:
    """The one group whose pattern covers the whole path. Raises ValueError where none or several do."""
    groups = [name for name, pattern in GROUPS.items() if re.fullmatch(pattern, path)]
    if len(groups) != 1:
        raise ValueError(f"parameter {path!r} is covered by {len(groups)} groups of the regime table {groups}; "
                         "expected exactly one")
    return groups[0]


def check_regime(regime: str) -> str:
    """`regime` itself, or UserError naming the known ones."""
    check_value(regime, Regime, "--regime")
    return regime


def check_objective(objective: str, regime: str, layer: L2AConfig | None, by: str = "") -> None:
    """UserError where there is no teacher: with everything routed, the layer has to be the base model, and to stay it.

    Where norms are trained too, the teacher would move with them: both could come to agree by getting worse. `by` says
    who asked for the objective.
    """
    if objective == NEXT_TOKEN:
        return
    if REGIMES[check_regime(regime)] != ("router",):
        raise UserError(f"--objective {objective}{by} takes the model itself as the teacher, and --regime {regime} "
                        f"{'has no router' if layer is None else 'changes the model too'}; expected --regime "
                        f"router_strict, or --objective {NEXT_TOKEN}")
    if layer.topology != "parallel" or not layer.share_attention:
        wiring = layer.topology if layer.topology != "parallel" else "parallel with two attention sets"
        raise UserError(f"--objective {objective}{by} takes the model with everything routed as the teacher, and in "
                        f"this layer ({wiring}) that is not the base model; expected --topology parallel and "
                        f"--share-attention, or --objective {NEXT_TOKEN}")


def check_attention_layers(layers: Sequence[int] | None, regime: str, num_layers: int) -> None:
    """UserError where `layers` (None: all) is no choice of attention layers to train for this regime and model."""
    if layers is None:
        return
    if "attention" not in REGIMES[check_regime(regime)]:
        trains = ", ".join(name for name, groups in REGIMES.items() if "attention" in groups)
        raise UserError(f"--attention-layers chooses where attention is trained, but --regime {regime} trains no "
                        f"attention; expected one of {trains}")
    if not layers or len(set(layers)) != len(layers):
        raise UserError(f"--attention-layers is {list(layers)}; expected at least one layer, each once")
    beyond = [layer for layer in layers if not 0 <= layer < num_layers]
    if beyond:
        raise UserError(f"--attention-layers names {beyond[0]}; the model has layers 0 to {num_layers - 1}")
