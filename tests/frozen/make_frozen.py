"""Write `values.json` (see `cases`): `python -m tests.frozen.make_frozen`; other machines' values in it stay.

`python -m tests.frozen.make_frozen FILE` writes what this tree gives on this machine to FILE, and nothing else.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.frozen import cases

cases.as_the_tests_run()


def here() -> dict:
    """What may depend on the machine."""
    with tempfile.TemporaryDirectory() as folder:
        return {"losses": {name: cases.losses(name, Path(folder) / name) for name in cases.RUNS},
                "logits": {name: cases.logits(name) for name in cases.LAYERS}}


def main(file: str | None = None) -> None:
    if file is not None:
        Path(file).write_text(json.dumps(here()))
        return
    found = json.loads(cases.VALUES.read_text()) if cases.VALUES.exists() else {"machines": {}}
    found |= {"hashes": cases.hashes(), "counts": cases.counts()}
    found["machines"][cases.machine()] = here()
    cases.VALUES.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
