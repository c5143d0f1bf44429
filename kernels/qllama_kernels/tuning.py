"""Which kernel, and which cut of the work, for a product: measured tables and a rule beyond them.

`configs/<device>.json` holds what `benchmarks/tune.py` found fastest on a device. A product that is
in no table gets `heuristic`, a small model of what bounds the kernels; one of more tokens than are
tuned, `for_many_tokens`.
"""

import functools
import json
import math
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any, Literal

from qllama_kernels.batch_matmul import BatchConfig
from qllama_kernels.decode_matmul import DecodeConfig
from qllama_kernels.fragments import COLUMNS, ROWS
from qllama_kernels.mosaic import SHARED_MEMORY

# "fp8_block": float8 weights scaled by blocks of 128x128, tokens by 128 columns.
Scheme = Literal["w4a16", "w8a16", "w8a8", "fp8", "fp8_block"]
Config = DecodeConfig | BatchConfig

BITS: dict[Scheme, int] = {"w4a16": 4, "w8a16": 8, "w8a8": 8, "fp8": 8, "fp8_block": 8}
X_BYTES: dict[Scheme, int] = {"w4a16": 2, "w8a16": 2, "w8a8": 1, "fp8": 1, "fp8_block": 1}
M_BUCKETS = (8, 16, 32, 64, 128, 256)
# From this many tokens on, weight-only products dequantize the weight once and leave the rest to
# the library: dequantizing it again for every 128 tokens costs more than writing it out. On an H100
# both take the same time here, within 2 % for four shapes.
DENSE_M = 2048
STREAMING_MULTIPROCESSORS = 132  # of an H100 and an H200
_KERNELS: dict[str, type[Config]] = {"decode": DecodeConfig, "batch": BatchConfig}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What decides a config: `[m, k] · [n, k]ᵀ` under a scheme."""

    scheme: Scheme
    m: int
    n: int
    k: int
    group_size: int | None = None

    @property
    def bucket(self) -> int:
        """m rounded up to one of the sizes that are tuned, or their largest."""
        return next((b for b in M_BUCKETS if self.m <= b), M_BUCKETS[-1])


def shared_memory(problem: Problem, config: Config) -> int:
    """Bytes of shared memory that a kernel takes, barriers aside."""
    bits, x_bytes = BITS[problem.scheme], X_BYTES[problem.scheme]
    total = config.shared_memory(problem.k, bits=bits, x_bytes=x_bytes)
    if problem.scheme == "fp8_block":  # scales of the tokens with each stage, of the weight once
        tokens = config.stages * config.blocks * max(config.block_m, 32)
        return total + 4 * (tokens + 2 * (problem.k // COLUMNS + 4)) + 2048
    if problem.group_size:  # scales and zeros, of four bytes at most
        groups = config.blocks * COLUMNS // min(problem.group_size, COLUMNS)
        total += config.stages * config.warpgroups * groups * ROWS * 8
    return total + 2048


def fits(problem: Problem, config: Config) -> bool:
    """Whether the kernel can run at all."""
    return shared_memory(problem, config) <= SHARED_MEMORY


def candidates(problem: Problem) -> list[Config]:
    """What is worth timing: every config that fits, less those that plainly waste the device."""
    configs: list[Config] = []
    tiles = -(-problem.n // ROWS)
    block_m = problem.bucket
    if block_m <= 32 and problem.scheme != "fp8_block":
        for splits in (1, 2, 4, 8):
            for warpgroups, per_sm in ((4, 1), (2, 2)):
                ctas = min(tiles, per_sm * STREAMING_MULTIPROCESSORS // splits)
                for blocks, stages in ((1, 2), (1, 3), (1, 4), (1, 6), (2, 2), (2, 3), (2, 4)):
                    decode = DecodeConfig(
                        block_m=block_m,
                        ctas=ctas,
                        splits=splits,
                        warpgroups=warpgroups,
                        blocks=blocks,
                        stages=stages,
                    )
                    wasted = decode.k_slice(problem.k) * splits > 1.15 * problem.k
                    if per_sm * shared_memory(problem, decode) <= SHARED_MEMORY and not wasted:
                        configs.append(decode)
    # Sums of 256 tokens leave no registers to turn codes into floats, or for sums of one block.
    in_memory = problem.scheme in ("w8a8", "fp8")
    for tile in {min(block_m, 128), block_m if in_memory else 128}:
        if tile > block_m:
            continue
        for warpgroups in (1, 2, 4):
            if warpgroups * tile > (512 if in_memory else 256):
                continue  # registers
            ctas = -(-tiles // warpgroups) * -(-problem.m // tile)
            for splits in (1, 2, 4, 8):
                if splits > 1 and ctas * splits > 8 * STREAMING_MULTIPROCESSORS:
                    continue
                for blocks, stages in _rings(tile, warpgroups, in_memory):
                    config = BatchConfig(
                        block_m=tile,
                        warpgroups=warpgroups,
                        blocks=blocks,
                        stages=stages,
                        splits=splits,
                    )
                    if fits(problem, config):
                        configs.append(config)
    return configs


def _rings(tile: int, warpgroups: int, in_memory: bool) -> list[tuple[int, int]]:
    """Blocks of a stage and stages of a batch kernel, less those that leave no registers."""
    rings = [(1, 3), (1, 4), (1, 6)]
    alone = in_memory and warpgroups == 1
    halved = warpgroups == 4 and tile >= 32 and not in_memory  # by so many threads
    if alone or (tile < 128 and not halved):
        rings += [(2, 2), (2, 3), (2, 4)]
    if alone:
        rings += [(2, 6), (2, 8), (4, 3), (4, 4), (4, 5)]  # see `_known_best`
    return rings


def ranked(problem: Problem) -> list[Config]:
    """`candidates`, the most promising first."""
    known = _known_best(problem)
    return sorted(candidates(problem), key=lambda c: (c != known, _estimate(problem, c)))


def _known_best(problem: Problem) -> Config | None:
    """What was fastest, or within 4 %, for all 8-bit products of a kind tuned on an H100."""
    if problem.scheme not in ("w8a8", "fp8"):
        return None
    tiles = -(-problem.n // ROWS)
    if problem.m > 128:
        many = for_many_tokens(problem)
        return many if many.block_m == 256 else None
    if problem.m <= 64 and STREAMING_MULTIPROCESSORS // 3 <= tiles <= STREAMING_MULTIPROCESSORS:
        # A tile to a multiprocessor, all of whose memory is in flight, is as fast as splits of K,
        # and leaves nothing to be added up.
        blocks, stages = (4, 4) if problem.m <= 32 else (2, 6)
        return BatchConfig(block_m=problem.bucket, warpgroups=1, blocks=blocks, stages=stages)
    return None


def heuristic(problem: Problem) -> Config:
    """A config for a product in no table."""
    return ranked(problem)[0]


def _estimate(problem: Problem, config: Config) -> float:
    """Microseconds, roughly: only their order matters. Fitted to what an H200 measured."""
    bits, x_bytes = BITS[problem.scheme], X_BYTES[problem.scheme]
    tiles, warpgroups = -(-problem.n // ROWS), config.warpgroups
    stream = 115e3 if bits == 4 else 158e3  # bytes of weight a microsecond and multiprocessor
    columns = config.stages * config.blocks * COLUMNS  # on their way to one CTA or warpgroup
    if isinstance(config, DecodeConfig):
        k: float = config.k_slice(problem.k)
        resident = -(-config.ctas * config.splits // STREAMING_MULTIPROCESSORS)
        rows = -(-tiles // config.ctas) * ROWS * resident
        time = 2.68 + rows * k * bits / 8 / stream
        time += resident * config.block_m * k * x_bytes / 177e3
        in_flight = columns * warpgroups * ROWS * bits / 8 * resident
        time *= 0.55 if warpgroups == 2 else 1.0
    else:
        k = problem.k / config.splits
        ctas = -(-tiles // warpgroups) * -(-problem.m // config.block_m) * config.splits
        per_thread = 90 + config.block_m if x_bytes == 2 else 40 + 0.55 * config.block_m
        resident = min(
            max(1, int(2048 * 0.276 / (128 * warpgroups))),
            max(1, int(65536 / (per_thread * 128 * warpgroups))),
            max(1, 232448 // shared_memory(problem, config)),
            -(-ctas // STREAMING_MULTIPROCESSORS),
        )
        waves = math.ceil(ctas / STREAMING_MULTIPROCESSORS / resident) * resident
        weight = warpgroups * ROWS * k * bits / 8
        tokens = config.block_m * k * x_bytes
        operations = 2 * warpgroups * ROWS * config.block_m * k
        rate = 2.27e6 if x_bytes == 2 else 6.42e6
        busy = min(1.0, resident * warpgroups / 4.17) ** 0.28
        time = 1.87 + waves * max(weight / stream + tokens / 85.4e3, operations / rate) / busy
        in_flight = columns * resident * (warpgroups * ROWS * bits / 8 + config.block_m * x_bytes)
        time *= {1: 1.16, 2: 1.0}.get(warpgroups, 1.47)
    if config.splits > 1:
        time += 2.11 + config.splits * problem.m * problem.n * 8 / 1.4e6
    return time * max(1.0, 151e3 / in_flight) ** 0.685 / config.blocks**0.045


@functools.cache
def table(device_kind: str) -> dict[tuple[str, int, int, int], dict[str, Any]]:
    """`(scheme, n, k, bucket)` -> record of `benchmarks/tune.py`; empty for an unknown device.

    What was not timed on an H100 comes from the H200, which is the same chip with faster memory.
    """
    names = ["nvidia_h200.json"] if "H100" in device_kind else []
    names.append(device_kind.lower().replace(" ", "_") + ".json")
    files = [resources.files("qllama_kernels").joinpath("configs", name) for name in names]
    records = [r for file in files if file.is_file() for r in json.loads(file.read_text())]
    return {(r["scheme"], r["n"], r["k"], r["m"]): r for r in records}


def for_many_tokens(problem: Problem) -> Config:
    """A config for more tokens than are tuned: tensor cores bind, and what tiles load from L2.

    8-bit tiles of 256 tokens load less for the same work; tiles of 128 leave fewer multiprocessors
    idle at the end. Fitted to what an H100 measured with 512 to 2048 tokens.
    """
    if problem.scheme not in ("w8a8", "fp8"):  # registers: see `candidates`
        # Blocks of float8: 64 tokens are up to a tenth faster.
        block_m, warpgroups = (64, 4) if problem.scheme == "fp8_block" else (128, 2)
        config = BatchConfig(block_m=block_m, warpgroups=warpgroups, blocks=1, stages=4)
        return config if fits(problem, config) else replace(config, stages=3)

    def rounds(block_m: int) -> int:
        tiles = -(-problem.n // (2 * ROWS)) * -(-problem.m // block_m)
        return -(-tiles // STREAMING_MULTIPROCESSORS)

    small = rounds(128)
    small_is_faster = small * (1.2 if small > 1 else 1.0) < 2 * rounds(256)
    return BatchConfig(
        block_m=128 if small_is_faster else 256,
        warpgroups=2,
        blocks=1,
        stages=6 if small_is_faster else 4,
    )


def choose(problem: Problem, device_kind: str = "") -> Config:
    """The config to run: the table's where it has one that fits, else a rule's."""
    if problem.m > M_BUCKETS[-1]:
        return for_many_tokens(problem)
    record = table(device_kind).get((problem.scheme, problem.n, problem.k, problem.bucket))
    if record is not None and fits(problem, from_record(record)):
        return from_record(record)
    return heuristic(problem)


# Ours leaves its partial sums to the next kernel and scales its own sums. In a model XLA's products
# of few tokens took a kernel more than when they were timed alone, worth a third of their time.
_XLA_MARGIN = 4 / 3


def xla_is_faster(problem: Problem, device_kind: str = "") -> bool:
    """Whether XLA was measured to beat the best kernel, by what that is worth in a model."""
    if problem.m > M_BUCKETS[-1] or X_BYTES[problem.scheme] == 2:
        return False
    record = table(device_kind).get((problem.scheme, problem.n, problem.k, problem.bucket))
    if record is None or record["us"] is None or record["xla_us"] is None:
        return False
    return record["xla_us"] * _XLA_MARGIN < record["us"]


def to_record(config: Config) -> dict[str, Any]:
    """A config as JSON has it."""
    kernel = next(name for name, cls in _KERNELS.items() if isinstance(config, cls))
    return {"kernel": kernel, "config": asdict(config)}


def from_record(record: dict[str, Any]) -> Config:
    """The inverse of `to_record`."""
    return _KERNELS[record["kernel"]](**record["config"])
