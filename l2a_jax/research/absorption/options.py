"""Every flag of `train/absorption.py`. Free of JAX."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from l2a_jax.fields import Choice, Filled, Mark, Range, Unit, at_least, declared
from l2a_jax.research.absorption.definitions import FLAGS, PRESETS

PresetFlags = dataclasses.make_dataclass("PresetFlags", [(flag, declared(kind)[name], None)
                                                         for flag, (kind, name) in FLAGS.items()], frozen=True)
PresetFlags.__doc__ = "Numbers in place of the preset's."


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Text (default: the synthetic recall corpus)."""

    data: Annotated[tuple[Annotated[str, Unit("text")], ...], "wikitext, diverse, RECIPE=DIR, files, folders or globs"
                    ] = ()
    tokenizer: Annotated[str | None, Filled(),
                         "folder (tokenizer.json, or vocab.json and merges.txt), file or hub name"] = None
    held_out: Annotated[float, Range(0, 1, low_included=False, high_included=False), Unit("share"),
                        "share of the documents held out"] = 0.02
    cache_dir: Annotated[Path | None, "where token stores live"] = None


@dataclass(frozen=True, kw_only=True)
class AbsorptionOptions(TextOptions):
    """What is run. `numbers` holds the flags of `PresetFlags` that were given."""

    experiment: Annotated[tuple[Annotated[str, Unit("name")], ...],
                          "all, experiments by name, or l2a_audit RUN [OTHER_RUN]"] = ()
    benchmark: Annotated[bool, "steps per second: one seed, and three side by side"] = False
    preset: Annotated[str, Choice(*PRESETS), "tiny: two CPU cores, minutes"] = "tiny"
    run_dir: Annotated[Path | None, "trained arms and scores (default: runs/absorption-PRESET)"] = None
    out: Annotated[Path | None, "reports (default: RUN_DIR/results)"] = None
    time_limit: Annotated[float | None, at_least(0), Unit("seconds"), "stop cleanly after so long"] = None
    dry_run: Annotated[bool, "say which arms would be trained, and on how many tokens, and stop"] = False
    train_only: Annotated[bool, "train the arms that no other process is training, and stop: one for each GPU, with "
                          "one --run-dir; then the same command without it"] = False
    attention: Annotated[str, Choice("auto", "xla", "cudnn"), "of dense arms"] = "auto"
    untied: Annotated[bool, "a head of its own instead of the embedding"] = False
    numbers: Annotated[dict[str, Any], Mark.RECORDED] = field(default_factory=dict)
