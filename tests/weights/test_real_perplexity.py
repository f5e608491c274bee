"""The fifteen perplexities of real Qwen2.5-Coder-0.5B before any training, measured once with an independent PyTorch
implementation (float32, first 2,048 tokens of WikiText-2 test, raw, as 2 rows of 1,024)."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.config import L2AConfig, RopeScaling
from l2a_jax.models.params import add_routing
from l2a_jax.models.transformer import forward
from l2a_jax.sources import load_pretrained

pytestmark = pytest.mark.weights

ROWS, LENGTH = 2, 1_024
STRETCHED = RopeScaling("theta", 5.0)
NOTHING, FIFTH, EVERYTHING = "nothing", "one in five", "everything"

# (topology, window, sinks, base stretched by 5, what is routed, perplexity); topology None is the plain model.
MEASURED = [
    (None, 0, 0, False, None, 28.77),
    (None, 0, 0, True, None, 28.43),
    ("sequential", 256, 0, True, NOTHING, 116.2),
    ("sequential", 256, 0, False, NOTHING, 107.0),
    ("sequential", 256, 0, True, FIFTH, 147.5),
    ("sequential", 256, 0, True, EVERYTHING, 4473.0),
    ("parallel", 256, 0, True, FIFTH, 75.3),
    ("parallel", 256, 0, True, EVERYTHING, 28.43),
    ("sequential", 256, 4, True, NOTHING, 43.73),
    ("sequential", 256, 4, False, NOTHING, 43.78),
    ("sequential", 256, 1, False, NOTHING, 43.61),
    ("sequential", 256, 4, True, FIFTH, 55.07),
    ("parallel", 256, 4, True, FIFTH, 41.47),
    ("sequential", 64, 0, False, NOTHING, 320.7),
    ("sequential", 64, 4, False, NOTHING, 59.6),
]


@pytest.fixture(scope="module")
def model():
    return load_pretrained(os.environ["L2A_TEST_GGUF"], jnp.float32)


@pytest.fixture(scope="module")
def tokens(model):
    with (Path(os.environ["L2A_TEST_DATA"]) / "wikitext2_test.raw.txt").open(encoding="utf-8", newline="") as file:
        ids = model.tokenizer.encode(file.read(40_000))
    return jnp.asarray(ids[: ROWS * LENGTH], jnp.int32).reshape(ROWS, LENGTH)


def routed(what: str, layers: int) -> jax.Array:
    """Forced decisions [L, B, T]: positions 0, 5, 10, ... for one in five."""
    row = {NOTHING: jnp.zeros(LENGTH, bool), FIFTH: jnp.arange(LENGTH) % 5 == 0, EVERYTHING: jnp.ones(LENGTH, bool)}
    return jnp.broadcast_to(row[what], (layers, ROWS, LENGTH))


def perplexity(logits: jax.Array, tokens: jax.Array) -> float:
    losses = [
        -jnp.take_along_axis(jax.nn.log_softmax(row[:-1]), ids[1:, None], axis=-1)
        for row, ids in zip(logits, tokens, strict=True)
    ]
    return float(np.exp(np.mean(np.asarray(losses, np.float64))))


@pytest.mark.parametrize(("topology", "window", "sinks", "stretched", "what", "expected"), MEASURED)
def test_perplexity(model, tokens, topology, window, sinks, stretched, what, expected):
    rope = STRETCHED if stretched else RopeScaling()
    params, config, l2a_config, decisions = model.params, model.config, None, None
    with jax.default_matmul_precision("float32"):
        if topology is None:
            config = dataclasses.replace(config, rope=rope)
        else:
            l2a_config = L2AConfig(window=window, sinks=sinks, topology=topology, share_attention=False, rope=rope)
            params = add_routing(params, config, l2a_config)
            decisions = routed(what, config.num_layers)
        logits = forward(params, tokens, config, l2a_config, decisions=decisions).logits
    found = perplexity(logits, tokens)
    print(f"{topology} window {window} sinks {sinks} theta x{rope.factor:g} {what}: {found:.4g} against {expected:g}")
    assert found == pytest.approx(expected, rel=5e-3)
