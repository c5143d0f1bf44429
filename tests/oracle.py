"""Runs a script in an interpreter that has torch and transformers, which qllama itself never needs.

`$QLLAMA_ORACLE_PYTHON` names it (`make oracle` builds one); else this interpreter, if it has torch.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest

_PROLOGUE = """\
import sys
import numpy as np
import torch
torch.set_num_threads(2)
arrays = dict(np.load(sys.argv[1]))
globals().update(arrays)
out = {}
"""
_EPILOGUE = """
np.savez(sys.argv[2], **out)
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

    Fails the test, showing the script's stderr, when the script does not finish well.
    """
    python = interpreter()
    # Not this process's search path: an uninstalled qllama must not shadow the oracle's packages.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(OMP_NUM_THREADS="2", MKL_NUM_THREADS="2", HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        program = Path(folder, "script.py")
        program.write_text(_PROLOGUE + textwrap.dedent(script) + _EPILOGUE, encoding="utf-8")
        np.savez(inputs, **arrays)  # type: ignore[arg-type]  # numpy's stub has allow_pickle here
        try:
            done = subprocess.run(
                [python, str(program), str(inputs), str(outputs)],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            pytest.fail(f"the oracle ran longer than {timeout} s")
        if done.returncode:
            pytest.fail(f"the oracle ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        with np.load(outputs) as results:
            return dict(results)
