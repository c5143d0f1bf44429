"""How long one quantized product takes, beside the limit of the card and its peers.

    python benchmarks/bench_matmul.py --json benchmarks/results/matmul-h100.json
    python benchmarks/bench_matmul.py --schemes w4a16 --shapes 28672,4096 --tokens 1 16

Times are those of the kernels alone, reduction and cast included, over several distinct weights in
turn so that none is found in the L2 cache. `limit` is the larger of two times: the weight's bytes
at the measured read bandwidth, and the operations at the card's dense rate. That bandwidth and
PyTorch's products are measured first, alone; then each weight of each scheme has a process of its
own: as many as there are cores compile side by side, and take turns on the GPU.
"""

import argparse
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from qllama_kernels import dispatch, pallas, reference, tuning
from qllama_kernels.tuning import Config, Problem, Scheme
from qllama_kernels.xla import WITHOUT_TRITON
from records import merge_records, new_record

# The Linears of Llama-3.1-8B and 3.3-70B with q, k, v and gate, up merged, (N, K); and what each of
# two devices holds of them.
LLAMA_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
HALF_8B = ((3072, 4096), (4096, 2048), (14336, 4096), (4096, 7168))
LLAMA_70B = ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672))
HALF_70B = ((5120, 8192), (8192, 4096), (28672, 8192), (8192, 14336))
SHAPES = LLAMA_8B + HALF_8B + LLAMA_70B + HALF_70B
SCHEMES: tuple[Scheme, ...] = ("w4a16", "w8a16", "w8a8", "fp8")
TOKENS = (1, 16, 64, 256, 2048)
EVERY_POWER = tuple(2**i for i in range(14))  # 1 ... 8192, for the two large weights of an 8B
WEIGHT_DTYPE = {"w4a16": "int4", "w8a16": "int8", "w8a8": "int8", "fp8": "float8_e4m3fn"}
GROUP_SIZE = {"w4a16": 128}  # of the others one scale a row
OPERATIONS = {"w4a16": 800e12, "w8a16": 800e12, "w8a8": 1600e12, "fp8": 1600e12}  # a second
L2_BYTES = 60e6
PREPARED = "prepared.json"  # what `prepare` found
# Measured on one H100 80 GB, not in the same run: microseconds at (N, K, M), float16, group 128.
MARLIN_H100 = {
    (6144, 4096, 1): 11.6,
    (6144, 4096, 16): 11.9,
    (6144, 4096, 64): 23.2,
    (6144, 4096, 256): 41.0,
    (6144, 4096, 2048): 283.0,
    (4096, 4096, 1): 10.8,
    (4096, 4096, 16): 10.9,
    (4096, 4096, 64): 23.4,
    (4096, 4096, 256): 27.9,
    (4096, 4096, 2048): 189.0,
    (28672, 4096, 1): 31.4,
    (28672, 4096, 16): 32.5,
    (28672, 4096, 64): 49.0,
    (28672, 4096, 256): 163.0,
    (28672, 4096, 2048): 1380.0,
    (4096, 14336, 1): 18.6,
    (4096, 14336, 16): 19.8,
    (4096, 14336, 64): 38.5,
    (4096, 14336, 256): 82.2,
    (4096, 14336, 2048): 694.0,
}


class Weights(NamedTuple):
    """Several weights of one shape, enough to flush the L2 cache between two uses of one."""

    scheme: Scheme
    n: int
    k: int
    packed: list[dispatch.PackedWeight]
    natural: tuple[jax.Array, jax.Array]  # codes and scales of the first


class Operands(NamedTuple):
    """One product: tokens, several equally shaped weights, and what the first should give."""

    problem: Problem
    x: jax.Array
    input_scale: jax.Array | None
    weights: list[dispatch.PackedWeight]
    expected: jax.Array  # float32 [M, N]


