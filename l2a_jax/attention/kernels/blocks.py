"""Tile sizes by (architecture, head width, kind of loop) and kernel, and the shared memory that each needs.

The sm_90 rows were chosen by `python eval/speed.py --blocks` (`eval/results/blocks.json`), by the least mean of time
over best time among a row's cases (for "whole" full attention alone; sinks are not swept). The sm_89 rows (RTX 4090,
L40) were chosen without the card, and have not been timed: no spilled registers, neither by `python eval/speed.py
--compile` nor by XLA's own compiler for that target, and well inside its shared memory.
A "window" call walks over few blocks per tile, a "whole" (full) one over many, a "mixed" one does both; "most" is a
long window over most of the row, all of full attention but a corner. A kind of loop without a row of its own takes that
of whole calls. The bounds `LONG` follow from the same sweep, with a backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

from l2a_jax import device
from l2a_jax.attention.kernels.launch import pl
from l2a_jax.attention.kernels.plan import Block, Spec

WIDTHS = (16, 32, 64, 128)  # head widths that the kernels take
SHARED_MEMORY = {"sm_89": 101_376, "sm_90": 232_448}  # bytes that one program may have (opt-in limits)
LONG = {64: 1_024, 128: 2_048}  # windows, by head width
LOOPS = ("window", "long", "most", "routed", "mixed", "whole")


class Blocks(NamedTuple):
    """The block of each kernel."""

    forward: Block
    backward_q: Block
    backward_kv: Block
    sinks: Block = Block(64, 0, 4, 1)


_HALF = {
    ("sm_90", 64, "window"): Blocks(Block(64, 64, 4, 3, flat=True), Block(64, 64, 4, 2), Block(64, 64, 4, 2)),
    ("sm_90", 64, "long"): Blocks(Block(64, 64, 4, 3), Block(128, 64, 4, 3), Block(64, 64, 4, 3)),
    ("sm_90", 64, "routed"): Blocks(Block(64, 128, 4, 2), Block(64, 128, 4, 3), Block(64, 64, 4, 3)),
    ("sm_90", 64, "mixed"): Blocks(Block(64, 128, 4, 2), Block(64, 64, 4, 3), Block(64, 64, 4, 2)),
    ("sm_90", 64, "whole"): Blocks(Block(128, 64, 8, 3), Block(128, 64, 4, 3), Block(64, 64, 4, 3)),
    ("sm_90", 128, "window"): Blocks(Block(64, 64, 4, 3, flat=True), Block(64, 32, 4, 2), Block(64, 64, 4, 2)),
    ("sm_90", 128, "long"): Blocks(Block(128, 128, 8, 3, flat=True), Block(64, 64, 4, 2), Block(64, 64, 4, 2)),
    ("sm_90", 128, "routed"): Blocks(Block(128, 128, 8, 3), Block(128, 64, 8, 3), Block(64, 64, 4, 2)),
    ("sm_90", 128, "mixed"): Blocks(Block(64, 64, 4, 3), Block(128, 64, 8, 3), Block(64, 64, 4, 2)),
    ("sm_90", 128, "whole"): Blocks(Block(128, 128, 8, 3, flat=True), Block(128, 64, 8, 3), Block(64, 64, 4, 2)),
    ("sm_89", 64, "whole"): Blocks(Block(128, 64, 8, 2), Block(64, 64, 4, 2), Block(32, 64, 4, 2)),
    ("sm_89", 128, "window"): Blocks(Block(64, 64, 4, 2), Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
    ("sm_89", 128, "long"): Blocks(Block(128, 32, 8, 2), Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
    ("sm_89", 128, "most"): Blocks(Block(128, 32, 8, 2), Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
    ("sm_89", 128, "whole"): Blocks(Block(64, 32, 4, 2), Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
}
# float32 is for checking, not for speed: its products are exact, not tf32.
_SINGLE = Blocks(Block(32, 32, 4, 1), Block(32, 32, 4, 1), Block(32, 32, 4, 1), Block(16, 0, 4, 1))
INTERPRET = Blocks(Block(32, 16, 4, 1), Block(16, 32, 4, 1), Block(16, 32, 4, 1), Block(32, 0, 4, 1))


def table(arch: str, width: int, itemsize: int, loop: str) -> Blocks:
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
