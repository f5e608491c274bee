"""What a layer's backward pass recomputes: a choice between memory and time.

The parts of a layer carry names (`checkpoint_name`); a mode says which named values are kept from the forward pass.
Everything else is computed again where the backward pass needs it, all but the decisions, which `hidden_states` keeps
in every mode. Per token and layer of the 0.5B model in bfloat16,
"layer" keeps 2 KB, "mlp" 13 KB (two attention sets: 20 KB), "elementwise" 19 KB more, "none" about 100 KB.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from l2a_jax.errors import UserError

# What each mode keeps. "elementwise" keeps the result of every matrix product and attention call that is expensive.
KEPT = {
    "layer": (),
    "mlp": ("qkv", "attention", "residual"),
    "elementwise": ("qkv", "attention", "residual", "mlp"),
}
MODES = (*KEPT, "none")


def checkpoint_policy(mode: str) -> Callable | bool:
    """The `remat` argument of `hidden_states`: a policy, True (keep nothing) or False (no rematerialisation).

    Raises UserError on an unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"--remat is {mode!r}; expected one of {', '.join(MODES)}")
    if mode == "none":
        return False
    return jax.checkpoint_policies.save_only_these_names(*KEPT[mode]) if KEPT[mode] else True
