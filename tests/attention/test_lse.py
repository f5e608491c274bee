"""Local attention with its log-sum-exp: the values, the gradients of local attention alone, on every backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PLACED, Case, compiled

from l2a_jax import attention
from l2a_jax.attention import api, reference
from l2a_jax.attention.kernels import split

PACKED = Case("local", window=9, sinks=4, packing=((30, 1, 25), (3, 3, 3, 60)))
WIDE = Case("local", window=100)


@pytest.mark.parametrize("backend, case", [
    ("reference", PACKED), ("xla", PACKED), ("xla_chunked", PACKED), ("pallas_interpret", PACKED), ("xla", WIDE),
    ("xla_chunked", PLACED[3]),
    *(pytest.param("pallas", case, marks=pytest.mark.gpu) for case in (PACKED, WIDE, PLACED[3])),
], ids=str, indirect=("backend",))
def test_the_log_sum_exp_of_what_local_attention_sees(backend, case, monkeypatch):
    if jax.default_backend() != "gpu":
        monkeypatch.setattr(split, "PROGRAMS", 48)
    q, k, v, cotangent, options = case.inputs()

    @jax.jit
    def run(q, k, v):
        (out, lse), pull = jax.vjp(lambda *x: attention.local_with_lse(*x, backend=backend, **options), q, k, v)
        return lse, out, *pull((cotangent, jnp.ones_like(lse)))

    lse, *rest = run(q, k, v)
    mask = reference.local_mask(options.get("segment_ids"), k.shape[:2], window=case.window, sinks=case.sinks)
    mask = np.asarray(reference.at_places(mask, options.get("places")))
    q64, k64 = (np.asarray(x, np.float64) for x in (q, np.repeat(k, q.shape[2] // k.shape[2], axis=2)))
    weights = np.exp(np.einsum("btnh,bsnh->btns", q64, k64) / case.width**0.5) * mask[:, :, None]
    alive = mask.any(-1)
    np.testing.assert_allclose(lse[alive], np.log(weights[alive].sum(-1)), atol=3e-5)
    assert np.isfinite(lse).all()
    for mine, alone in zip(rest, compiled(case, backend, options)(q, k, v, cotangent), strict=True):
        np.testing.assert_allclose(mine, alone, atol=1e-5)


def test_a_backend_that_keeps_it_to_itself_is_passed_over():
    call = api.Call("local_with_lse", 1, 64, 4, 2, 64, "bfloat16", 16)
    assert "log-sum-exp" in api.why_not("cudnn", call)
