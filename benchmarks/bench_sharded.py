"""Decoding speed of models split over the GPUs of one machine.

    python benchmarks/bench_sharded.py --json benchmarks/results/sharded-2xh100.json
    python benchmarks/bench_sharded.py --shape llama-3.1-8b --scheme W4A16 --size 1 2 --batch 1 64

A checkpoint has one random decoder layer, which is loaded again and again until the model has as
many as its shape: all of them lie on the devices and run, while disk and host hold one. The models
load and compile side by side, each in a process of its own, and are then timed one after the
other: the cards must hold all their weights. A step is the difference between generating many
tokens and a few. `limit` is what one card's measured read bandwidth allows with the weights, keys
and values that it holds. `parts` are of one step and card: `collectives` as traced, `sums alone`
the same all-reduces with nothing between them, both in microseconds, `held` and `planned` the
bytes of the weights on it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from qllama_convert.checkpoint import Checkpoint, TensorInfo
from qllama_convert.orbax_arrays import OrbaxArray

FIRST = "model.layers.0."


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and over how many devices it is split."""

    shape: str
    scheme: str
    size: int
    batches: tuple[int, ...]
    context: int = 128
    layers: int | None = None  # None: as many as the shape has


CASES = (
    Case(shape="llama-3.3-70b", scheme="W8A8", size=2, batches=(1, 32)),
    *(
        Case(shape="llama-3.1-8b", scheme=scheme, size=size, batches=(1, 64))
        for scheme in ("W4A16", "FP8_DYNAMIC")
        for size in (1, 2)
    ),
)


class RepeatedCheckpoint(Checkpoint):
    """A checkpoint of one decoder layer as one of many."""

    def __init__(self, folder: Path, layers: int) -> None:
        super().__init__(folder)
        self.config = self.config | {"num_hidden_layers": layers}
        self.tensors = dict(_repeated(self.tensors.items(), layers))

    def read(self, name: str) -> np.ndarray:
        array = super().read(_original(name))
        self.ignore(name)
        return array

    def view(self, name: str) -> np.ndarray | OrbaxArray:
        array = super().view(_original(name))
        self.ignore(name)
        return array


def _repeated(
    tensors: Iterable[tuple[str, TensorInfo]], layers: int
) -> Iterable[tuple[str, TensorInfo]]:
    for name, info in tensors:
        if name.startswith(FIRST):
            for i in range(layers):
                yield f"model.layers.{i}.{name.removeprefix(FIRST)}", info
        else:
            yield name, info


def _original(name: str) -> str:
    if not name.startswith("model.layers."):
        return name
    return FIRST + name.removeprefix("model.layers.").partition(".")[2]


# -- a process that is measured --------------------------------------------------------------------


