"""One semantics, many backends: the public face of attention.

A backend is a module with `local`, `routed`, `mixed` and `full` (and `both` where it has a better way), and a
`why_not(call)` that says why it cannot serve a call (None: it can). `backend="auto"` takes the first
of the device's list that can, and says once per kind of call, in the log, which one that was; a backend that was asked
for by name and cannot serve the call raises Unsupported with its reason. Nothing ever falls back silently. What a
backend needs of the machine itself is its `machine_why_not()`, which commands ask before anything else (`check`).
"""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from l2a_jax import device
from l2a_jax.attention.backends import CHOICES, check_name
from l2a_jax.attention.reference import Heads, Ids, Keys, PerRow, Places
from l2a_jax.errors import Unsupported

AnyPlaces = Int[Array, "B Q"] | Int[Array, " Q"] | None
log = logging.getLogger("l2a_jax.attention")

# What `auto` tries, in order, by platform. The reference is last: it is exact, and needs O(T^2) memory.
AUTO = {"gpu": ("pallas", "cudnn", "xla"), "cpu": ("xla", "reference")}


@dataclass(frozen=True)
class Call:
    """What a backend needs to know to accept or decline: the operation, the shapes, and which options are in use.

    The operation is a function of this module, or "decode" (`attention.decode`), of which `length` counts the slots;
    else it counts the keys.
    """

    operation: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    dtype: str
    window: int | None = None
    sinks: int = 0
    segmented: bool = False
    placed: bool = False  # queries are a part of the tokens


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"l2a_jax.attention.{name}")


def why_not(backend: str, call: Call) -> str | None:
    """The reasons why `backend` cannot serve `call`, or None. UserError where there is no such backend."""
    check_name(backend)
    reasons = _machine_why_not(backend), getattr(_module(backend), "why_not", lambda call: None)(call)
    return "; ".join(filter(None, reasons)) or None


def check(backend: str, flag: str = "--backend") -> None:
    """UserError where there is no such backend, Unsupported where this machine lacks what it needs of any call."""
    check_name(backend, flag, CHOICES)
    reason = None if backend == "auto" else _machine_why_not(backend)
    if reason is not None:
        raise Unsupported(f"{flag} {backend} cannot be used on this machine: {reason}")


def _machine_why_not(backend: str) -> str | None:
    return getattr(_module(backend), "machine_why_not", lambda: None)()


def _order(call: Call, platform: str) -> tuple[str, ...]:
    """The device's list, with cuDNN first where it measured faster than our kernels on a Hopper GPU with the backward
    pass (eval/results/speed.md, speed_windows.md): dense calls, and windows of 2,048 keys and more, at head width 128
    of 1,024. Elsewhere ours are ahead, or alone."""
    order = AUTO.get(platform, ("xla", "reference"))
    wide = (call.window or 0) >= (1_024 if call.width == 128 else 2_048)
    faster = call.operation == "full" or (call.operation == "local" and wide)
    if platform == "gpu" and faster and 9 <= device.capability(absent=0.0) < 12:
        return ("cudnn", *(name for name in order if name != "cudnn"))
    return order


@functools.cache
def choose(call: Call, backend: str, platform: str) -> str:
    """The backend that serves `call`: the one named, or the first that can. Logged once per kind of call."""
    if backend != "auto":
        reason = why_not(backend, call)
        if reason is not None:
            raise Unsupported(f"attention backend {backend!r} cannot serve {call}: {reason}")
        return backend
    reasons = []
    for name in _order(call, platform):
        reason = why_not(name, call)
        if reason is None:
            said = f"; passed over: {'; '.join(reasons)}" if reasons else ""
            log.info("attention.%s T=%d %s on %s: backend %s%s", call.operation, call.length, call.dtype, platform,
                     name, said)
            return name
        reasons.append(f"{name} ({reason})")
    raise Unsupported(f"no attention backend can serve {call} on {platform}: {'; '.join(reasons)}")


def _dispatch(operation, backend, q, k, v, *args, segment_ids, places, **options):
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"attention takes q [B,Q,N,H] and k, v [B,T,K,H]; got {q.shape}, {k.shape}, {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in B and H, and N must be a multiple of K")
    if places is None and q.shape[1] != k.shape[1]:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in T, or places must say whose queries these are")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.size or not k.size:
        raise ValueError(f"attention of nothing: q is {q.shape}, k {k.shape}")
    if options.get("window", 1) < 1 or options.get("sinks", 0) < 0:
        raise ValueError(f"window must be at least 1 and sinks at least 0; got {options}")
    rows, tokens = q.shape[:2], k.shape[:2]
    for name, value, shape in (("segment_ids", segment_ids, tokens), *(("decisions", a, rows) for a in args)):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} is {value.shape}; expected {shape}, one for each of the "
                             f"{'keys' if name == 'segment_ids' else 'queries'}")
    call = Call(operation, *tokens, q.shape[2], k.shape[2], q.shape[3], jnp.dtype(q.dtype).name,
                options.get("window"), options.get("sinks", 0), segment_ids is not None, places is not None)
    name = choose(call, backend, device.platform())
    if places is not None:
        options["places"] = _checked(places, rows, tokens[1])
    with jax.named_scope(f"attention_{operation}"):
        function = getattr(_module(name), operation, None) or functools.partial(_both, _module(name))
        return function(q, k, v, *args, segment_ids=segment_ids, **options)


