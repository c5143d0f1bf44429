"""What a run will need, before it begins: sizes, memory, and an estimate of its time."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.names import linear_shapes, split_name

from qllama.config import LlamaConfig
from qllama.device import free_memory
from qllama.gptq.batches import Batch
from qllama.gptq.recipe import LinearRecipe
from qllama.gptq.report import ModuleSize
from qllama.gptq.walk import Placement
from qllama.quantization.scheme import QuantScheme

# Of the speed of a large product of matrices, what a whole run reaches.
_EFFICIENCY = 0.5
_PANELS = 0.6  # of the multiplications for a Hessian, those that its symmetry leaves


def plan_sizes(
    checkpoint: Checkpoint, linears: Mapping[str, LinearRecipe], format: str
) -> tuple[ModuleSize, ...]:
    """What every type of module takes before and after, tensors without file headers.

    Args:
        checkpoint: the float model.
        linears: path -> recipe of those that are quantized.
        format: of the export; "bf16" keeps floats.
    """
    kinds: dict[str, list[tuple[str, int, int]]] = {}
    for name, info in checkpoint.tensors.items():
        path, suffix = split_name(name)
        scheme, after = info.dtype.lower(), info.nbytes
        if path in linears and suffix == "weight":
            quantized, n, k = linears[path].scheme, *info.shape
            scheme = quantized.describe()
            if format != "bf16":
                after = stored_bytes(quantized, (n, k), info.nbytes // (n * k))
        kinds.setdefault(_kind(path), []).append((scheme, info.nbytes, after))
    return tuple(
        ModuleSize(
            module=kind,
            scheme=", ".join(dict.fromkeys(scheme for scheme, _, _ in members)),
            count=len(members),
            bytes_before=sum(before for _, before, _ in members),
            bytes_after=sum(after for _, _, after in members),
        )
        for kind, members in kinds.items()
    )


def stored_bytes(scheme: QuantScheme, shape: tuple[int, int], itemsize: int) -> int:
    """Bytes of a weight `[N, K]` in a file: codes, zeros packed like them, and scales of
    `itemsize` bytes."""
    scales = math.prod(scheme.scale_shape(shape))
    bits = scheme.bits * (math.prod(shape) + (0 if scheme.symmetric else scales))
    return -(-bits // 8) + itemsize * scales


def estimate_seconds(
    config: LlamaConfig,
    linears: Mapping[str, LinearRecipe],
    lengths: Sequence[int],
    devices: int,
) -> float:
    """The time of a calibrated run on devices like the present one: its multiplications, at half
    the speed that one large product of matrices is measured to have here.

    Args:
        config: of the model.
        linears: path -> recipe of those that are quantized.
        lengths: tokens of each sequence.
        devices: how many share them, and the rows of weights; each factors every Hessian.
    """
    tokens = sum(lengths)
    wide = jnp.dtype("float32")
    narrow = jnp.dtype(config.dtype) if jax.default_backend() == "gpu" else wide
    heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    products = 4.0 * heads * sum(length**2 for length in lengths)
    solving = factoring = 0.0
    for path, (n, k) in linear_shapes(config).items():
        products += 2.0 * n * k * tokens * (".layers." in path)
        recipe = linears.get(path)
        if recipe is not None and recipe.algorithm == "gptq":
            solving += 3.0 * n * k * k  # the solve, and losses of two candidates
            if not path.endswith(("k_proj", "v_proj", "up_proj")):  # they share a Hessian
                products += 2.0 * k * k * tokens * _PANELS
                factoring += k**3
    seconds = products / devices / _speed(narrow)
    return (seconds + (solving / devices + factoring) / _speed(wide)) / _EFFICIENCY


def _speed(dtype: jnp.dtype) -> float:
    """Floating-point operations a second of a product of matrices."""
    size = 8192 if jax.default_backend() == "gpu" else 1024
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    begin = time.perf_counter()
    product(x).block_until_ready()
    return 2.0 * size**3 / (time.perf_counter() - begin)


def tokens_per_batch() -> int:
    """Enough for the device to be busy, few enough for what is between Linears to be in memory."""
    return 16384 if jax.default_backend() == "gpu" else 1024


def place(config: LlamaConfig, batches: Sequence[Batch], dtype: jnp.dtype) -> Placement:
    """Where the arrays of a walk fit.

    Args:
        config: of the model.
        batches: all of them; the device that has most decides.
        dtype: the compute dtype.
    """
    load: Counter[jax.Device] = Counter()
    for each in batches:
        load[each.device] += each.tokens.size
    tokens = max(load.values())
    d, f = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    # Of the solver: Hessian, its symmetric form, factor and what makes it; weights, errors, codes.
    solver = max(6 * 4 * f * f + 5 * 4 * d * f, 6 * 4 * d * d + 5 * 4 * 2 * d * f)
    batch = 4 * tokens_per_batch() * (d + queries + 3 * f)
    room = free_memory(list(load)) - solver - batch
    streams = tokens * (d + queries) * dtype.itemsize
    with_swiglu = streams + tokens * f * dtype.itemsize
    on_host = jax.default_backend() == "cpu"  # no other memory to turn to
    return Placement(on_device=on_host or streams <= room, keep_swiglu=with_swiglu <= room)


def _kind(path: str) -> str:
    """The path without the number of its layer."""
    head, marker, rest = path.partition(".layers.")
    return rest.partition(".")[2] if marker else head
