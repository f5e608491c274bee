"""One oracle for generation: the whole sequence through `forward`, at one padded length, so that it compiles once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from l2a_jax.models.transformer import forward
from tests.models.cases import CONFIG

LENGTH = 48
# Each program runs once or twice: compiling it well would take most of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
QUICK = QUICK if jax.default_backend() == "cpu" else None


@functools.partial(jax.jit, static_argnums=(2, 3), compiler_options=QUICK)
def _forward(params, tokens, config, layer, segment_ids, decisions, heads):
    out = forward(params, tokens, config, layer, segment_ids=segment_ids, decisions=decisions, heads=heads,
                  backend="reference")
    return jax.nn.log_softmax(out.logits), out.routing


def whole(params, sequences, layer, decisions=None, config=CONFIG, heads=None):
    """Log-probabilities [B, 48, V] and routing of whole sequences, given as lists of tokens."""
    tokens, ids = np.zeros((len(sequences), LENGTH), np.int32), np.zeros((len(sequences), LENGTH), np.int32)
    for row, (sequence, segment) in enumerate(zip(tokens, ids, strict=True)):
        sequence[: len(sequences[row])] = sequences[row]
        segment[: len(sequences[row])] = 1
    if decisions is not None:
        decisions = jnp.pad(decisions, ((0, 0), (0, 0), (0, LENGTH - decisions.shape[2])))
    return _forward(params, tokens, config, layer, ids, decisions, heads)


def sequences_of(prompts, generation):
    """Prompt and continuation of each row."""
    return [[*prompt, *np.asarray(tokens)[:length].tolist()]
            for prompt, tokens, length in zip(prompts, generation.tokens, generation.lengths, strict=True)]