@contextlib.contextmanager
def exclusive(lock: Path | None) -> Iterator[None]:
    """Hold a lock file, so that processes that compile side by side take turns on the GPU."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_weights(scheme: Scheme, n: int, k: int, lock: Path | None = None) -> Weights:
    """Random codes and scales; compiled at once, made under the lock.

    Raises:
        ValueError: a shape that is not of whole tiles.
    """
    if k % 128 or n % 64:
        raise ValueError(f"N={n}, K={k}: benchmarks take whole tiles, N % 64 = K % 128 = 0")
    group = GROUP_SIZE.get(scheme)

    def natural(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        if scheme == "w4a16":
            codes = jax.random.bits(key, (n, k // 2), jnp.uint8)
        elif scheme == "fp8":
            codes = jax.random.normal(key, (n, k), jnp.bfloat16).astype(jnp.float8_e4m3fn)
        else:
            codes = jax.random.randint(key, (n, k), -127, 128, jnp.int8)
        scales = jax.random.uniform(key, (n, k // group if group else 1), jnp.float32, 0.5, 1.5)
        return codes, scales.astype(jnp.bfloat16)

    def packed(key: jax.Array) -> dispatch.PackedWeight:
        return dispatch.pack(
            *natural(key),
            k=k,
            weight_dtype=WEIGHT_DTYPE[scheme],
            group_size=group,
            quantized_input=tuning.X_BYTES[scheme] == 1,
        )

    copies = max(3, min(32, int(4 * L2_BYTES / (n * k * tuning.BITS[scheme] / 8)) + 1))
    keys = [jax.random.key(i) for i in range(copies)]
    make_natural, make_packed = (jax.jit(f).lower(keys[0]).compile() for f in (natural, packed))
    with exclusive(lock):
        made = [make_packed(key) for key in keys], make_natural(keys[0])
        return Weights(scheme, n, k, *jax.block_until_ready(made))


def make_operands(weights: Weights, m: int, lock: Path | None = None) -> Operands:
    """Those weights and `m` random tokens; compiled at once, made under the lock."""
    scheme, group = weights.scheme, GROUP_SIZE.get(weights.scheme)

    def tokens(
        key: jax.Array, codes: jax.Array, scales: jax.Array
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        x = jax.random.normal(key, (m, weights.k), jnp.bfloat16)
        input_scale = None
        if tuning.X_BYTES[scheme] == 1:
            input_scale = jax.random.uniform(key, (m, 1), jnp.float32, 0.5, 1.5)
            x = (x * 40).astype(jnp.int8) if scheme == "w8a8" else x.astype(jnp.float8_e4m3fn)
        # Or XLA multiplies what has not been rounded to 8 bits yet.
        x = lax.optimization_barrier(x)
        expected = reference.quantized_matmul(
            x,
            codes,
            scales,
            weight_dtype=WEIGHT_DTYPE[scheme],
            group_size=group,
            input_scale=input_scale,
        )
        return x, input_scale, expected

    arguments = (jax.random.key(m), *weights.natural)
    # XLA would run what it chooses from, without the lock.
    options = WITHOUT_TRITON | {"xla_gpu_autotune_level": 0}
    make_tokens = jax.jit(tokens, compiler_options=options).lower(*arguments).compile()
    with exclusive(lock):
        x, input_scale, expected = jax.block_until_ready(make_tokens(*arguments))
    problem = Problem(scheme=scheme, m=m, n=weights.n, k=weights.k, group_size=group)
    return Operands(problem, x, input_scale, weights.packed, expected)


def product(operands: Operands, config: Config | None) -> Callable[..., jax.Array]:
    """`f(x, input_scale, packed)`, the product in bfloat16 by the kernels."""

    def f(x: jax.Array, input_scale: jax.Array | None, w: dispatch.PackedWeight) -> jax.Array:
        return pallas.quantized_matmul(
            x,
            w.codes,
            w.scales,
            problem=operands.problem,
            input_scale=input_scale,
            out_dtype=jnp.bfloat16,
            config=config,
        )

    return f


def xla_product(operands: Operands) -> Callable[..., jax.Array]:
    """The same through `backend="xla"`, on natural weights."""
    scheme = operands.problem.scheme

    def f(x: jax.Array, input_scale: jax.Array | None, w: dispatch.PackedWeight) -> jax.Array:
        return dispatch.quantized_matmul(
            x,
            w.codes,
            w.scales,
            weight_dtype=WEIGHT_DTYPE[scheme],
            group_size=operands.problem.group_size,
            input_scale=input_scale,
            out_dtype=jnp.bfloat16,
            backend="xla",
        )

    return f


def compile_all(f: Callable[..., jax.Array], operands: Operands) -> Callable[..., Any]:
    """One program that applies `f` to every weight, compiled as the model compiles it."""
    program = jax.jit(lambda x, a, weights: [f(x, a, w) for w in weights])
    lowered = program.lower(operands.x, operands.input_scale, operands.weights)
    many_tokens = operands.problem.m > tuning.M_BUCKETS[-1]
    return lowered.compile(compiler_options=WITHOUT_TRITON if many_tokens else None)


@jax.jit
def max_rel_error(out: jax.Array, expected: jax.Array) -> jax.Array:
    """The largest difference, by the largest value expected."""
    return jnp.max(jnp.abs(out.astype(jnp.float32) - expected)) / jnp.max(jnp.abs(expected))


def kernel_us(program: Callable[..., Any], operands: Operands, repeats: int = 7) -> list[float]:
    """Microseconds of kernel time per product, sorted, one figure a repetition."""
    from jax.experimental.mosaic.gpu import profiler

    _, times = profiler.measure(program, iterations=repeats)(
        operands.x, operands.input_scale, operands.weights
    )
    return sorted(t * 1e3 / len(operands.weights) for t in times)


def read_bandwidth() -> float:
    """Bytes a second that the sum of a gigabyte reads: the limit of what streams weights."""
    from jax.experimental.mosaic.gpu import profiler

    big = jax.random.normal(jax.random.key(0), (1 << 28,), jnp.float32)
    _, times = profiler.measure(jax.jit(jnp.sum), iterations=7)(big)
    return big.nbytes / (float(np.median(times)) * 1e-3)


def limit_us(problem: Problem, bandwidth: float) -> float:
    """Microseconds below which no kernel can come on this card."""
    weight = problem.n * problem.k * tuning.BITS[problem.scheme] / 8
    scales = 2 * problem.n * (problem.k // problem.group_size if problem.group_size else 1)
    operations = 2 * problem.m * problem.n * problem.k
    return max((weight + scales) / bandwidth, operations / OPERATIONS[problem.scheme]) * 1e6


def torch_peers(weights: Iterable[tuple[int, int, Sequence[int]]]) -> dict[str, float]:
    """PyTorch's products of weights `[N, K]` with so many tokens on this card, microseconds by
    "N,K,M,name": CUDA graphs over rotating weights. Empty without PyTorch."""
    try:
        import torch
    except ImportError:
        return {}
    found: dict[str, float] = {}
    for n, k, tokens in weights:
        for m in tokens:
            for name, calls in _torch_calls(torch, m, n, k).items():
                try:
                    found[f"{n},{k},{m},{name}"] = round(_graph_us(torch, calls()), 2)
                except RuntimeError as error:
                    print(f"torch {name} {n}x{k} M={m}: {str(error)[:90]}", file=sys.stderr)
                torch.cuda.empty_cache()
    return found


def _torch_calls(torch: Any, m: int, n: int, k: int) -> dict[str, Callable[[], list[Any]]]:
    """By name, what makes the calls to time: one for each of several weights."""
    on_gpu = {"device": "cuda"}
    copies = max(3, min(24, int(4 * L2_BYTES / (n * k)) + 1))
    one = torch.ones((), **on_gpu)
    row, column = torch.ones(max(m, 16), 1, **on_gpu), torch.ones(1, n, **on_gpu)
    x = torch.randn(m, k, dtype=torch.bfloat16, **on_gpu)

    def bf16() -> list[Any]:
        weights = [torch.randn(n, k, dtype=torch.bfloat16, **on_gpu) for _ in range(copies)]
        return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]

    def fp8(scale_a: Any, scale_b: Any) -> list[Any]:
        tokens = torch.randn(max(m, 16), k, **on_gpu).to(torch.float8_e4m3fn)
        weights = [torch.randn(n, k, **on_gpu).to(torch.float8_e4m3fn).t() for _ in range(copies)]
        scales = {"scale_a": scale_a, "scale_b": scale_b, "out_dtype": torch.bfloat16}
        return [lambda w=w: torch._scaled_mm(tokens, w, **scales) for w in weights]

    def int8() -> list[Any]:
        def codes(rows: int) -> Any:
            return torch.randint(-127, 127, (rows, k), dtype=torch.int8, **on_gpu)

        tokens, weights = codes(max(m, 32)), [codes(n).t() for _ in range(copies)]
        return [lambda w=w: torch._int_mm(tokens, w) for w in weights]

    def tinygemm() -> list[Any]:
        groups = torch.randn(k // 128, n, 2, dtype=torch.bfloat16, **on_gpu)
        weights = [
            torch._convert_weight_to_int4pack(
                torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, **on_gpu), 8
            )
            for _ in range(2 * copies)
        ]
        return [lambda w=w: torch._weight_int4pack_mm(x, w, 128, groups) for w in weights]

    calls: dict[str, Callable[[], list[Any]]] = {
        "torch bf16": bf16,
        "_scaled_mm tensor": lambda: fp8(one, one),
        "_scaled_mm row": lambda: fp8(row, column),
        "_int_mm": int8,
    }
    return calls | ({"tinygemm": tinygemm} if m <= 64 else {})


def _graph_us(torch: Any, calls: list[Callable[[], Any]]) -> float:
    """Median microseconds of a call, all of them replayed as one CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return float(np.median(times[2:]))


