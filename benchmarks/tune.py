"""Finds the fastest config of each product and writes the table that `tuning` reads.

    python benchmarks/tune.py --out kernels/qllama_kernels/configs/nvidia_h200.json

Each product has a process of its own. They compile side by side on all cores and take turns on the
GPU, so that times are undisturbed. A config that fails is noted; one that hangs costs its process,
which is killed and restarted behind it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_matmul
import numpy as np
from qllama_kernels import tuning
from qllama_kernels.tuning import Problem

HANG_S = 30.0  # on the GPU, where a config needs a second


def products(
    schemes: Sequence[str], shapes: Sequence[tuple[int, int]], tokens: Sequence[int]
) -> list[Problem]:
    """What to tune, the largest weights first: their processes take longest."""
    found = [
        Problem(scheme=scheme, m=m, n=n, k=k, group_size=bench_matmul.GROUP_SIZE.get(scheme))  # type: ignore[arg-type]
        for scheme in schemes
        for n, k in shapes
        for m in tokens
    ]
    return sorted(found, key=lambda problem: -problem.n * problem.k)


def worker(folder: Path, problem: Problem, first: int, count: int, *, xla: bool) -> None:
    """Time candidates `first`... of one product, one line in its journal for each event."""
    journal = folder / f"{name(problem)}.jsonl"

    def note(**event: Any) -> None:
        with journal.open("a") as file:
            file.write(json.dumps({"time": time.time(), **event}) + "\n")

    ranked = tuning.ranked(problem)[:count]
    lock = folder / "gpu.lock"
    weights = bench_matmul.make_weights(problem.scheme, problem.n, problem.k, lock)
    operands = bench_matmul.make_operands(weights, problem.m, lock)
    programs: dict[int, Any] = {}

    def timed(index: int) -> tuple[float, float]:
        """Median microseconds and error, with the GPU to ourselves."""
        with bench_matmul.exclusive(lock):
            note(event="run", index=index)
            out = programs[index](operands.x, operands.input_scale, operands.weights)[0]
            error = float(bench_matmul.max_rel_error(out, operands.expected))
            return float(np.median(bench_matmul.kernel_us(programs[index], operands))), error

    def attempt(index: int, f: Any, event: str, **record: Any) -> float:
        note(event="compile", index=index)
        try:
            # XLA times what it chooses from, so it too has to have the GPU to itself.
            with bench_matmul.exclusive(lock if event == "xla" else None):
                programs[index] = bench_matmul.compile_all(f, operands)
            us, error = timed(index)
        except Exception as failure:  # whatever it is, the next config may do
            note(event="failed", index=index, message=str(failure)[-300:])
            return float("inf")
        note(event=event, index=index, us=us, error=error, **record)
        return us

    times = {}
    for i, config in enumerate(ranked[first:], first):
        f = bench_matmul.product(operands, config)
        times[i] = attempt(i, f, "done", **tuning.to_record(config))
        for slow in sorted(programs, key=times.__getitem__)[3:]:
            del programs[slow]
    # Once more, now that most other processes are done with their set-up.
    for i in sorted(programs, key=times.__getitem__):
        us, error = timed(i)
        note(event="again", index=i, us=us, error=error, **tuning.to_record(ranked[i]))
    if xla and tuning.X_BYTES[problem.scheme] == 1:
        attempt(len(ranked), bench_matmul.xla_product(operands), "xla")


def name(problem: Problem) -> str:
    """A product as a file name."""
    return f"{problem.scheme}-{problem.n}-{problem.k}-{problem.m}"


def events(folder: Path, problem: Problem) -> list[dict[str, Any]]:
    """The journal of a product so far."""
    file = folder / f"{name(problem)}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def run(problems: list[Problem], folder: Path, *, limit_s: float, count: int, xla: bool) -> None:
    """Start, watch and restart the workers until all is tuned or the time is up."""
    deadline = time.monotonic() + limit_s
    waiting = [(problem, 0) for problem in problems]
    running: dict[Problem, subprocess.Popen[bytes]] = {}
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < max(1, (os.cpu_count() or 2) - 2):
            problem, first = waiting.pop(0)
            command = [sys.executable, __file__, "--worker", str(folder)]
            command += [name(problem), str(first), str(count)]
            command += [] if xla else ["--no-xla"]
            environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            with (folder / f"{name(problem)}.log").open("ab") as log:
                running[problem] = subprocess.Popen(command, stderr=log, env=environment)
        time.sleep(0.5)
        for problem, process in list(running.items()):
            last = (events(folder, problem) or [{"event": "start", "index": -1, "time": 0}])[-1]
            if last["event"] == "run" and time.time() - last["time"] > HANG_S:
                process.kill()
                process.wait()
            if process.poll() is None:
                continue
            del running[problem]
            if process.returncode and last["index"] >= 0:
                print(f"{name(problem)}: candidate {last['index']} ended its process", flush=True)
                waiting.append((problem, last["index"] + 1))
            elif process.returncode:
                log = (folder / f"{name(problem)}.log").read_text()
                print(f"{name(problem)} did not start: {log[-300:]}", flush=True)
    for process in running.values():
        process.kill()


def best(folder: Path, problem: Problem, tolerance: float) -> dict[str, Any] | None:
    """The table's record of a product, or None where nothing right was timed."""
    log = events(folder, problem)
    again = [e for e in log if e["event"] == "again"]
    right = [e for e in log if e["event"] == "done"]
    right = [e for e in again or right if e["error"] <= tolerance]
    if not right:
        return None
    fastest = min(right, key=lambda event: event["us"])
    xla = [e["us"] for e in log if e["event"] == "xla"]
    return {
        "scheme": problem.scheme,
        "n": problem.n,
        "k": problem.k,
        "m": problem.bucket,
        "us": round(fastest["us"], 2),
        "xla_us": round(xla[0], 2) if xla else None,
        "kernel": fastest["kernel"],
        "config": fastest["config"],
    }


