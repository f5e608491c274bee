"""Speed of attention beside every peer that is installed, in one run: JSON, and a markdown table.

Ours: the Pallas kernels. Peers: cuDNN through JAX, tokamax, PyTorch's SDPA and compiled flex_attention; routed and
mixed calls, which no peer has, stand beside dense attention over the same length.
"""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from l2a_jax import attention
from l2a_jax.research import tables
from l2a_jax.research.speed.attention_peers import torch_peers
from l2a_jax.research.speed.cases import SpeedCase
from l2a_jax.research.speed.timing import compile_jax, matmul_ceiling, time_compiled

log = logging.getLogger("l2a_jax.speed")
PASSES = ("fwd", "fwd+bwd")


def ours(case: SpeedCase, backend: str):
    """f(q, k, v, decisions) for one of our backends."""

    def call(q, k, v, decisions):
        if case.operation == "routed":
            return attention.routed(q, k, v, decisions, backend=backend)
        if case.operation == "mixed":
            return attention.mixed(q, k, v, decisions, window=case.window, backend=backend)
        if case.operation == "local":
            return attention.local(q, k, v, window=case.window, backend=backend)
        return attention.full(q, k, v, backend=backend)

    return call


def jax_peers(case: SpeedCase) -> dict:
    """name -> f(q, k, v, decisions) for the JAX libraries at hand. Beside a routed or mixed call they are dense."""
    if case.rate is not None:
        case = replace(case, operation="full", window=None, rate=None)
    window = None if case.window is None else (case.window - 1, 0)
    peers = {"cuDNN": ours(case, "cudnn")}
    try:
        import tokamax
    except ImportError:
        return peers

    def peer(implementation):
        return lambda q, k, v, _: tokamax.dot_product_attention(q, k, v, is_causal=True, local_window_size=window,
                                                                implementation=implementation)

    return {**peers, **{f"tokamax {name}": peer(name) for name in ("mosaic", "triton")}}


class Prepared:
    """A case with its inputs, and every JAX function of it compiled."""

    def __init__(self, case: SpeedCase):
        self.sets = case.inputs(case.sets)
        self.forward_sets = [(q, k, v, decisions) for q, k, v, _, decisions in self.sets]
        functions = {"l2a_jax": ours(case, "pallas"), **jax_peers(case)}
        with ThreadPoolExecutor() as pool:
            self.jobs = {name: (pool.submit(compile_jax, function, self.forward_sets),
                                pool.submit(compile_jax, _with_backward(function), self.sets))
                         for name, function in functions.items()}

    def time(self) -> tuple[dict[str, list[float]], dict[str, str]]:
        """({name: [fwd, fwd+bwd] in ms}, {name: why it failed})."""
        times, failed = {}, {}
        for name, (forward, both) in self.jobs.items():
            try:
                times[name] = [time_compiled(forward.result(), self.forward_sets),
                               time_compiled(both.result(), self.sets)]
            except Exception as error:
                if name == "l2a_jax":
                    raise
                failed[name] = tables.reason(error)
        return times, failed


def _with_backward(function):
    def both(q, k, v, cotangent, decisions):
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, decisions), q, k, v)
        return out, pull(cotangent)

    return both


def measure(case: SpeedCase, with_torch: bool = True) -> dict:
    """What the tables say of one case, peers of PyTorch included."""
    times, failed = Prepared(case).time()
    peers, why = {}, {}
    if with_torch:
        try:
            peers, why = torch_peers(case)
        except ImportError:
            why = {"torch": "not installed"}
    return _entry(case, {**times, **peers}, {**failed, **why})


def measure_in_turn(cases: list[SpeedCase], rounds: int = 5) -> list[dict]:
    """The same of several cases that are to be compared with each other: all are compiled first, then timed one after
    the other in `rounds` rounds, and the median of each is taken, so that a warming card favours none."""
    prepared = [Prepared(case) for case in cases]
    timed = []
    for number in range(rounds):
        timed.append([one.time() for one in prepared])
        log.info("round %d of %d", number + 1, rounds)
    found = []
    for case, *turns in zip(cases, *timed, strict=True):
        times = [ms for ms, _ in turns]
        always = [name for name in times[0] if all(name in ms for ms in times)]
        failed = {name: why for _, failures in turns for name, why in failures.items()}
        found.append(_entry(case, {name: np.median([ms[name] for ms in times], axis=0).tolist() for name in always},
                            failed))
    return found


def _entry(case, ms, failed) -> dict:
    """{"case", "teraflops", "ms": {name: [fwd, fwd+bwd]}, "failed": {name: why}, "authors": as they reported}."""
    return {"case": case.name, "authors": case.authors, "ms": ms,
            "teraflops": [case.teraflops(False), case.teraflops(True)], "failed": failed}


def markdown(result: dict) -> str:
    """The result as a short table."""
    ceiling = result["matmul_teraflops_per_second"]
    rows = []
    for entry in result["cases"]:
        for i, which in enumerate(PASSES):
            own = entry["ms"]["l2a_jax"][i]
            peers = {name: ms[i] for name, ms in entry["ms"].items() if name != "l2a_jax" and ms[i] is not None}
            listed = ", ".join(f"{name} {ms:.3g}" for name, ms in sorted(peers.items(), key=lambda item: item[1]))
            ratio = f"{own / min(peers.values()):.2f}" if peers else ""
            rate = entry["teraflops"][i] / own * 1e3
            authors = "" if entry["authors"][i] is None else f"{entry['authors'][i]:g}"
            rows.append([entry["case"], which, f"**{own:.3g}**", listed, ratio, authors, f"{rate:.0f}",
                         f"{rate / ceiling:.0%}"])
    failures = sorted({f"- not measured, {name}: {why}" for entry in result["cases"]
                       for name, why in entry["failed"].items()})
    return "\n".join([
        "# Speed of attention", "",
        f"{tables.said(result)} Medians in ms, bfloat16; random inputs, several sets in turn. Matrix "
        f"product 8,192^3 bfloat16: {ceiling:.0f} TFLOP/s, the ceiling of the last column. Operations are counted for "
        "visible pairs only, a backward pass as 2.5 forward passes. Beside routed and mixed calls the peers compute "
        "dense attention; *authors* is the L2A release's kernel as measured before on an H100, not in this run.", "",
        *tables.grid(["case", "pass", "l2a_jax", "peers", "ratio to the best peer", "authors", "TFLOP/s", "of ceiling"],
                     rows), *failures]).rstrip() + "\n"


def main(cases: list[SpeedCase], only: str, out: Path | None, name: str, with_torch: bool, in_turn: bool) -> None:
    """Measure the cases in whose name `only` is found, print the table, and write NAME.json and NAME.md to `out`, after
    every case. `in_turn`: by `measure_in_turn`, all at once."""
    result = {**tables.heading(), "matmul_teraflops_per_second": matmul_ceiling(), "cases": []}
    cases = tables.chosen(cases, only)
    for found in [measure_in_turn(cases)] if in_turn else ([measure(case, with_torch)] for case in cases):
        result["cases"] += found
        for entry in found:
            log.info("%s: %s", entry["case"], json.dumps(entry["ms"]))
        tables.write(out, name, result, markdown(result))
    print(markdown(result), flush=True)
