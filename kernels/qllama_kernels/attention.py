"""The entries to attention: cuDNN's over whole texts, our kernel's over the cache.

What has neither runs in plain XLA, which is the model's business.

Legend: B rows, T tokens, N heads, K key-value heads, S capacity in tokens, H head_dim.
"""

import functools

import jax
import jax.numpy as jnp

from qllama_kernels import decode_attention as kernel
from qllama_kernels.dispatch import check_backend, kernels_run_here
from qllama_kernels.fragments import ROWS


def has_fused_attention(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether `fused_attention` runs here: for 16-bit floats on Ampere and newer."""
    if jax.default_backend() != "gpu" or jnp.dtype(dtype).itemsize != 2 or head_dim % 8:
        return False
    capability = getattr(jax.local_devices()[0], "compute_capability", "0.0")
    return float(capability) >= 8.0 and head_dim <= 128


def fused_attention(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Causal attention of texts to themselves, without an array of all scores.

    Args:
        queries: bfloat16 or float16 `[B, T, N, H]`.
        keys, values: of the same dtype, `[B, T, K, H]`.

    Returns:
        `[B, T, N, H]` in their dtype.
    """
    return jax.nn.dot_product_attention(
        queries, keys, values, is_causal=True, implementation="cudnn"
    )


def has_decode_attention(
    dtype: jnp.dtype,
    cache: jax.Array,
    heads: tuple[int, int],
    head_dim: int,
    backend: str,
) -> bool:
    """Whether `decode_attention` runs here.

    Args:
        dtype: of queries, keys and values as they are projected.
        cache: keys or values, `[B, K, S, H]`.
        heads: N and K.
        head_dim: H.
        backend: as of `dispatch.quantized_matmul`; it is products that the names of the kernels
            insist on, so what this kernel does not take is False under any of them.
    """
    check_backend(backend)
    here = backend in ("pallas", "interpret") or (backend == "auto" and kernels_run_here())
    narrow = dtype in (jnp.bfloat16, jnp.float16) and cache.dtype == dtype
    tiled = head_dim in (64, 128) and cache.shape[2] % 8 == 0 and heads[0] // heads[1] <= ROWS
    return here and narrow and tiled


def decode_attention(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    backend: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotate one token's queries and keys, write the cache, and attend to it.

    Arguments and results as `qllama_kernels.decode_attention.decode_attention` has them.
    """
    interpret = backend == "interpret"
    return _traced_once(qkv, cos, sin, positions, keys, values, interpret=interpret)


# A jit of its own, so that the layers of a model trace and lower the kernel once.
@functools.partial(jax.jit, static_argnames="interpret")
def _traced_once(*arrays: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    return kernel.decode_attention(*arrays, interpret=interpret)
