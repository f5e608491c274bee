"""What the rivals are asked about: windows of two texts and RULER's prompts, all read before there are weights."""

from __future__ import annotations

from typing import NamedTuple

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.evaluation import reach, ruler
from l2a_jax.evaluation.options import Options
from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.evaluation.ruler_text import Item, build
from l2a_jax.evaluation.windows import windows_of
from l2a_jax.research.rivals.choices import check_density
from l2a_jax.research.rivals.options import RivalOptions
from l2a_jax.sources import Pretrained, source_tokenizer


class Prepared(NamedTuple):
    """Everything that is read before there are weights. `prompts`: RULER's, by task and length."""

    text: Windows
    calibration: Windows
    prompts: dict[tuple[str, int], list[Item]]
    ruler: Options | None


def prepare(options: RivalOptions, config: ModelConfig, layer: L2AConfig) -> Prepared:
    """UserError where a text, a length or a density cannot be."""
    bare = Pretrained(config, layer, {}, source_tokenizer(options.source), "")

    def windows(entry: str, flag: str, context: int, most: int | None) -> Windows:
        asked = Options(source=options.source, tasks=("reach",), context=context, max_windows=most)
        found = windows_of(asked, entry, flag, bare)
        reach.distances(found, bare, f"{flag} and its context")
        return found

    for local in options.local:
        check_density(1 - local / 100, bare, f"--local {local:g}")
    text = windows(options.text, "--text", options.context, options.max_windows)
    calibration = windows(options.calibration, "--calibration", options.calibration_context,
                          options.calibration_windows)
    if options.lengths is None:
        return Prepared(text, calibration, {}, None)
    needle = {} if options.haystack is None else {"haystack": options.haystack}
    asked = Options(source=options.source, tasks=("ruler",), lengths=options.lengths, seed=options.seed,
                    ruler_items=options.ruler_items, backend=options.backend, needle=needle)
    made = ruler.prepare("ruler", asked, bare)
    prompts = {(task, length): [build(task, length, number, options.seed, made.made_of, made.units[task, length])
                                for number in range(options.ruler_items)]
               for length in options.lengths for task in asked.ruler_tasks}
    return Prepared(text, calibration, prompts, asked)
