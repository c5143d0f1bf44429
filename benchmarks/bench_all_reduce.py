"""Sums over the GPUs of one machine at the sizes of decoding: NCCL's, XLA's own kernel, and ours.

    python benchmarks/bench_all_reduce.py --json benchmarks/results/all-reduce-2xh100.json

Every implementation is a process of its own with a time limit, for a sum that goes wrong may hang.
A figure is of 64 sums in one program, each of the mean that the one before gave, in microseconds.
`max_rel_error` is that of the last against float32 on the host; devices must agree bit for bit.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from qllama_kernels import all_reduce

from qllama.engine.runner import ONE_SHOT_SUMS
from qllama.parallel.mesh import MODEL, make_mesh

IMPLEMENTATIONS = ("psum", "psum one-shot", "peer memory")
CHAIN = 64


def measure(
    implementation: str, rows: Sequence[int], width: int, *, size: int, repeat: int = 15
) -> Iterator[dict[str, Any]]:
    """A record for each number of rows `[rows, width]` bfloat16, over `size` devices.

    Raises:
        RuntimeError: the devices do not get the same bits.
        NotImplementedError: they cannot write to each other.
    """
    from records import new_record

    mesh, split = make_mesh(size), PartitionSpec(MODEL)
    connected = all_reduce.connect(mesh) if implementation == "peer memory" else None
    peers = None if connected is None else connected.addresses
    options = ONE_SHOT_SUMS if implementation == "psum one-shot" else None

    def chain(x: jax.Array, peers: jax.Array | None) -> jax.Array:
        # An XLA collective, for the devices to meet (see `all_reduce`); it changes nothing.
        x = x + (0 * lax.psum(x.ravel()[:1].astype(jnp.float32), MODEL)[0]).astype(x.dtype)
        backend: all_reduce.Backend = "xla" if peers is None else "pallas"
        for _ in range(CHAIN):
            x = all_reduce.all_reduce(x, MODEL, peers=peers, backend=backend) * (1 / size)
        return x

    for m in rows:
        host = np.random.default_rng(m).normal(size=(size, m, width)).astype(jnp.bfloat16)
        x = jax.device_put(host, NamedSharding(mesh, split))
        mapped = jax.shard_map(
            chain,
            mesh=mesh,
            in_specs=(split, None if peers is None else split),
            out_specs=split,
            check_vma=False,
        )
        program = jax.jit(mapped).lower(x, peers).compile(compiler_options=options)
        found = np.asarray(program(x, peers), np.float32)
        if not (found == found[:1]).all():
            raise RuntimeError(f"{implementation}: devices got different sums of [{m}, {width}]")
        expected = host.astype(np.float32).mean(axis=0)
        error = np.abs(found[0] - expected).max() / np.abs(expected).max()
        times = sorted(_microseconds(lambda p=program, x=x: p(x, peers)) for _ in range(repeat))
        yield new_record(
            "all_reduce",
            devices=size,
            implementation=implementation,
            m=m,
            n=width,
            metric="us",
            value=round(statistics.median(times), 2),
            spread=[round(times[0], 2), round(times[-1], 2)],
            max_rel_error=float(f"{error:.2e}"),
        )


def _microseconds(run: Callable[[], jax.Array]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return (time.perf_counter() - begin) / CHAIN * 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="merge the records into this file")
    parser.add_argument("--size", type=int, default=2, help="devices (%(default)s)")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for each")
    parser.add_argument("--one", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        for record in measure(args.one, args.rows, args.width, size=args.size):
            print(json.dumps(record), flush=True)
        return
    sizes = ["--size", str(args.size), "--width", str(args.width), "--rows", *map(str, args.rows)]
    for name in IMPLEMENTATIONS:
        command = [sys.executable, __file__, "--one", name, *sizes]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=args.timeout)
            output, failed = done.stdout, done.returncode != 0
        except subprocess.TimeoutExpired as error:
            output, failed = (error.stdout or b"").decode(), True
        records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        for record in records:
            print(json.dumps(record), flush=True)
        if failed:
            print(f"{name} failed, or took more than {args.timeout:.0f} s", file=sys.stderr)
        if args.json is not None and records:
            from records import merge_records

            merge_records(args.json, records)


if __name__ == "__main__":
    main()
