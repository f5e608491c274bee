"""Several processes that work on one run: how they join, which rows each reads, and what they agree on.

JAX joins them and moves their arrays. What hosts have to tell each other beside that goes through JAX's coordinator, so
that no device waits for it. All processes come by the same calls in the same order.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import distributed  # its client, which Orbax's barriers use too, has no public name
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from l2a_jax.errors import UserError
from l2a_jax.sharding.axes import Axes
from l2a_jax.sharding.cluster import EXPECTED, FLAG, Cluster
from l2a_jax.sharding.mesh import STACKED, make

JOIN_SECONDS, LEAVE_SECONDS = 300, 30
"""How long a process waits for all others to join, and at the end of a run."""
_AT_LEAST = 60
_WAIT = 7 * 24 * 3600 * 1000
"""Milliseconds. Whoever waits ends when JAX finds another process dead; work of others may take its time."""
_LOST = ("gloo", "nccl", "connection", "unavailable", "barrier", "heartbeat")
"""Words of the errors by which JAX tells that a process is gone."""
_calls = itertools.count()
_STOP = "l2a/stop"


class Share(NamedTuple):
    """The `index`-th of `count` equal parts of the rows of a micro-batch."""

    index: int
    count: int


def join(cluster: Cluster | None, seconds: int = JOIN_SECONDS) -> None:
    """Become one of several processes, before a device is used; only process 0 tells of the run from then on.

    UserError where JAX finds no cluster. Where a process does not come in time this one ends with status 2, after one
    line: JAX itself would end it then, with a page.
    """
    late = threading.Timer(seconds, _give_up, (cluster, seconds))
    late.daemon = True
    late.start()
    try:
        where = {} if cluster is None else dict(zip(("coordinator_address", "process_id", "num_processes"), cluster,
                                                    strict=True))
        jax.distributed.initialize(**where, initialization_timeout=seconds + _AT_LEAST)
    except Exception as error:  # a ValueError or a RuntimeError, by where it looked
        what = f"no cluster that JAX knows was found ({error})" if cluster is None else f"{cluster.address}: {error}"
        raise UserError(f"{FLAG}: {what}; expected {EXPECTED}") from error
    finally:
        late.cancel()
    atexit.register(_leave)  # before JAX's own leaving, which would wait for minutes and end with a page
    if not first():
        logging.getLogger("l2a_jax").setLevel(logging.ERROR)


def _leave() -> None:
    """Wait for the others, where they come: one that fails alone is not to hold on to those who work."""
    try:
        _client().wait_at_barrier("l2a/end", LEAVE_SECONDS * 1000)
    except jax.errors.JaxRuntimeError:
        _end_at_once()


def _end_at_once() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(2)


@contextlib.contextmanager
def noticing_loss() -> Iterator[None]:
    """A block of steps. UserError where another process is gone; this one then waits for none as it ends."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        line = str(error).strip().splitlines()[0]
        if count() == 1 or not any(word in line.lower() for word in _LOST):
            raise
        atexit.register(_end_at_once)
        raise UserError(f"another process of this run is gone or cannot be reached ({line}); what was saved last is "
                        "whole: start all of them again with --resume") from error


def _give_up(cluster: Cluster | None, seconds: int) -> None:
    where = "" if cluster is None else f" of {cluster.count} at {cluster.address}"
    number = "" if cluster is None else f"; this is number {cluster.index}"
    print(f"error: {FLAG}: not all processes{where} joined within {seconds} s{number}; start each once, with its own "
          "number, where it can reach process 0", file=sys.stderr, flush=True)
    os._exit(2)


def meet() -> None:
    """Use the devices, where there are several processes: each waits there for all others, so none may do it alone."""
    if count() > 1:
        jax.devices()


def count() -> int:
    """How many processes work on this run."""
    return distributed.global_state.num_processes or 1 if _client() is not None else 1


def first() -> bool:
    """Whether this is the process that writes the run's files and tells of it."""
    return _client() is None or distributed.global_state.process_id == 0


