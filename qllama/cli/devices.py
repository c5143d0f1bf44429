"""How a machine's GPUs are linked, and how a model would lie on its devices."""

import re
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Link:
    """What connects two GPUs, in the words of `nvidia-smi topo -m`."""

    first: str  # "GPU0"
    second: str
    kind: str  # "NV18": NVLink, 18 links; "PIX", "PHB", "NODE", "SYS": ever further over PCIe

    @property
    def is_nvlink(self) -> bool:
        return self.kind.startswith("NV")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where a checkpoint's weights would lie, without loading it."""

    model: str
    tensor_parallel_size: int
    data_parallel_size: int
    weights: int  # bytes on each device
    cache_per_token: int  # bytes on each device
    free: int  # bytes on each device
    tokens: int  # of key-value cache that fit
    max_model_len: int  # of the model
    problem: str | None  # why it cannot run like that


def links() -> tuple[Link, ...]:
    """Between the GPUs of this machine; none where there is no nvidia-smi to tell."""
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "topo", "-m"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_topology(done.stdout)


def parse_topology(text: str) -> tuple[Link, ...]:
    """The links in the matrix that `nvidia-smi topo -m` prints."""
    rows = [line.split() for line in re.sub(r"\x1b\[\d*m", "", text).splitlines()]
    header = next((row for row in rows if row[:1] == ["GPU0"]), [])
    names = [word for word in header if re.fullmatch(r"GPU\d+", word)]
    return tuple(
        Link(first=row[0], second=second, kind=kind)
        for row in rows
        if row and row[0] in names and row is not header
        for second, kind in zip(names, row[1:], strict=False)
        if names.index(row[0]) < names.index(second)
    )


def plan(model: str | None, tensor_parallel_size: int, data_parallel_size: int) -> Plan:
    """How `model` would lie on the devices of this machine, as `LLM` with its defaults loads it.

    Raises:
        CheckpointError: something is wrong with the folder's config.
        ValueError: a size below 1.
    """
    import jax
    from qllama_convert.checkpoint import open_checkpoint
    from qllama_convert.hub import resolve
    from qllama_convert.names import linear_shapes, weight_shapes
    from qllama_convert.quantization_config import parse_quantization

    from qllama import demo
    from qllama.config import LlamaConfig
    from qllama.device import compute_dtype, device_memory
    from qllama.parallel.memory import check_memory, plan_memory
    from qllama.parallel.mesh import make_mesh
    from qllama.parallel.sharding import check_split

    for name, size in (
        ("tensor_parallel_size", tensor_parallel_size),
        ("data_parallel_size", data_parallel_size),
    ):
        if size < 1:
            raise ValueError(f"{name}={size} must be a positive integer")
    with open_checkpoint(demo.model_path() if model is None else resolve(model)) as checkpoint:
        config = LlamaConfig.from_hf(checkpoint.config)
        shapes = linear_shapes(config)
        quantization = parse_quantization(checkpoint, shapes)
    specs = quantization.linears if quantization else {}
    schemes = {path: spec.scheme for path, spec in specs.items()}
    dtype = compute_dtype("auto", config.dtype)
    quantized_cache = quantization is not None and quantization.kv_cache is not None
    memory = plan_memory(
        config,
        weight_shapes(config),
        schemes,
        size=tensor_parallel_size,
        dtype=dtype,
        cache_dtype=jax.numpy.float8_e4m3fn if quantized_cache else dtype,
        dequantized=jax.default_backend() != "gpu",
    )
    devices = jax.local_devices()
    problem = None
    try:
        check_split(config, shapes, schemes, tensor_parallel_size)
        devices = list(make_mesh(tensor_parallel_size, data_parallel_size).devices.flat)
        check_memory(memory, device_memory(devices), tokens=1)
    except ValueError as error:
        problem = str(error)
    free = device_memory(devices)
    return Plan(
        model=model or "the demo model",
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        weights=memory.weights,
        cache_per_token=memory.cache_per_token,
        free=free,
        tokens=memory.tokens(free),
        max_model_len=config.max_model_len,
        problem=problem,
    )


def plan_rows(found: Plan) -> list[list[str]]:
    """The plan as rows of a table."""
    from qllama.cli.tables import in_units

    replicas, size = found.data_parallel_size, found.tensor_parallel_size
    return [
        [f"plan of {found.model}"],
        ["  mesh", f"data {replicas} x model {size}"],
        ["  weights", f"{in_units(found.weights)} on each device"],
        ["  free", f"{in_units(found.free)} on each device"],
        [
            "  key-value cache",
            f"{in_units(found.cache_per_token)} a token; room for {found.tokens} tokens, the model "
            f"takes {found.max_model_len}",
        ],
        ["  verdict", found.problem or "fits"],
    ]


def link_rows(found: tuple[Link, ...]) -> list[list[str]]:
    """The links as rows of a table, alike ones together."""
    kinds: dict[str, list[str]] = {}
    for link in found:
        kinds.setdefault(link.kind, []).append(f"{link.first}-{link.second}")
    return [
        [
            f"  link {kind}",
            f"{'NVLink' if kind.startswith('NV') else 'no NVLink'}: {', '.join(pairs)}",
        ]
        for kind, pairs in kinds.items()
    ]