def _checked(places: Int[Array, "*B Q"], shape: tuple[int, int], length: int) -> Places:
    """Places of every sequence; their order is checked where it is known."""
    if places.shape not in (shape, shape[1:]):
        raise ValueError(f"places is {places.shape}; expected [B, Q] = {shape} or [Q]")
    if not isinstance(places, jax.core.Tracer):
        known = np.asarray(places)
        if (np.diff(known) <= 0).any() or known.min() < 0 or known.max() >= length:
            raise ValueError(f"places must be strictly ascending numbers of the {length} tokens")
    return jnp.broadcast_to(places, shape).astype(jnp.int32)


def _both(module, q, k, v, decisions, *, window, sinks, **call):
    """`both` from a backend's `full` and `local`."""
    far = module.full(q, k, v, **call)
    near = module.local(q, k, v, window=window, sinks=sinks, **call)
    return jnp.where(decisions[:, :, None, None], far, near), jax.lax.stop_gradient(far - near)


def local(q: Heads, k: Keys, v: Keys, *, window: int, sinks: int = 0, segment_ids: Ids | None = None,
          places: AnyPlaces = None, backend: str = "auto") -> Heads:
    """Causal attention over `window` keys including the token itself, plus the first `sinks` keys.

    q, k, v: one float dtype, which is the output's too. `window`, `sinks`: keys. `segment_ids`: see `reference`.
    `places` [B, Q] or [Q]: where queries are a part of the T tokens, the numbers of theirs, strictly ascending; None:
    Q = T and row r is token r. Gradients of k and v are these rows' part then.
    Raises ValueError on shapes that do not fit, Unsupported where the named backend cannot serve the call.
    """
    return _dispatch("local", backend, q, k, v, segment_ids=segment_ids, places=places, window=window, sinks=sinks)


def local_with_lse(q: Heads, k: Keys, v: Keys, *, window: int, sinks: int = 0, segment_ids: Ids | None = None,
                   places: AnyPlaces = None, backend: str = "auto") -> tuple[Heads, Float[Array, "B Q N"]]:
    """`local`, and beside it the log-sum-exp, in nats, of the scaled scores that each row and head sees; padding rows
    have any number. No gradient flows through the latter."""
    return _dispatch("local_with_lse", backend, q, k, v, segment_ids=segment_ids, places=places, window=window,
                     sinks=sinks)


def routed(q: Heads, k: Keys, v: Keys, decisions: PerRow, *, segment_ids: Ids | None = None,
           places: AnyPlaces = None, backend: str = "auto") -> Heads:
    """Full causal attention for rows whose decision is True; every other row is exactly 0, and costs nothing.

    Keys and values exist for every token. No gradient flows to `decisions` here (see `l2a_jax.nn.routing`).
    """
    return _dispatch("routed", backend, q, k, v, decisions.astype(bool), segment_ids=segment_ids, places=places)


def mixed(q: Heads, k: Keys, v: Keys, decisions: PerRow, *, window: int, sinks: int = 0, segment_ids: Ids | None = None,
          places: AnyPlaces = None, backend: str = "auto") -> Heads:
    """One pass in which each row sees everything (decision True) or its window and sinks (False).

    For inference and frozen decisions with shared attention; learning a decision needs both outputs of a row.
    """
    return _dispatch("mixed", backend, q, k, v, decisions.astype(bool), segment_ids=segment_ids, places=places,
                     window=window, sinks=sinks)


def both(q: Heads, k: Keys, v: Keys, decisions: PerRow, *, window: int, sinks: int = 0, segment_ids: Ids | None = None,
         places: AnyPlaces = None, backend: str = "auto") -> tuple[Heads, Heads]:
    """`mixed`, and beside it what each decision changes: `full` - `local`, for every row.

    For learning decisions with shared attention, where a decision's gradient is <g, full - local>. Both are computed
    forward for every row; backward a row's work is done once, as in `mixed`, since the path that a row did not take
    gives nothing to q, k and v. No gradient flows through the difference.
    """
    return _dispatch("both", backend, q, k, v, decisions.astype(bool), segment_ids=segment_ids, places=places,
                     window=window, sinks=sinks)


def full(q: Heads, k: Keys, v: Keys, *, segment_ids: Ids | None = None, places: AnyPlaces = None,
         backend: str = "auto") -> Heads:
    """Causal attention over everything in the row's own document."""
    return _dispatch("full", backend, q, k, v, segment_ids=segment_ids, places=places)