def of_first(make: Callable[[], Any]) -> Any:
    """What `make` returns in process 0, a plain JSON value, for every process. UserError in all where it fails."""
    if count() == 1:
        return make()
    name = f"l2a/{next(_calls)}"
    with _together(name):
        found = make() if first() else None
        if first():
            _client().key_value_set(f"{name}/told", json.dumps(found))
    return json.loads(_client().blocking_key_value_get(f"{name}/told", _WAIT))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that all processes have ended before one goes on. Where it fails in one it fails in all."""
    if count() == 1:
        yield
        return
    with _together(f"l2a/{next(_calls)}"):
        yield


@contextlib.contextmanager
def _together(name: str) -> Iterator[None]:
    client, failed = _client(), True
    try:
        yield
        failed = False
    finally:
        if failed:
            client.key_value_set(f"{name}/failed/{distributed.global_state.process_id}", "")
        client.wait_at_barrier(name, _WAIT)
    if elsewhere := client.key_value_dir_get(f"{name}/failed"):
        numbers = sorted(int(key.rpartition("/")[2]) for key, _ in elsewhere)
        raise UserError(f"process {', '.join(map(str, numbers))} of {count()} cannot go on and says why; this one "
                        "ends too")


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """A block that process 0 has ended before the others begin it: what it makes they find. As `together`."""
    if first():
        with together():
            yield
        with together():
            pass
    else:
        with together():
            pass
        with together():
            yield


def stopping(step: int, asked: int | None) -> int | None:
    """The signal for which all processes stop after `step`, None where they go on. `asked`: the one that this process
    was sent.

    Called after a step has been sent off and the numbers of the one before it were read. So nobody is more than a step
    ahead of another: whoever is asked at a step names the second after it, and all have read the name by then.
    """
    client = _client()
    if client is None:
        return asked
    if asked is not None and not client.key_value_dir_get(_STOP):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was asked too, and was sooner
            client.key_value_set(f"{_STOP}/asked", f"{step + 2} {asked}")
    for _, told in client.key_value_dir_get(_STOP):
        last, number = map(int, told.split())
        return number if step >= last else None
    return None


def check(axes: Axes) -> None:
    """UserError where several processes cannot share the work of such a mesh."""
    have = jax.device_count()
    if count() > 1 and axes.devices != have:
        raise UserError(f"{count()} processes have {have} devices together, and --mesh takes {axes.devices}; expected "
                        f"all of them, such as --mesh data={have}")
    share_of(make(axes))


def share_of(mesh: Mesh | None) -> Share:
    """The rows that the devices of this process take. UserError where they are no equal share."""
    if mesh is None or count() == 1:
        return Share(0, 1)
    return share(np.vectorize(lambda device: device.process_index)(mesh.devices), jax.process_index())


def share(owners: Int[np.ndarray, "data context"], process: int) -> Share:
    """The rows that a process takes of a mesh whose devices belong to the processes `owners`. UserError where they are
    no equal share, as where its devices stand in parts of several rows."""
    rows = np.flatnonzero((owners == process).any(axis=1))
    size, data = rows.size, len(owners)
    shared = size > 1 and (owners[rows] != process).any()
    if not size or shared or np.ptp(rows) + 1 != size or rows[0] % size or data % size:
        raise UserError(f"--mesh deals rows over {data} groups of devices, and process {process} has devices in {size} "
                        "of them; expected whole groups for each process, as many for each, or a part of one")
    return Share(int(rows[0]) // size, data // size)


def placed(batch: Any, mesh: Mesh | None) -> Any:
    """A step's batch ([A, B, T]) over the mesh, of which every process has read its `share_of` the rows."""
    if mesh is None or count() == 1:
        return batch
    rows, whole = NamedSharding(mesh, STACKED), share_of(mesh).count
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(
        rows, x, (x.shape[0], x.shape[1] * whole, *x.shape[2:])), batch)


def _client() -> Any:
    return distributed.global_state.client
