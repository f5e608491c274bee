"""What is different between the data of two runs, from what `describe` said of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST = 4
"""Files and settings that are named; the others are counted."""
_SETTINGS = ("packing", "seq_len", "batch_size", "seed", "held_out", "echo", "ask", "asking", "answer_weight", "unique",
             "curriculum")


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What changed from one `TrainingData.describe()` to another, as `config.json` keeps it: "a.jsonl has changed".

    Runs of before each file's hash was kept have counts alone, which name the domain. Never raises: `old` comes from
    a file, and to say little is better than to fail while a failure is being told.
    """
    before, after = _mapping(old, "domains"), _mapping(new, "domains")
    said = [f"the domain {name!r} was not there before" for name in after if name not in before]
    said += [f"the domain {name!r} is gone" for name in before if name not in after]
    for name in before:
        if name in after:
            said += _domain(name, _mapping(before, name), _mapping(after, name))
    for key in (*_SETTINGS, "name"):
        if key in old and key in new and old[key] != new[key]:
            said.append(f"{key} is {new[key]}, not {old[key]}")
    if not said and old.get("tokenizer", new.get("tokenizer")) != new.get("tokenizer"):
        said.append("the tokenizer is another one")
    shown = said[:MOST] + ([f"and {len(said) - MOST} more"] if len(said) > MOST else [])
    return ", ".join(shown) or "its order or its shares are others, the counts are the same"


def _domain(name: str, old: Mapping, new: Mapping) -> list[str]:
    before, after = _mapping(old, "sources"), _mapping(new, "sources")
    if before and after:
        said = [f"{path} of {name!r} has changed" for path in before if path in after and before[path] != after[path]]
        lost, added = [p for p in before if p not in after], [p for p in after if p not in before]
        moved = [(p, q) for p in lost for q in added if before[p] == after[q]]
        said += [f"{p} is no longer in {name!r}" for p in lost if p not in {old for old, _ in moved}]
        said += [f"{p} in {name!r} is new" for p in added if p not in {new for _, new in moved}]
        # The same files elsewhere are the same text, unless they come in another order.
        if not said and list(before.values()) != list(after.values()):
            said.append(f"the files of {name!r} come in another order")
        return said
    counts = [(key, old.get(key), new.get(key)) for key in ("files", "documents", "tokens", "held_out_documents",
                                                            "text_bytes", "share")]
    return [f"{key.replace('_', ' ')} of {name!r}: {now}, not {was}" for key, was, now in counts
            if was is not None and was != now][:1]


def _mapping(value: Mapping, key: str) -> Mapping:
    found = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, Mapping) else {}
