"""Runs a script in an interpreter that has torch and transformers, which qllama itself never needs.

`$QLLAMA_ORACLE_PYTHON` names it (`make oracle` builds one); else this interpreter, if it has torch.
Importing its libraries takes seconds, so one process does that once, and forks for each script.
"""

import atexit
import contextlib
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

# Reads folders from stdin; answers each with the pid of the process that runs its script, and then
# with how that ended. Whatever computes does so in that process: a fork inherits no threads.
_SERVER = """
import contextlib, os, sys, traceback
import numpy as np
import torch
with contextlib.suppress(ImportError):
    import compressed_tensors.compressors
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama

def run(folder):
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(2)
    arrays, out = dict(np.load("inputs.npz")), {}
    names = dict(arrays, __name__="__main__", np=np, torch=torch, arrays=arrays, out=out)
    exec(compile(open("script.py").read(), "script.py", "exec"), names)
    np.savez("outputs.npz", **out)

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        status = 1
        try:
            run(line.rstrip())
            status = 0
        except BaseException:
            traceback.print_exc()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def interpreter() -> str:
    """Path of the oracle's python; skips the test where there is none."""
    named = os.environ.get("QLLAMA_ORACLE_PYTHON")
    if named:
        if not Path(named).is_file():
            pytest.fail(f"QLLAMA_ORACLE_PYTHON={named} does not exist; unset it or `make oracle`")
        return named
    if importlib.util.find_spec("torch") is None:
        pytest.skip("no torch here and QLLAMA_ORACLE_PYTHON is not set; `make oracle` builds one")
    return sys.executable


def run(script: str, *, timeout: float = 300, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    """Run `script` beside torch and return the arrays it puts into `out`.

    Args:
        script: sees `np`, `torch`, each of `arrays` by its name, all of them as `arrays`, and the
            dict `out`, into which it puts numpy arrays. Indentation common to all lines is removed.
        timeout: seconds.
        arrays: of numpy's own dtypes; bfloat16 and float8 travel as a view of unsigned integers.

    Fails the test, showing what the script printed, when it does not finish well.
    """
    server = _server(interpreter())
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "script.py").write_text(textwrap.dedent(script), encoding="utf-8")
        np.savez(folder / "inputs.npz", **arrays)  # type: ignore[arg-type]  # see numpy's stub
        try:
            print(folder, file=server.stdin, flush=True)
            pid = int(server.stdout.readline())
            late = threading.Event()
            timer = threading.Timer(timeout, _kill, (pid, late))
            timer.start()
            try:
                status = int(server.stdout.readline())
            finally:
                timer.cancel()
        except (OSError, ValueError):
            _server.cache_clear()
            server.kill()
            pytest.fail("the oracle's process ended; what it printed is on stderr")
        if late.is_set():
            pytest.fail(f"the oracle ran longer than {timeout} s")
        if status:
            pytest.fail(f"the oracle ended with {status}:\n{(folder / 'log').read_text()}")
        with np.load(folder / "outputs.npz") as results:
            return dict(results)


@functools.cache
def _server(python: str) -> "subprocess.Popen[str]":
    """The process that forks; it ends with the input it reads, so with this process."""
    # Not this process's search path: an uninstalled qllama must not shadow the oracle's packages.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(OMP_NUM_THREADS="2", MKL_NUM_THREADS="2", HF_HUB_OFFLINE="1")
    server = subprocess.Popen(
        [python, "-c", _SERVER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tempfile.gettempdir(),
    )
    atexit.register(server.communicate)
    return server


def _kill(pid: int, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