_PEERS = {
    "w4a16": ("tinygemm", "torch bf16"),
    "w8a16": ("torch bf16",),
    "w8a8": ("_int_mm", "torch bf16"),
    "fp8": ("_scaled_mm tensor", "_scaled_mm row", "torch bf16"),
}


def measure(
    weights: Weights,
    m: int,
    *,
    bandwidth: float,
    torch: dict[str, float],
    with_xla: bool,
    lock: Path,
) -> dict[str, Any]:
    """One record: our product as dispatched, its limit, its peers.

    All that runs on the GPU does so under the lock: with the work of others between, milliseconds
    become ten. So does what XLA compiles, which it times to choose.
    """
    scheme, n, k = weights.scheme, weights.n, weights.k
    operands = make_operands(weights, m, lock)
    by_library = tuning.X_BYTES[scheme] == 2 and m >= tuning.DENSE_M
    with exclusive(lock if by_library else None):
        start = time.perf_counter()
        program = compile_all(product(operands, None), operands)
        seconds = time.perf_counter() - start
    with exclusive(lock):
        out = program(operands.x, operands.input_scale, operands.weights)[0]
        error = float(max_rel_error(out, operands.expected))
        times = kernel_us(program, operands)
    peers: dict[str, float] = {
        name: torch[f"{n},{k},{m},{name}"]
        for name in _PEERS[scheme]
        if f"{n},{k},{m},{name}" in torch
    }
    if scheme == "w4a16" and (n, k, m) in MARLIN_H100:
        peers["marlin (quoted, H100)"] = MARLIN_H100[n, k, m]
    if with_xla and tuning.X_BYTES[scheme] == 1:
        with exclusive(lock):
            by_xla = compile_all(xla_product(operands), operands)
            peers["xla"] = round(float(np.median(kernel_us(by_xla, operands))), 2)
    config = None
    if not by_library:
        config = tuning.to_record(tuning.choose(operands.problem, jax.devices()[0].device_kind))
    return new_record(
        "matmul",
        scheme=scheme,
        m=m,
        n=n,
        k=k,
        metric="us",
        value=round(float(np.median(times)), 2),
        spread=[round(times[0], 2), round(times[-1], 2)],
        limit=round(limit_us(operands.problem, bandwidth), 2),
        max_rel_error=float(f"{error:.2e}"),
        compile_s=round(seconds, 1),
        kernel=config["kernel"] if config else "dequantize + library",
        config=config["config"] if config else None,
        peers=peers,
    )


