"""Tile sizes by (architecture, head width, kind of loop) and kernel, and the shared memory that each needs.

The sm_90 rows were chosen by `python eval/speed.py --blocks` on an H100 (`eval/results/blocks.json`), by the least mean
of time over best time among a row's cases (for "whole" full attention alone; sinks are not swept). The sm_89 rows (RTX
4090, L40) were chosen without the card: no spilled registers, neither by `python eval/speed.py --compile` nor by XLA
0.11.2's own compiler for that target, and well inside its shared memory; they have not been timed.
A "window" call walks over few blocks per tile, a "whole" (full) one over many, a "mixed" one does both; "most" is a
long window over most of the row, all of full attention but a corner (with the tiles of "long" its forward pass took 3 %
longer than that). A kind of loop without a row of its own takes that of whole calls. The bounds `LONG` follow from the
same sweep, with a backward pass: at head width 64 the row of windows is ahead by 9 % at 512, that of long ones by 4 %
at 1,024; at 128 the former by 5 % at 512 and 2 % at 1,024, the latter by 2 % at 2,048 and by 6 % at 4,096.
"""

from __future__ import annotations

from l2a_jax import device
from l2a_jax.attention.kernels.launch import pl
from l2a_jax.attention.kernels.plan import Block, Spec

WIDTHS = (16, 32, 64, 128)  # head widths that the kernels take
SHARED_MEMORY = {"sm_89": 101_376, "sm_90": 232_448}  # bytes that one program may have (opt-in limits)
LONG = {64: 1_024, 128: 2_048}  # windows, by head width
LOOPS = ("window", "long", "most", "routed", "mixed", "whole")
KERNELS = ("forward", "backward_q", "backward_kv", "sinks")

_SINKS = Block(64, 0, 4, 1)
_HALF = {
    ("sm_90", 64, "window"): {"forward": Block(64, 64, 4, 3, flat=True), "backward_q": Block(64, 64, 4, 2),
                              "backward_kv": Block(64, 64, 4, 2), "sinks": _SINKS},
    ("sm_90", 64, "long"): {"forward": Block(64, 64, 4, 3), "backward_q": Block(128, 64, 4, 3),
                            "backward_kv": Block(64, 64, 4, 3), "sinks": _SINKS},
    ("sm_90", 64, "routed"): {"forward": Block(64, 128, 4, 2), "backward_q": Block(64, 128, 4, 3),
                              "backward_kv": Block(64, 64, 4, 3), "sinks": _SINKS},
    ("sm_90", 64, "mixed"): {"forward": Block(64, 128, 4, 2), "backward_q": Block(64, 64, 4, 3),
                             "backward_kv": Block(64, 64, 4, 2), "sinks": _SINKS},
    ("sm_90", 64, "whole"): {"forward": Block(128, 64, 8, 3), "backward_q": Block(128, 64, 4, 3),
                             "backward_kv": Block(64, 64, 4, 3), "sinks": _SINKS},
    ("sm_90", 128, "window"): {"forward": Block(64, 64, 4, 3, flat=True), "backward_q": Block(64, 32, 4, 2),
                               "backward_kv": Block(64, 64, 4, 2), "sinks": _SINKS},
    ("sm_90", 128, "long"): {"forward": Block(128, 128, 8, 3, flat=True), "backward_q": Block(64, 64, 4, 2),
                             "backward_kv": Block(64, 64, 4, 2), "sinks": _SINKS},
    ("sm_90", 128, "routed"): {"forward": Block(128, 128, 8, 3), "backward_q": Block(128, 64, 8, 3),
                               "backward_kv": Block(64, 64, 4, 2), "sinks": _SINKS},
    ("sm_90", 128, "mixed"): {"forward": Block(64, 64, 4, 3), "backward_q": Block(128, 64, 8, 3),
                              "backward_kv": Block(64, 64, 4, 2), "sinks": _SINKS},
    ("sm_90", 128, "whole"): {"forward": Block(128, 128, 8, 3, flat=True), "backward_q": Block(128, 64, 8, 3),
                              "backward_kv": Block(64, 64, 4, 2), "sinks": _SINKS},
    ("sm_89", 64, "whole"): {"forward": Block(128, 64, 8, 2), "backward_q": Block(64, 64, 4, 2),
                             "backward_kv": Block(32, 64, 4, 2), "sinks": _SINKS},
    ("sm_89", 128, "window"): {"forward": Block(64, 64, 4, 2), "backward_q": Block(64, 32, 4, 2),
                               "backward_kv": Block(32, 64, 4, 2), "sinks": _SINKS},
    ("sm_89", 128, "long"): {"forward": Block(128, 32, 8, 2), "backward_q": Block(64, 32, 4, 2),
                             "backward_kv": Block(32, 64, 4, 2), "sinks": _SINKS},
    ("sm_89", 128, "most"): {"forward": Block(128, 32, 8, 2), "backward_q": Block(64, 32, 4, 2),
                             "backward_kv": Block(32, 64, 4, 2), "sinks": _SINKS},
    ("sm_89", 128, "whole"): {"forward": Block(64, 32, 4, 2), "backward_q": Block(64, 32, 4, 2),
                              "backward_kv": Block(32, 64, 4, 2), "sinks": _SINKS},
}
# float32 is for checking, not for speed: its products are exact, not tf32.
_SINGLE = {"forward": Block(32, 32, 4, 1), "backward_q": Block(32, 32, 4, 1), "backward_kv": Block(32, 32, 4, 1),
           "sinks": Block(16, 0, 4, 1)}
