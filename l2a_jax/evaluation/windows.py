"""The text of an evaluation as windows of one length, whatever it comes from: a file, the hub, or the recall corpus."""

from __future__ import annotations

import logging
from typing import Any

from l2a_jax.config import L2AConfig, position_limit
from l2a_jax.data.recall import RecallCorpus, needs_memory
from l2a_jax.errors import UserError
from l2a_jax.evaluation import texts
from l2a_jax.evaluation.perplexity import Windows, batch_windows, text_windows
from l2a_jax.sources import Pretrained

log = logging.getLogger("l2a_jax.eval")
CONTEXT = 2_048
RECALL_ROWS, RECALL_LENGTH = 64, 128


def windows_of(options: Any, entry: str | None, flag: str, model: Pretrained, context: int = CONTEXT) -> Windows:
    """The windows of a text flag, of `options.context` tokens or, where that was not given, of `context` or what the
    model can take. Raises UserError naming the flag."""
    limit = position_limit(model.config, model.l2a_config)
    if entry is None:
        if not texts.speaks_recall(model.tokenizer):
            raise UserError(f"--tasks {','.join(options.tasks)} needs held-out text: give --text FILE (a folder, a "
                            "glob, or wikitext from the hub)")
        return _recall_windows(options, model.l2a_config, limit)
    if model.tokenizer is None:
        raise UserError(f"{options.source} has no tokenizer, so {flag} cannot be read with it")
    context = options.context or min(context, limit)
    if context > limit:
        raise UserError(f"--context {context} is longer than max_positions x factor = {limit} of {options.source}")
    text = texts.read_text(entry, flag)
    ids = texts.tokenise(text, model.tokenizer, model.config.vocab_size)
    about = {"name": text.name, "rule": text.rule, "files": text.files}
    return text_windows(ids, context, options.stride or context, about, options.max_windows)


def _recall_windows(options: Any, layer: L2AConfig | None, limit: int) -> Windows:
    distance = max(24, 0 if layer is None else layer.window + layer.sinks + 1)
    length = max(options.context or RECALL_LENGTH, 2 * distance + 64)
    if length > limit:
        raise UserError(f"without --text this model is scored on the synthetic recall corpus, which needs rows of "
                        f"{length} tokens for a window of {layer.window}, more than its {limit} positions; give "
                        "a smaller --window, or --text")
    log.info("no --text: scored on held-out rows of the synthetic recall corpus, which this model's tokenizer speaks")
    rows = options.max_windows or RECALL_ROWS
    corpus = RecallCorpus(length, rows, distance=distance)
    about = {"name": "synthetic recall corpus, held out", "rule": corpus.fingerprint, "files": {}}
    return batch_windows(list(corpus.held_out(1)), about, needs_memory)
