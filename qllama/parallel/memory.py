"""What a model will take on each device, known before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from qllama.config import LlamaConfig
from qllama.model.kv_cache import cache_bytes
from qllama.parallel.sharding import local_config, part_of
from qllama.quantization.scheme import QuantScheme

_SCALE_BYTES = 2  # of most checkpoints; where they take 4, they are few


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on each device of a replica."""

    weights: int
    cache_per_token: int

    def tokens(self, free: int) -> int:
        """Tokens of key-value cache that `free` bytes hold beside the weights."""
        return max((free - self.weights) // self.cache_per_token, 0)


def plan_memory(
    config: LlamaConfig,
    weights: Mapping[str, tuple[int, int]],
    schemes: Mapping[str, QuantScheme],
    *,
    size: int,
    dtype: jnp.dtype | type,
    cache_dtype: jnp.dtype | type,
    dequantized: bool,
) -> MemoryPlan:
    """The plan of a model split over `size` devices; exact but for norms, biases and wide scales.

    Args:
        config: of the model.
        weights: path -> `[N, K]` of its Linears and of the embedding, without a tied head.
        schemes: path -> scheme of those that are quantized.
        size: tensor_parallel_size.
        dtype: of float weights.
        cache_dtype: of the key-value cache.
        dequantized: whether quantized weights are widened to `dtype` when they are loaded.
    """
    total = 0
    for path, shape in weights.items():
        part = part_of(config, path, shape, 0, size)
        n = part.rows.stop - part.rows.start
        k = part.columns.stop - part.columns.start
        scheme = None if dequantized else schemes.get(path)
        total += n * k * jnp.dtype(dtype).itemsize if scheme is None else _bytes(scheme, (n, k))
    return MemoryPlan(
        weights=total, cache_per_token=cache_bytes(local_config(config, size), cache_dtype)
    )


def check_memory(plan: MemoryPlan, free: int, *, tokens: int) -> None:
    """Raise `ValueError` if weights and a cache of `tokens` do not fit into `free` bytes."""
    cache = tokens * plan.cache_per_token
    if plan.weights + cache <= free:
        return
    raise ValueError(
        f"the weights take {_units(plan.weights)} on each device and a key-value cache of {tokens} "
        f"tokens {_units(cache)}, but {_units(max(free, 0))} are free there; use a larger "
        "tensor_parallel_size, a smaller max_model_len, or a checkpoint with narrower weights"
    )


def _units(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _bytes(scheme: QuantScheme, shape: tuple[int, int]) -> int:
    rows, columns = scheme.scale_shape(shape)
    per_scale = _SCALE_BYTES if scheme.symmetric else _SCALE_BYTES + 2  # int16 zeros
    return shape[0] * -(-shape[1] * scheme.bits // 8) + rows * columns * per_scale
