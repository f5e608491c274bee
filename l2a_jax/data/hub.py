"""Data sets of the Hugging Face hub as a stream of records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from l2a_jax.data.recipes import Hub
from l2a_jax.errors import UserError, needs

SECONDS = 15
"""Patience for the first answer: `datasets` itself retries for half a minute where there is no network."""


def hub_records(hub: Hub, instead: str) -> Iterator[tuple[str, Mapping]]:
    """(place, record) in the data set's order, at its present revision.

    Raises:
        UserError: `datasets` is missing, or the hub cannot be reached; `instead` says what else to give.
    """
    datasets = needs("datasets", "data", f"{hub.path}: reading from the Hugging Face hub",
                     f". Or give local files: {instead}")
    import huggingface_hub

    try:
        revision = huggingface_hub.HfApi().dataset_info(hub.path, timeout=SECONDS).sha
        rows = datasets.load_dataset(hub.path, hub.config, split=hub.split, streaming=True, revision=revision)
        for number, record in enumerate(rows):
            yield f"{hub.path}, row {number}", record
    except Exception as error:  # a network fails in more ways than any list: each HTTP library has its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{hub.path} cannot be read from the Hugging Face hub ({type(error).__name__}: {reason}). "
                        f"Without a network give local files: {instead}") from error  # fmt: skip
