"""Several processes of one run, as a user starts them: the same losses, whoever is killed and however many go on."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.data.batch import Batch
from l2a_jax.data.recall import RecallCorpus
from l2a_jax.errors import UserError
from l2a_jax.models.params import by_path
from l2a_jax.runs.train import resume, train
from l2a_jax.sharding import cluster, processes
from l2a_jax.sources import TINY, load_pretrained
from l2a_jax.training.checkpoints import LATEST, Checkpoints
from l2a_jax.training.metrics import read_metrics
from l2a_jax.training.settings import resolve
from l2a_jax.training.step import TrainState
from tests.sharding.steps import apart

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEVICES, STEPS = 4, 24


def flags_of(text):
    return {"steps": STEPS, "batch_size": DEVICES, "seq_len": 24, "save_every": 3, "eval_every": 4, "eval_batches": 1,
            "window": 6, "leakage": 0.5, "router_lr": 1e-3, "lr": 1e-3, "model": TINY, "data": (str(text),)}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = "keep metal copper . the quiet river runs near the old bridge . tell metal iron .".split()
    rng = random.Random(0)
    lines = (json.dumps({"text": " ".join(rng.choices(words, k=rng.randrange(8, 40)))}) for _ in range(300))
    (folder / "a.jsonl").write_text("\n".join(lines))
    return folder / "a.jsonl"


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The run that was never stopped, on one device."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(resolve("l2a_ft", flags_of(text), ("repair-2025",)), folder)
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(count, *arguments, script=(str(ROOT / "train/run.py"), "--distributed")):
    """A script, `train/run.py`, in `count` processes that have `DEVICES` devices together."""
    port, environment = free_port(), dict(os.environ)
    environment |= {"PYTHONPATH": str(ROOT), "XLA_FLAGS": f"{environment.get('XLA_FLAGS', '')} "
                    f"--xla_force_host_platform_device_count={DEVICES // count}"}
    return [subprocess.Popen([sys.executable, *script, f"localhost:{port},{index},{count}", *map(str, arguments)],
                             cwd=ROOT, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for index in range(count)]


def ended(started):
    said = [process.communicate(timeout=200)[0] for process in started]
    return [process.returncode for process in started], said


def at_step(started, folder, step):
    deadline, file = time.monotonic() + 200, folder / "metrics.jsonl"
    while not file.exists() or file.read_text().count("\n") < step:
        if any(process.poll() is not None for process in started) or time.monotonic() > deadline:
            for process in started:
                process.kill()
            raise AssertionError(ended(started))
        time.sleep(0.01)


def test_killed_processes_go_on_in_other_numbers_with_the_losses_of_one_device(whole, text, tmp_path):
    folder = tmp_path / "run"
    given = [f"--{name.replace('_', '-')}={value[0] if name == 'data' else value}"
             for name, value in flags_of(text).items()]
    two = start(2, "--regime", "l2a_ft", "--preset", "repair-2025", *given, "--mesh", f"data={DEVICES}", "--run-dir",
                folder)
    at_step(two, folder, 4)
    time.sleep(random.random() / 10)
    for process in two:
        process.kill()
    codes, said = ended(two)
    assert codes == [-signal.SIGKILL] * 2, said

    four = start(4, "--resume", folder)
    at_step(four, folder, len(read_metrics(folder / "metrics.jsonl")) + 1)
    four[3].send_signal(signal.SIGTERM)  # to one of them
    codes, said = ended(four)
    assert codes == [128 + signal.SIGTERM] * 4, said
    saved = sorted(int(path.name) for path in (folder / "checkpoints/latest").iterdir())
    assert saved[-1] == len(read_metrics(folder / "metrics.jsonl")) < STEPS
    assert all(f"stopped after step {saved[-1]}, which is saved" in text for text in said)
    assert "regime:" in said[0] and not any("regime:" in text or "tokens/s" in text for text in said[1:]), said

    assert resume(folder, "data=1")["steps"] == STEPS
    one, many = read_metrics(whole / "metrics.jsonl"), read_metrics(folder / "metrics.jsonl")
    assert [record["step"] for record in many] == list(range(1, STEPS + 1))
    for name in ("loss", "sparsity", "grad_norm", "held_out_loss"):
        np.testing.assert_allclose(*([record[name] for record in records if name in record]
                                     for records in (many, one)), rtol=1e-6 if "loss" in name else 1e-5, err_msg=name)
    # Read on one device, as evaluation and export do.
    found, wanted = (by_path(load_pretrained(path, np.float32).params) for path in (folder, whole))
    assert max(apart(found[path], leaf) for path, leaf in wanted.items()) < 1e-4


def numbers():
    """A state of no model's: leaves that four devices divide, and some that they do not."""
    rng = np.random.default_rng(0)

    def tree():
        return {"layers": {"router": {"kernel": jnp.asarray(rng.standard_normal((3, 8)), jnp.float32)}},
                "norm_final": {"scale": jnp.asarray(rng.standard_normal(5), jnp.bfloat16)},
                "embed": {"embedding": jnp.asarray(rng.standard_normal((12, 6)), jnp.float32)}}

    return TrainState(jnp.asarray(7, jnp.int32), tree(), (tree(), jnp.asarray(3, jnp.int32)), jnp.ones((), bool))


PASS_ON = """
import pathlib, sys
from l2a_jax.sharding import cluster, leaves, mesh, processes
from l2a_jax.sharding.axes import Axes
from l2a_jax.training.checkpoints import LATEST, Checkpoints
from tests.sharding.test_processes import numbers
processes.join(cluster.parse(sys.argv[1]))
processes.meet()
given, passed = (Checkpoints(pathlib.Path(folder)) for folder in sys.argv[2:])
passed.save(LATEST, given.load(LATEST, leaves.described(numbers(), mesh.make(Axes(4)))), {})
"""


