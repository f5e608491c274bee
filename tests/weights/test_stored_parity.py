"""Every shape of the family against stored logits of transformers: no torch needed."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_qwen import FAMILIES, TOKENS, write_folder

from l2a_jax.models.transformer import forward
from l2a_jax.sources import load_pretrained

STORED = np.load(Path(__file__).with_name("reference_logits.npz"))
KEPT = slice(3, None, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path, family):
    model = load_pretrained(write_folder(tmp_path, FAMILIES[family]), jnp.float32)
    with jax.default_matmul_precision("float32"):
        logits = forward(model.params, jnp.asarray(TOKENS), model.config).logits
    np.testing.assert_allclose(logits[:, KEPT], STORED[family], atol=1e-4, rtol=0)
    assert np.abs(STORED[family]).max() > 1, "the reference must be far from zero to mean anything"


def test_every_family_is_stored():
    assert set(STORED.files) == {*FAMILIES, "transformers_version"}
