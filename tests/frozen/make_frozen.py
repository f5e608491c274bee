"""Write `values.json` (see `cases`): `python -m tests.frozen.make_frozen`; other machines' values in it stay."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.frozen import cases

cases.as_the_tests_run()


def main() -> None:
    found = json.loads(cases.VALUES.read_text()) if cases.VALUES.exists() else {"machines": {}}
    found |= {"hashes": cases.hashes(), "counts": cases.counts()}
    with tempfile.TemporaryDirectory() as folder:
        found["machines"][cases.machine()] = {
            "losses": {name: cases.losses(name, Path(folder) / name) for name in cases.RUNS},
            "logits": {name: cases.logits(name) for name in cases.LAYERS},
        }
    cases.VALUES.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