def prepare(folder: Path, of_torch: list[tuple[int, int, list[int]]]) -> None:
    """Measure what all workers compare with, while nothing else runs on the GPU."""
    torch = torch_peers(of_torch) if of_torch else {}
    found = {"bandwidth": read_bandwidth(), "torch": torch}
    (folder / PREPARED).write_text(json.dumps(found))


def worker(scheme: Scheme, n: int, k: int, folder: Path, tokens: Sequence[int], xla: bool) -> None:
    """Measure one weight, and print a record for each number of tokens."""
    prepared = json.loads((folder / PREPARED).read_text())
    lock = folder / "gpu.lock"
    weights = make_weights(scheme, n, k, lock)
    for m in tokens:
        record = measure(weights, m, **prepared, with_xla=xla, lock=lock)
        print(json.dumps(record), flush=True)


# -- the parent ------------------------------------------------------------------------------------


def bench_matmul(
    cells: Mapping[tuple[Scheme, int, int], Sequence[int]],
    *,
    xla: bool = True,
    torch: bool = True,
    processes: int | None = None,
    timeout: float = 600.0,
) -> Iterator[dict[str, Any]]:
    """The records of `(scheme, N, K)` at so many tokens, as they come."""
    weights: dict[tuple[int, int], set[int]] = {}
    for (_, n, k), tokens in cells.items():
        weights.setdefault((n, k), set()).update(tokens)
    with tempfile.TemporaryDirectory() as name:
        of_torch = [[n, k, sorted(tokens)] for (n, k), tokens in weights.items()] if torch else []
        _run(["--prepare", json.dumps(of_torch)], name, timeout)
        if not Path(name, PREPARED).exists():
            return

        def run(cell: tuple[Scheme, int, int]) -> list[dict[str, Any]]:
            arguments = ["--worker", ",".join(map(str, cell)), "--tokens", *map(str, cells[cell])]
            output = _run([*arguments, *([] if xla else ["--no-xla"])], name, timeout)
            return [json.loads(line) for line in output.splitlines() if line.startswith("{")]

        with ThreadPoolExecutor(processes or max(1, (os.cpu_count() or 2) - 2)) as pool:
            # The largest first: they take longest.
            order = sorted(cells, key=lambda cell: -cell[1] * cell[2] * len(cells[cell]))
            for future in as_completed([pool.submit(run, cell) for cell in order]):
                yield from future.result()


