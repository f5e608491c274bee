"""The canary: the kernels live as long as JAX has Pallas's Triton lowering, and go through one door to it."""

from __future__ import annotations

import ast
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest

import l2a_jax
from l2a_jax import attention
from l2a_jax.attention import api
from l2a_jax.attention.kernels import launch
from l2a_jax.research.speed.compiled import lower_for_cuda, triton_kernels

PACKAGE = pathlib.Path(l2a_jax.__file__).parent
CALL = api.Call("full", 1, 64, 2, 2, 64, "bfloat16")


def why_lost() -> str | None:
    """A sentence where the installed JAX does not lower the smallest kernel for CUDA any more, else None."""

    def copy(source, target):
        target[0] = source[0]

    if launch.lost():
        return launch.lost()
    number = jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        kernels = triton_kernels(lower_for_cuda(launch.launch(copy, "canary", number, (1,), warps=1), number))
        assert [kernel["name"] for kernel in kernels] == ["canary"]
    except Exception as error:  # however it is gone
        launch.plt = None
        return f"{launch.lost()} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return None


def test_the_installed_jax_has_the_triton_lowering():
    reason = why_lost()
    assert reason is None, reason


@pytest.mark.parametrize("gone", ["the module", "its parameters", "the lowering"])
def test_its_loss_is_one_sentence(monkeypatch, gone):
    def unknown(*args, **options):
        raise NotImplementedError("Cannot lower pallas_call on platform: cuda.")

    monkeypatch.setattr(launch, "plt", {"the module": None, "its parameters": object()}.get(gone, launch.plt))
    if gone == "the lowering":
        monkeypatch.setattr(launch.pl, "pallas_call", unknown)
    assert why_lost().startswith(f"jax {jax.__version__} has lost the Triton lowering of Pallas, which the kernels are "
                                 "written for: install an older jax, or port attention/kernels to a lowering that it")
    assert len(why_lost().splitlines()) == 1


def test_without_it_calls_go_to_xla(monkeypatch):
    monkeypatch.setattr(launch, "plt", None)
    monkeypatch.setattr("l2a_jax.attention.pallas.machine_why_not", lambda: None)
    for backend in ("pallas", "pallas_interpret"):
        assert "has lost the Triton lowering" in api.why_not(backend, CALL)
    assert api.choose(dataclasses.replace(CALL, operation="decode"), "auto", "gpu") == "xla"
    monkeypatch.setattr(launch.device, "capability", lambda: 9.0)
    assert launch.on_gpu(lambda x: 1 / 0, lambda x: x + 1, 1) == 2
    q = jnp.ones((1, 4, 2, 16))
    assert attention.full(q, q, q, backend="xla").shape == q.shape


def test_kernels_go_through_one_door():
    """Nothing else imports Pallas, and nothing else launches."""
    for path in PACKAGE.rglob("*.py"):
        if path.name == "launch.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = {getattr(node, "module", None) or "", *(alias.name for alias in getattr(node, "names", ())
                                                            if isinstance(alias, ast.alias))}
            assert not any(name.startswith("jax.experimental") or name == "pallas_call" for name in names), path
            assert getattr(node, "attr", None) not in ("pallas_call", "CompilerParams"), path
