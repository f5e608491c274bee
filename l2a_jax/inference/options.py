"""What a continuation can be asked: every flag of `eval/generate.py`. Free of JAX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from l2a_jax.attention.backends import Backend
from l2a_jax.config import L2AConfig, Sinks, Window
from l2a_jax.errors import UserError
from l2a_jax.fields import SEED, Choice, Filled, Mark, Unit, above, at_least, count, length
from l2a_jax.training.settings import Source


@dataclass(frozen=True)
class Sampling:
    """Sampling. Both numbers are rounded to float32."""

    max_new_tokens: Annotated[int, length(), Unit("tokens"), "tokens to write at most"] = 128
    temperature: Annotated[float, at_least(0), "0: the likeliest token"] = 0.0
    top_p: Annotated[float, above(0, 1, "a share of probability"), Unit("share"),
                     "draw from the likeliest tokens of this probability"] = 1.0
    route_last: Annotated[int | None, count(0), Unit("tokens"), "so many at the prompt's end (its question), and all "
                          "that is written, see everything (default: what the router says)"] = None
    backend: Backend = "auto"


def check_route_last(tokens: int | None, layer: L2AConfig | None, asked: str = "route_last",
                     model: str = "the model") -> None:
    """UserError, beginning with the flag or argument that `asked`, where a plain model is to route the last `tokens`
    of its prompts."""
    if tokens is not None and layer is None:
        raise UserError(f"{asked} is {tokens}, but {model} is plain: all its tokens see everything")


@dataclass(frozen=True)
class Asked(Sampling):
    """Model and device."""

    window: Annotated[Window | None, "on a plain model: an untrained router (all routed), this window"] = None
    sinks: Annotated[Sinks | None, "the same, with this many first keys always seen"] = None
    dtype: Annotated[str | None, Choice("bfloat16", "float16", "float32"),
                     "of weights and cache (default: bfloat16; on a CPU float32)"] = None
    seed: Annotated[int, SEED, "of what is drawn"] = 0


@dataclass(frozen=True, kw_only=True)
class Continuation(Asked):
    """Text. One of --prompt and --prompt-file is needed."""

    source: Annotated[Source, Mark.POSITIONAL]
    prompt: Annotated[str | None, Unit("text"), "the text to continue"] = None
    prompt_file: Annotated[Path | None, "a UTF-8 file with it"] = None
    prune_layers: Annotated[str | None, Filled(), Unit("layers"),
                            "layers without global attention, such as 3,5-8"] = None
    colour: Annotated[bool, "on a terminal: the more layers routed a token, the warmer; plain text elsewhere"] = False
