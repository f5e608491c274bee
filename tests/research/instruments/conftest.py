"""The packaged model, plain and with untrained layers on it, and held-out rows of the corpus it knows: few shapes."""

import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.config import L2AConfig
from l2a_jax.data.recall import RecallCorpus, needs_memory
from l2a_jax.evaluation import perplexity
from l2a_jax.models.params import add_routing
from l2a_jax.sources import TINY, load_pretrained

SHARED = L2AConfig(window=12, sinks=2)


@pytest.fixture(scope="session")
def plain():
    return load_pretrained(TINY, jnp.float32)


@pytest.fixture(scope="session")
def with_layer(plain):
    """The packaged model with an untrained layer on it."""
    return lambda layer=SHARED: plain._replace(l2a_config=layer, params=add_routing(plain.params, plain.config, layer))


@pytest.fixture(scope="session")
def windows():
    return perplexity.batch_windows(list(RecallCorpus(128, 8).held_out(1)), {"name": "recall corpus"}, needs_memory)


@pytest.fixture(scope="session")
def needed(windows):
    """What a router that knows would decide: exactly the tokens that need memory are routed, in every layer."""
    return np.broadcast_to(needs_memory(windows.tokens), (3, *windows.tokens.shape))