def measure(
    folder: Path, case: Case, repeat: int, wait: Callable[[], object] = lambda: None
) -> Iterator[dict[str, Any]]:
    """Time a decode step of the model in `folder`, greedy, random tokens, for each batch.

    `wait` is called when everything is compiled.
    """
    import bench_decode as decode
    import jax

    from qllama import LLM, SamplingParams, llm

    assert case.layers is not None
    layers = case.layers
    llm.open_checkpoint = lambda path: RepeatedCheckpoint(Path(path), layers)  # type: ignore[assignment]
    begin = time.perf_counter()
    model = LLM(
        folder,
        tensor_parallel_size=case.size,
        max_model_len=case.context + decode.MANY,
        max_num_seqs=max(case.batches),
    )
    loaded = time.perf_counter() - begin
    random = np.random.default_rng(0)
    vocab_size = model.config.vocab_size

    def seconds(batch: int, count: int) -> float:
        ids = random.integers(0, vocab_size, (batch, case.context))
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        begin = time.perf_counter()
        model.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
        return time.perf_counter() - begin

    few, many = decode.FEW, decode.MANY
    for batch in case.batches:
        for count in (few, many):
            seconds(batch, count)
    wait()
    weights = decode.bytes_a_step(model) / case.size
    cached = decode.bytes_a_token(model) * (case.context + (few + many) / 2) / case.size
    bandwidth = decode.read_bandwidth()
    for batch in case.batches:
        for count in (few, many):
            seconds(batch, count)
        steps = [(seconds(batch, many) - seconds(batch, few)) / (many - few) for _ in range(repeat)]
        short, long = (decode.traced(lambda n=n, b=batch: seconds(b, n)) for n in (few, many))
        long.subtract(short)
        kernels = {name: ns / (many - few) / 1e3 for name, ns in long.most_common()}
        yield {
            "batch": batch,
            "context": case.context,
            "steps": steps,
            "limit": (weights + batch * cached) / bandwidth,
            "parts": {
                "matmuls": _total(kernels, lambda name: decode.kind(name) == "matmuls"),
                "collectives": _total(kernels, _is_collective),
                "sums alone": round(sums_alone(model, batch), 1),
                "held": held_bytes(model),
                "planned": planned_bytes(model, case.size),
                "load_s": round(loaded, 1),
            },
            "kernels": {name[:70]: round(us, 1) for name, us in list(kernels.items())[:24]},
            "devices": [device.device_kind for device in jax.devices()[: case.size]],
        }


def _total(kernels: dict[str, float], belongs: Any) -> float:
    return round(sum(us for name, us in kernels.items() if belongs(name)), 1)


def _is_collective(kernel: str) -> bool:
    name = kernel.lower().replace("_", "").replace("-", "")
    return any(word in name for word in ("nccl", "allreduce", "allgather", "psum"))


