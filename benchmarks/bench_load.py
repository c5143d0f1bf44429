"""How much memory loading a checkpoint takes beyond the weights themselves.

    python benchmarks/bench_load.py --json benchmarks/results/load-cpu.json
    python benchmarks/bench_load.py --checkpoint DIR --backend xla

Measured is the growth of this process's anonymous memory (RssAnon: pages of mapped files do not
count, they can be dropped) over its value after the imports. Bounded loading means that it stays
below the placed weights, the largest stored tensor and `SLACK` together.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLACK = 256 << 20
"""Bytes allowed beyond the placed weights and the largest tensor."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint to make and a way to load it."""

    shape: str
    layers: int
    scheme: str
    backend: str = "xla"
    dtype: str = "bfloat16"
    vocab: int = 32_000


CASES = (
    Case(shape="llama-3.3-70b", layers=8, scheme="W4A16"),
    Case(shape="llama-3.1-8b", layers=20, scheme="W8A8"),
    Case(shape="llama-3.1-8b", layers=20, scheme="FP8_DYNAMIC"),
    Case(shape="llama-3.1-8b", layers=10, scheme="bf16"),
    # What a CPU runs by default: dequantized while it is loaded.
    Case(shape="llama-3.1-8b", layers=4, scheme="W4A16", backend="auto", dtype="float32"),
)
"""The first four checkpoints have 4 GiB and more."""


def bench_load(case: Case, scratch: Path, *, repeat: int = 5) -> dict[str, Any]:
    """Make the checkpoint of `case` in `scratch`, load it `repeat` times and remove it.

    Returns:
        A record, `value` the peak in bytes, `limit` what it should stay below.
    """
    from make_checkpoint import random_checkpoint
    from records import new_record

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        checkpoint = random_checkpoint(
            Path(folder) / "checkpoint",
            shape=case.shape,
            scheme=case.scheme,
            layers=case.layers,
            vocab=case.vocab,
        )
        runs = [measure_apart(checkpoint, case.backend, case.dtype) for _ in range(repeat)]
    return new_record(
        "load",
        model=case.shape,
        layers=case.layers,
        vocab=case.vocab,
        scheme=case.scheme,
        backend=case.backend,
        dtype=case.dtype,
        metric="peak_anonymous_bytes",
        **summary(runs),
    )


def summary(runs: list[dict[str, int]]) -> dict[str, Any]:
    """Value, spread, limit and parts of a record from what `measure` found several times."""
    peaks = [run["peak"] for run in runs]
    placed, largest = runs[0]["placed"], runs[0]["largest"]
    return {
        "value": int(statistics.median(peaks)),
        "spread": [min(peaks), max(peaks)],
        "limit": placed + largest + SLACK,
        "parts": {
            "checkpoint": runs[0]["stored"],
            "placed": placed,
            "largest_tensor": largest,
        },
    }


def measure_apart(checkpoint: Path, backend: str, dtype: str) -> dict[str, int]:
    """`measure` in a process of its own, whose memory nothing else has touched."""
    command = [sys.executable, __file__, "--measure", "--checkpoint", str(checkpoint)]
    command += ["--backend", backend, "--dtype", dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def measure(checkpoint: Path, backend: str, dtype: str) -> dict[str, int]:
    """Load a checkpoint once.

    Returns:
        Bytes of the `peak` of anonymous memory over the value after imports, of the `placed`
        weights, of the `largest` stored tensor and of all `stored` ones.
    """
    import jax
    from flax import nnx
    from qllama_convert.safetensors_file import SafetensorsFile
    from transformers import PreTrainedTokenizerFast  # noqa: F401 (LLM imports it while it loads)

    from qllama import LLM

    jax.block_until_ready(jax.numpy.zeros(1))  # the backend has started
    files = [SafetensorsFile(path) for path in Path(checkpoint).glob("*.safetensors")]
    sizes = [entry.stop - entry.start for file in files for entry in file.tensors.values()]
    before = anonymous_memory()
    with (
        peak_anonymous_memory() as peak,
        LLM(checkpoint, backend=backend, dtype=dtype, max_model_len=16, max_num_seqs=1) as llm,
    ):
        placed = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(llm.model)))
    return {
        "peak": peak[0] - before,
        "placed": placed,
        "largest": max(sizes),
        "stored": sum(sizes),
    }


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no RssAnon; this needs Linux 4.5 or later")


@contextmanager
def peak_anonymous_memory(interval: float = 0.002) -> Iterator[list[int]]:
    """A list of one number: the most that `anonymous_memory` was while the block ran."""
    peak = [anonymous_memory()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            peak[0] = max(peak[0], anonymous_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 where a limit is not kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="merge the records into this file")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where checkpoints are made")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="load this one instead")
    parser.add_argument("--backend", default="xla")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.checkpoint, options.backend, options.dtype)))
        return 0
    if options.checkpoint is not None:
        apart = (options.checkpoint, options.backend, options.dtype)
        found = summary([measure_apart(*apart) for _ in range(options.repeat)])
        print(json.dumps(found))
        return int(found["value"] > found["limit"])
    from records import merge_records

    kept = True
    for case in CASES:
        record = bench_load(case, options.scratch, repeat=options.repeat)
        print(json.dumps(record), flush=True)
        kept = kept and record["value"] <= record["limit"]
        if options.json is not None:
            merge_records(options.json, [record])
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
