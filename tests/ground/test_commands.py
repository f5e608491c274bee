"""How a command ends: one line for what is not its fault, a traceback for what is."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from l2a_jax import commands
from l2a_jax.errors import Unsupported, UserError

REFUSALS = {
    "the input": (UserError("--steps is 0"), "error: --steps is 0"),
    "the device": (Unsupported("no such kernel here"), "error: no such kernel here"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "/data/tokens.bin"),
                    "error: /data/tokens.bin: No space left on device"),
    "permissions": (PermissionError(errno.EACCES, "Permission denied", "weights"), "error: weights: Permission denied"),
    "a name too long": (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), "error: aaa: File name too long"),
    "memory": (MemoryError(), "error: this machine's memory is used up"),
}


def _raises(error):
    def body(arguments):
        raise error

    return body


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_line_and_status_2(name, capsys):
    error, said = REFUSALS[name]
    assert commands.run(_raises(error)) == 2
    assert capsys.readouterr().err == said + "\n"


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError):
        commands.run(_raises(KeyError("settings")))


def test_the_devices_memory(capsys):
    import jax

    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    assert commands.run(_raises(full)) == 2
    assert "the device's memory is used up" in capsys.readouterr().err
    with pytest.raises(jax.errors.JaxRuntimeError):
        commands.run(_raises(jax.errors.JaxRuntimeError("INTERNAL: something else")))


def test_ctrl_c(capsys):
    assert commands.run(_raises(KeyboardInterrupt()), interrupted="interrupted; run it again") == 130
    assert capsys.readouterr().err == "interrupted; run it again\n"


def _python(code, **how):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **how)


def test_the_front_of_the_package_imports_nothing_slow():
    """So that the seconds in which Ctrl-C, a bad flag or --help would wait for JAX are gone."""
    done = _python("import sys, l2a_jax.commands, l2a_jax.files; print('jax' in sys.modules, 'numpy' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done


@pytest.mark.parametrize("error", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_terminal_that_is_gone_ends_no_work_but_a_full_disk_is_told(error, tmp_path):
    """What a closed connection leaves of standard error answers EIO; a log on a full disk is another matter."""
    with (tmp_path / "stream").open("w") as file:

        class Gone:
            def write(self, text):
                raise OSError(error, os.strerror(error))

            flush = fileno = None

        stream = Gone()
        stream.flush, stream.fileno = lambda: stream.write(""), file.fileno
        outliving = commands._Outliving(stream)
        if error == errno.ENOSPC:
            with pytest.raises(OSError, match="No space left"):
                outliving.write("x")
        else:
            assert outliving.write("x") == 1
            outliving.flush()


@pytest.mark.parametrize("closed", [1, 2])
def test_a_reader_that_goes_away_ends_no_work(closed, tmp_path):
    """`| head -1` and `2>&1 | head -1`: no traceback; telling stops, work does not."""
    read, write = os.pipe()
    os.close(read)
    code = ("import sys, pathlib\nfrom l2a_jax import commands\n"
            "def body(arguments):\n"
            "    for _ in range(3): print('x' * 100_000, file=sys.stderr, flush=True)\n"
            f"    pathlib.Path({str(tmp_path / 'done')!r}).touch()\n"
            "    for _ in range(3): print('x' * 100_000)\n"
            "sys.exit(commands.run(body))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=write if closed == 1 else subprocess.DEVNULL,
                               stderr=write if closed == 2 else subprocess.PIPE)
    os.close(write)
    said = process.communicate(timeout=60)[1]
    assert (tmp_path / "done").exists()
    assert process.returncode == (commands.BROKEN_PIPE if closed == 1 else 0)
    assert closed == 2 or b"Traceback" not in said