INTERPRET = {"forward": Block(32, 16, 4, 1), "backward_q": Block(16, 32, 4, 1), "backward_kv": Block(16, 32, 4, 1),
             "sinks": Block(32, 0, 4, 1)}


def table(arch: str, width: int, itemsize: int, loop: str) -> dict[str, Block]:
    """The blocks of every kernel; `loop` is one of `LOOPS`. Widths below 64 take the row of 64."""
    if itemsize > 2:
        return _SINGLE
    width = 64 if width <= 64 else 128
    return _HALF.get((arch, width, loop), _HALF[arch, width, "whole"])


def loop_of(spec: Spec) -> str:
    """Which kind of loop a call runs."""
    if spec.kind != "all":
        return spec.kind
    if spec.window is None:
        return "whole"
    if spec.window < LONG[64 if spec.width <= 64 else 128]:
        return "window"
    return "most" if 2 * spec.window > spec.length else "long"


def architecture() -> str:
    """The row of the table for the device at hand: Hopper's where that much shared memory is (Blackwell of the data
    centre has it too, that of consumer cards, 12.x, has Ada's), else Ada's."""
    return "sm_90" if 9 <= device.capability() < 12 else "sm_89"


def shared_memory(kernel: str, block: Block, width: int, itemsize: int = 2, sinks: int = 4) -> int:
    """Upper bound in bytes of the shared memory of one program.

    The tiles that stay (the rows' or the keys'), and `num_stages` copies of the tiles that stream past (of sinks too);
    the compiler keeps some of them in registers, so what it reports lies at or below this.
    """
    padded = max(16, pl.next_power_of_2(sinks))
    keys = block.keys if kernel == "backward_kv" else max(block.keys, min(64, padded))
    row_tile, key_tile = block.rows * width * itemsize, keys * width * itemsize
    scalars = 4 * 4 * max(block.rows, keys)  # what reductions across warps exchange
    weights = 4 * block.rows * keys if itemsize > 2 else 0  # on their way to the next product
    if kernel == "forward":
        return row_tile + 2 * block.num_stages * key_tile + weights + scalars
    if kernel == "backward_q":
        return 2 * row_tile + 2 * block.num_stages * key_tile + scalars
    if kernel == "backward_kv":
        return 2 * key_tile + block.num_stages * (2 * row_tile + 2 * 4 * block.rows) + weights + scalars
    return 3 * row_tile + 2 * key_tile + weights + scalars