def rule_us(folder: Path, problem: Problem) -> float | None:
    """What the config took that `tuning.heuristic` chooses, the first of the candidates."""
    times = [
        e["us"]
        for e in events(folder, problem)
        if e["event"] in ("done", "again") and e["index"] == 0
    ]
    return round(times[-1], 2) if times else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the table; records of other products stay")
    parser.add_argument("--journal", type=Path, help="keep the journals in this folder")
    parser.add_argument("--schemes", nargs="+", default=("w4a16", "w8a8", "fp8"))
    parser.add_argument("--tokens", nargs="+", type=int, default=tuning.M_BUCKETS)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=bench_matmul.parse_shape,
        default=bench_matmul.LLAMA_8B,
        metavar="N,K",
        help="those of Llama-3.1-8B",
    )
    parser.add_argument("--candidates", type=int, default=16, help="how many configs of a product")
    parser.add_argument("--no-xla", action="store_true", help="skip XLA, whose search is slow")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds in all")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        folder, key, first, count = args.worker
        scheme, n, k, m = key.split("-")
        [problem] = products([scheme], [(int(n), int(k))], [int(m)])
        worker(Path(folder), problem, int(first), int(count), xla=not args.no_xla)
        return
    problems = products(args.schemes, args.shapes, args.tokens)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.journal or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run(problems, folder, limit_s=args.limit, count=args.candidates, xla=not args.no_xla)
        found = []
        for problem in problems:
            if record := best(folder, problem, tolerance=2e-2):
                found.append(record)
                by_rule = rule_us(folder, problem)
                print(json.dumps(record), f"by the rule {by_rule} us", flush=True)
    if args.out:
        key_of = lambda r: (r["scheme"], r["n"], r["k"], r["m"])  # noqa: E731
        old = json.loads(args.out.read_text()) if args.out.exists() else []
        table = {key_of(r): r for r in old}
        for record in found:
            if args.no_xla and key_of(record) in table:
                record["xla_us"] = table[key_of(record)]["xla_us"]
            table[key_of(record)] = record
        lines = ",\n".join(json.dumps(table[key]) for key in sorted(table))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
