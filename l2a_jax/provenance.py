"""How something that was made says where it came from: command, date, device, versions, revision of the source."""

from __future__ import annotations

import datetime
import functools
import pathlib
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

from l2a_jax import device
from l2a_jax.version import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "lm_eval")


def provenance() -> dict[str, Any]:
    """`command`, `date` (UTC), `device`, `versions` and `revision`, as plain JSON values."""
    return {"command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "device": device.described(),
            "versions": {"python": platform.python_version(), "l2a_jax": __version__, **installed(*PACKAGES)},
            "revision": revision()}


def installed(*packages: str) -> dict[str, str]:
    """The versions of those of the packages that are there."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def revision() -> str | None:
    """The git revision of the checkout that runs, with `-dirty` where its files were changed; None where it is none."""
    root = pathlib.Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                              capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