def sums_alone(model: Any, batch: int) -> float:
    """Microseconds of one step's all-reduces, one after the other and nothing else."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from qllama.parallel.layers import all_reduce
    from qllama.parallel.mesh import replicas, replicated
    from qllama.parallel.placement import partition_specs

    (mesh,) = replicas(model.mesh)
    if mesh.size == 1:
        return 0.0
    count = 2 * model.config.num_hidden_layers
    peers = model.model.layers[0].mlp.down_proj.peers
    addresses = None if peers is None else peers[...]

    def sums(x: jax.Array, addresses: jax.Array | None) -> jax.Array:
        x = all_reduce(x) * (1 / mesh.size)  # the embedding's
        for _ in range(count):
            x = all_reduce(x, addresses) * (1 / mesh.size)
        return x

    everywhere = PartitionSpec()
    program = jax.jit(
        jax.shard_map(
            sums,
            mesh=mesh,
            in_specs=(everywhere, partition_specs(addresses)),
            out_specs=everywhere,
            check_vma=False,
        )
    )
    x = jax.device_put(
        jnp.ones((batch, 1, model.config.hidden_size), model.dtype), replicated(mesh)
    )
    program(x, addresses).block_until_ready()
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        program(x, addresses).block_until_ready()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def held_bytes(model: Any) -> int:
    """Bytes of the weights on the first device."""
    import jax

    first = model.mesh.devices.flat[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(model.model)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


def planned_bytes(model: Any, size: int) -> int:
    """What `LLM` expected there before it loaded."""
    import jax
    from qllama_convert.names import weight_shapes

    from qllama.parallel.memory import plan_memory

    specs = model.quantization.linears if model.quantization else {}
    return plan_memory(
        model.config,
        weight_shapes(model.config),
        {path: spec.scheme for path, spec in specs.items()},
        size=size,
        dtype=model.dtype,
        cache_dtype=model.kv_cache_dtype,
        dequantized=jax.default_backend() != "gpu",
    ).weights


# -- the parent ------------------------------------------------------------------------------------


def bench_sharded(
    cases: Sequence[Case], scratch: Path | None, *, repeat: int = 5, timeout: float = 300.0
) -> Iterator[list[dict[str, Any]]]:
    """For each case one record for each batch, as they come; `value` in tokens per second."""
    from make_checkpoint import SHAPES, random_checkpoint
    from records import new_record

    cases = [
        replace(case, layers=case.layers or SHAPES[case.shape]["num_hidden_layers"])
        for case in cases
    ]
    with tempfile.TemporaryDirectory(dir=scratch) as scratch_folder:
        folders = {case: Path(scratch_folder, case.shape, case.scheme) for case in cases}
        for (shape, scheme), folder in {(c.shape, c.scheme): f for c, f in folders.items()}.items():
            random_checkpoint(folder, shape=shape, scheme=scheme, layers=1)
        for case, cells in measure_apart(folders, repeat, timeout):
            records = []
            for cell in cells:
                rates = sorted(cell["batch"] / step for step in cell["steps"])
                record = new_record(
                    "decode",
                    devices=case.size,
                    model=case.shape,
                    layers=case.layers,
                    scheme=case.scheme,
                    batch=cell["batch"],
                    context=case.context,
                    metric="tokens_per_second",
                    value=round(statistics.median(rates), 1),
                    spread=[round(rates[0], 1), round(rates[-1], 1)],
                    limit=round(cell["batch"] / cell["limit"], 1),
                    parts=cell["parts"],
                    peers={},
                )
                print(json.dumps(record), flush=True)
                for name, us in cell["kernels"].items():
                    print(f"    {us:8.1f} us  {name}")
                records.append(record)
            yield records


def measure_apart(
    folders: dict[Case, Path], repeat: int, timeout: float
) -> Iterator[tuple[Case, Iterable[dict[str, Any]]]]:
    """`measure` of all cases, in processes that load side by side and measure in turn."""
    from bench_decode import run_in_turn

    commands = {
        case: [
            *(sys.executable, __file__, "--measure", str(folder)),
            *("--case", json.dumps(asdict(case)), "--repeat", str(repeat)),
        ]
        for case, folder in folders.items()
    }
    for case, cells in run_in_turn(commands, timeout):
        yield case, cells.values()


def compare(records: list[dict[str, Any]]) -> None:
    """Name the rate on one device as a peer of the same model on several."""

    def cell(record: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(record[key] for key in ("model", "layers", "scheme", "batch", "context"))

    alone = {cell(record): record["value"] for record in records if record["devices"] == 1}
    for record in records:
        if record["devices"] > 1 and cell(record) in alone:
            record["peers"]["qllama on one device"] = alone[cell(record)]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 where a case failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="merge the records into this file")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where checkpoints are made")
    parser.add_argument("--repeat", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--timeout", type=int, default=300, help="seconds to load and compile")
    one = parser.add_argument_group("other than the standard cases")
    one.add_argument("--shape", metavar="NAME", help="of make_checkpoint, such as llama-3.1-8b")
    one.add_argument("--scheme", default="W8A8")
    one.add_argument("--size", nargs="+", type=int, default=[1, 2], help="devices")
    one.add_argument("--batch", nargs="+", type=int, default=[1])
    one.add_argument("--context", type=int, default=128)
    one.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:

        def wait() -> None:
            print("READY", flush=True)
            input()

        for cell in measure(options.measure, Case(**options.case), options.repeat, wait):
            print("CELL" + json.dumps(cell), flush=True)
        return 0
    cases = CASES
    if options.shape is not None:
        cases = tuple(
            Case(
                shape=options.shape,
                scheme=options.scheme,
                size=size,
                batches=tuple(options.batch),
                context=options.context,
                layers=options.layers,
            )
            for size in options.size
        )
    records: list[dict[str, Any]] = []
    for found in bench_sharded(
        cases, options.scratch, repeat=options.repeat, timeout=options.timeout
    ):
        records += found
        compare(records)
        if options.json is not None:
            from records import merge_records

            merge_records(options.json, records)
    return int(len(records) < sum(len(case.batches) for case in cases))


if __name__ == "__main__":
    sys.exit(main())
