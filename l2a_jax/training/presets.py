"""Settings under names: recipes that were measured, sizes of models and cards, and the embedded demo's. Free of JAX.

To renew a recipe, leave what it was under another name, and pin what was run with it (`tables.FIRST_PRESET`).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """Settings under a name. A `recipe` takes the place of the regime's own preset; others are put on top of it."""

    about: str
    values: dict[str, Any]
    recipe: bool = True


# Function-preserving at the start, sinks kept, both paths computed: what made router-only training lossless.
REPAIR: dict[str, Any] = {
    "topology": "parallel", "share_attention": True, "sinks": 4, "window": 256, "rope": "none", "leakage": 1.0,
    "penalty": 0.3, "penalty_warmup": 0.05, "penalty_ramp": 0.45, "lr": 5e-5, "router_lr": 3e-4, "weight_decay": 0.0,
}
REPAIR_FAR: dict[str, Any] = {
    **REPAIR, "window": 1_024, "penalty": 0.5, "seq_len": 8_192, "batch_size": 1, "grad_accum": 1, "flip": 0.3,
    "echo": 1.0,
}
REPAIR_TARGET: dict[str, Any] = {**REPAIR_FAR, "penalty": 0.0, "target_local": 0.9, "target_tokens": "beyond"}
# Two micro-batches of two rows, so that a card of 24 GB holds them.
REPAIR_ASKING: dict[str, Any] = {
    **REPAIR_TARGET, "target_local": 0.945, "ask": 0.5, "answer_weight": 8.0, "objective": "mixed", "flip": 0.0,
    "batch_size": 2, "grad_accum": 2, "router_lr": 1e-3,
}
# Run folders name these: a name stays, and a preset that is renewed leaves what it was under another name.
PRESETS: dict[str, Preset] = {
    "paper": Preset("the authors' release: L2A's own layer and schedule (lambda is greatest at the last step)", {
        "topology": "sequential", "share_attention": False, "sinks": 0, "rope": "theta:5", "leakage": 0.1,
        "penalty": 1.31e-3, "penalty_warmup": 209 / 3973, "penalty_ramp": 1 - 209 / 3973, "lr": 5e-5}),
    "repair": Preset("a router for long texts, nine tenths local in 32,768 tokens; it learns from the model itself and "
                     "from rows that ask", REPAIR_ASKING),
    "repair-2025": Preset("keeps the model intact at the start, and its sinks; both paths are computed", REPAIR),
    "repair-far": Preset("repair-2025 for long texts: the needle kept to 32,768 tokens with nine tenths local",
                         REPAIR_FAR),
    "repair-target": Preset("repair-far with a target in place of its penalty: nine tenths of the decisions local that "
                            "change anything, whatever the row's length", REPAIR_TARGET),
    **{f"{size}-24gb": Preset(f"Qwen2.5-{size.upper()} on one card of 24 GB, 8,192 tokens a step", {
        "model": f"Qwen/Qwen2.5-{size.upper()}", "tokens": tokens, "seq_len": 2_048, "batch_size": 4 // accumulated,
        "grad_accum": accumulated, **remat}, recipe=False)
       for size, tokens, accumulated, remat in (("0.5b", 12_000_000, 1, {}), ("1.5b", 8_000_000, 2, {"remat": "layer"}),
                                                ("3b", 8_000_000, 4, {"remat": "layer"}))},
}

# The embedded demo: `repair-2025`'s layer at the size of the packaged model, on the recall corpus. The model looks
# an answer up in layer 0, where the embedding of "metal" is that of `keep metal` and of `tell metal`: the router reads
# local attention too. Answers are few; counting more, they outlast a penalty that prices out what a window can learn.
DEMO = {
    **REPAIR, "window": 12, "router_input": "post_local", "penalty": 1.5, "answer_weight": 64.0, "seq_len": 128,
    "batch_size": 16, "steps": 200, "tokens": None, "lr": 3e-4, "router_lr": 1e-2, "save_every": 50, "eval_every": 50,
    "eval_batches": 2, "remat": "none",
}
RECALL_EMPHASIS = 4.0
# What made the packaged model: `python train/run.py --regime pretrain`.
DEMO_PRETRAIN = {
    "seq_len": 128, "batch_size": 16, "steps": 450, "tokens": None, "lr": 3e-3, "weight_decay": 0.01,
    "save_every": 200, "eval_every": 100, "eval_batches": 2, "remat": "none",
}
