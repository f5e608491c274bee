"""Tokens dealt in stripes: every token once, in true order again when joined, and gradients of whom they belong to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.attention.kernels import blocks
from l2a_jax.sharding import stripes
from l2a_jax.sharding.mesh import axes_of


@pytest.mark.parametrize(("length", "shards", "size"), [(131_072, 4, 128), (512, 8, 64), (24, 8, 1), (12, 3, 4),
                                                        (7, 1, 1)])
def test_every_token_belongs_to_one_shard(length, shards, size):
    assert stripes.stripe(length, shards) == size
    dealt = np.stack([stripes.places(length, shards, shard) for shard in range(shards)])
    assert (np.diff(dealt, axis=1) > 0).all() and (dealt // size % shards == np.arange(shards)[:, None]).all()
    np.testing.assert_array_equal(np.sort(dealt.reshape(-1)), np.arange(length))


def test_a_stripe_is_whole_blocks_of_every_kernel():
    rows = {block.rows for of in blocks._HALF.values() for block in of}
    assert max(rows) == stripes.LARGEST and all(stripes.LARGEST % count == 0 for count in rows)


def test_shards_that_do_not_divide_the_tokens_are_refused():
    with pytest.raises(ValueError, match="10 tokens cannot be dealt over 4 shards"):
        stripes.stripe(10, 4)


def test_a_mesh_of_other_axes_is_refused():
    assert axes_of(None) == (1, 1)
    with pytest.raises(ValueError, match=r"axes \('data',\); expected \('data', 'context'\)"):
        axes_of(jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",)))


def test_what_is_dealt_is_joined_in_true_order():
    """`vmap` names an axis as well as a mesh does."""
    whole = jax.random.normal(jax.random.key(0), (2, 24, 3))

    def over(f):
        return jax.vmap(lambda _: f(), axis_name="context", axis_size=4)(jnp.zeros(4))

    parts = over(lambda: stripes.dealt(whole, "context"))
    np.testing.assert_array_equal(parts[1], whole[:, stripes.places(24, 4, 1)])
    joined, pull = jax.vjp(jax.vmap(lambda part: stripes.joined(part, "context"), axis_name="context"), parts)
    np.testing.assert_array_equal(joined, jnp.broadcast_to(whole, joined.shape))
    weights = jnp.arange(1.0, 5)[:, None, None, None]
    np.testing.assert_allclose(pull(weights * joined)[0], 10 * parts, rtol=1e-6)
