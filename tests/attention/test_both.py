"""Mixed rows with their contrast: the composition of full and local, forward and backward, on every backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case

from l2a_jax import attention
from l2a_jax.attention import reference
from l2a_jax.attention.kernels import split

_packed = ((30, 1, 25), (3, 3, 3, 60))
SMALL = (
    Case("both", rate=0.4, window=6, sinks=3, packing=_packed, heads=7, kv_heads=1),
    Case("both", rate="uneven", window=17, batch=3),
    Case("both", rate=0.3, window=100),
    Case("both", rate=0.4, window=9, sinks=2, width=16, heads=2, kv_heads=1, places="random"),
)
LONG = (
    Case("both", length=1_100, heads=14, kv_heads=2, rate=0.2, window=200, sinks=4),
    Case("both", length=1_100, heads=6, kv_heads=2, width=128, rate="uneven", window=64, sinks=4,
         packing=((700, 400), (20, 1_000))),
)


def composed(q, k, v, decisions, *, window, sinks=0, **call):
    far = reference.full(q, k, v, **call)
    near = reference.local(q, k, v, window=window, sinks=sinks, **call)
    return jnp.where(decisions[:, :, None, None], far, near), jax.lax.stop_gradient(far - near)


@pytest.mark.parametrize("backend, case, dtype, tolerance", [
    *(("xla", case, jnp.float32, 3e-6) for case in SMALL[:1]),
    *(("pallas_interpret", case, jnp.float32, 3e-6) for case in (SMALL[0], *SMALL[2:])),
    *(pytest.param("pallas", case, dtype, tolerance, marks=pytest.mark.gpu, id=f"pallas-{case}-{tolerance}")
      for case in SMALL + LONG for dtype, tolerance in ((jnp.float32, 3e-6), (jnp.bfloat16, 1e-2))),
], ids=str)
def test_both_is_full_and_local_and_the_choice_between_them(backend, case, dtype, tolerance, monkeypatch):
    if jax.default_backend() != "gpu":
        monkeypatch.setattr(split, "PROGRAMS", 48)
    q, k, v, cotangent, options = case.inputs(dtype=dtype)
    other = jnp.flip(cotangent, 1)  # a cotangent for the contrast, which must not matter

    def run(function, *arrays):
        @jax.jit
        def both(q, k, v, cotangent, other):
            out, pull = jax.vjp(lambda q, k, v: function(q, k, v, **options), q, k, v)
            return (*out, *pull((cotangent, other)))

        return [np.asarray(x, np.float64) for x in both(*arrays)]

    arrays = (q, k, v, cotangent, other)
    actual = run(lambda q, k, v, **o: attention.both(q, k, v, backend=backend, **o), *arrays)
    expected = run(composed, *(x.astype(jnp.float32) for x in arrays))
    scale = 0.1 * np.linalg.norm(expected[0])
    for name, one, exact in zip(("rows", "contrast", "dq", "dk", "dv"), actual, expected, strict=True):
        assert np.isfinite(one).all(), name
        assert np.linalg.norm(one - exact) < tolerance * max(np.linalg.norm(exact), scale), name