def _run(arguments: list[str], folder: str, timeout: float) -> str:
    """What this script prints with `arguments`; one that fails or hangs costs its own cells."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, __file__, "--folder", folder, *arguments]
        try:
            subprocess.run(
                command, stdout=output, stderr=errors, env=environment, timeout=timeout, check=True
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            errors.seek(0)
            print(f"{arguments}: {error}\n{errors.read()[-1000:]}", file=sys.stderr, flush=True)
        output.seek(0)
        return output.read()


def parse_shape(text: str) -> tuple[int, int]:
    """ "N,K" as an option names it."""
    n, k = map(int, text.split(","))
    return n, k


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 where a cell is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="merge the records into this file")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        default=SHAPES,
        metavar="N,K",
        help="those of Llama-3.1-8B and 3.3-70B, whole and halved",
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, help="1 16 64 256 2048; for two, 1 to 8192"
    )
    parser.add_argument("--no-xla", action="store_true", help="skip XLA, whose search is slow")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--processes", type=int, help="at once; the cores less two")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of a process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.prepare is not None:
        prepare(args.folder, args.prepare)
        return 0
    if args.worker:
        scheme, n, k = args.worker.split(",")
        worker(scheme, int(n), int(k), args.folder, args.tokens, not args.no_xla)
        return 0
    cells = {
        (scheme, n, k): args.tokens or (EVERY_POWER if (n, k) in LLAMA_8B[2:] else TOKENS)
        for n, k in args.shapes
        for scheme in args.schemes
    }
    missing = sum(map(len, cells.values()))
    for record in bench_matmul(
        cells,
        xla=not args.no_xla,
        torch=not args.no_torch,
        processes=args.processes,
        timeout=args.timeout,
    ):
        missing -= 1
        print(
            f"{record['scheme']:6} {record['n']}x{record['k']} M={record['m']}: "
            f"{record['value']} us, limit {record['limit']}, error {record['max_rel_error']:.1e}, "
            f"{record['kernel']}, {record['peers']}",
            flush=True,
        )
        if args.json:
            merge_records(args.json, [record])
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
