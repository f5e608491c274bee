"""Measure attention beside its peers on the GPU at hand, and write the table: `python eval/speed.py [--out DIR]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory on the same card

from l2a_jax.evaluation import speed, speed_blocks, speed_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the JSON and the markdown table")
    parser.add_argument("--only", default="", help="measure the cases whose name contains this")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    parser.add_argument("--windows", action="store_true", help="ratios of length to window, instead of the table")
    parser.add_argument("--blocks", action="store_true", help="every block size of every kernel, instead of the table")
    parser.add_argument("--compile", action="store_true",
                        help="registers, spills and shared memory of every kernel for sm_89 and sm_90, without a GPU")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.blocks:
        speed_blocks.main(arguments.out, arguments.only)
        return
    if arguments.compile:
        from l2a_jax.evaluation import speed_compile

        speed_compile.main(arguments.out)
        return
    cases = speed_cases.window_cases() if arguments.windows else speed_cases.standard_cases()
    speed.main([case for case in cases if arguments.only in case.name], arguments.out,
               "speed_windows" if arguments.windows else "speed", not (arguments.no_torch or arguments.windows))


if __name__ == "__main__":
    main()