def test_a_checkpoint_is_the_same_to_the_last_bit_by_way_of_two_processes(tmp_path):
    given, passed = Checkpoints(tmp_path / "given"), Checkpoints(tmp_path / "passed")
    given.save(LATEST, numbers(), {})
    codes, said = ended(start(2, given.root.parent, passed.root.parent, script=("-c", PASS_ON)))
    assert codes == [0, 0], said
    jax.tree.map(np.testing.assert_array_equal, passed.load(LATEST, jax.eval_shape(numbers)), numbers())


def test_a_checkpoint_of_another_shape_is_one_clear_error(tmp_path, monkeypatch):
    """What Orbax says of one, which would leave half of its reading behind for other tests to stumble over."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(LATEST, numbers(), {})

    def refuse(folder, abstract):
        raise ValueError("Requested shape: (6,) is not compatible with the stored shape: (5,)")

    monkeypatch.setattr("l2a_jax.training.checkpoints.ocp.load_checkpointables", refuse)
    with pytest.raises(UserError, match=r"^the checkpoint .*/latest/7 is whole but not of this run: it holds other"):
        checkpoints.load(LATEST, jax.eval_shape(numbers))


class Coordinator:
    """What JAX's tells all processes of one run, in one of them."""

    def __init__(self):
        self.told = {}

    def key_value_set(self, key, value):
        if key in self.told:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.told[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.told.items() if key.startswith(prefix)]

    def wait_at_barrier(self, name, timeout):
        pass


@pytest.fixture
def coordinator(monkeypatch):
    made = Coordinator()
    monkeypatch.setattr(processes, "_client", lambda: made)
    monkeypatch.setattr(processes, "count", lambda: 2)
    return made


def test_all_stop_after_the_same_step_whoever_is_asked(coordinator):
    """One process is asked at step 3, where another may be at 4, and asked too: both end with 5."""
    assert processes.stopping(3, None) is None
    assert processes.stopping(3, signal.SIGTERM) is None and processes.stopping(4, signal.SIGINT) is None
    assert processes.stopping(4, signal.SIGTERM) is None and processes.stopping(5, signal.SIGINT) == signal.SIGTERM
    assert processes.stopping(5, signal.SIGTERM) == signal.SIGTERM


def test_what_fails_in_one_process_fails_in_all(coordinator):
    with processes.together():
        pass
    with pytest.raises(ZeroDivisionError), processes.together():
        raise ZeroDivisionError  # and the others learn of it
    assert len(coordinator.told) == 1
    with pytest.raises(UserError, match=r"^process 1 of 2 cannot go on and says why; this one ends too$"), \
            processes.together():
        coordinator.told = {f"l2a/{number}/failed/1": "" for number in range(100)}


JOIN = "import sys\nfrom l2a_jax.sharding import cluster, processes\nprocesses.join(cluster.parse(sys.argv[1]), 1)"


def test_a_process_that_never_joins_is_one_clear_line():
    done = subprocess.run([sys.executable, "-c", JOIN, f"localhost:{free_port()},0,2"], text=True, capture_output=True,
                          cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert "error: --distributed: not all processes of 2 at localhost" in done.stderr


def test_a_process_that_is_gone_is_one_clear_line_and_is_not_waited_for(monkeypatch):
    left = []
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes.atexit, "register", left.append)
    with pytest.raises(UserError, match=r"^another process of this run is gone .*Gloo.*--resume$"), \
            processes.noticing_loss():
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [1]:2\nmore")
    assert left == [processes._end_at_once]
    with pytest.raises(jax.errors.JaxRuntimeError), processes.noticing_loss():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")


@pytest.mark.parametrize("text", ["", "host", "host:1", "host:1,0", "host:1,a,2", ":1,0,2", "host:1,2,2", "host:1,0,0"])
def test_what_names_no_cluster_is_refused(text):
    with pytest.raises(UserError, match=r"--distributed .*expected"):
        cluster.parse(text)


def test_what_names_a_cluster():
    assert cluster.parse("auto") is None
    assert cluster.parse("10.0.0.1:1234, 1, 4") == ("10.0.0.1:1234", 1, 4)


@pytest.mark.parametrize(("owners", "mine", "expected"), [
    ([[0], [0], [1], [1]], 1, (1, 2)), ([[0, 0], [1, 1]], 0, (0, 2)), ([[0, 0, 1, 1]], 1, (0, 1)),
    ([[0, 1], [2, 3]], 1, (0, 2)), ([[0, 1], [2, 3]], 2, (1, 2))])
def test_the_rows_that_a_process_reads_are_those_of_its_devices(owners, mine, expected):
    assert processes.share(np.array(owners), mine) == expected


def test_processes_whose_devices_stand_in_parts_of_rows_are_refused():
    with pytest.raises(UserError, match="expected whole groups for each process"):
        processes.share(np.array([[0, 0], [0, 1], [1, 1]]), 0)


def test_shares_of_made_up_rows_are_the_rows_of_one_process():
    corpus = RecallCorpus(112, 4, seed=3)
    parts = [corpus.of_process(index, 2).batch(5) for index in range(2)]
    joined = Batch(*(None if field is None else np.concatenate([field, other])
                     for field, other in zip(*parts, strict=True)))
    jax.tree.map(np.testing.assert_array_equal, joined, corpus.batch(5))
