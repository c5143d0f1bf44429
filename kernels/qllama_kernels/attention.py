"""The entries to attention: cuDNN's over whole texts, our kernel's over the cache.

What has neither runs in plain XLA, which is the model's business.

Legend: B rows, T tokens, N heads, K key-value heads, S capacity in tokens, H head_dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qllama_kernels import decode_attention as kernel
from qllama_kernels.dispatch import check_backend, kernels_run_here


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


def has_decode_attention(dtype: jnp.dtype, cache: jax.Array, heads: int, backend: str) -> bool:
    """Whether `decode_attention` runs here.

    Args:
        dtype: of queries, keys and values as they are projected.
        cache: keys or values, `[B, K, S, H]`.
        heads: N.
        backend: as of `dispatch.quantized_matmul`; it is products that the names of the kernels
            insist on, so what this kernel does not take is False under any of them.
    """
    check_backend(backend)
    _, kv_heads, capacity, head_dim = cache.shape
    here = backend in ("pallas", "interpret") or (backend == "auto" and kernels_run_here())
    return (
        here
        and dtype in (jnp.bfloat16, jnp.float16)
        and cache.dtype in (dtype, jnp.float8_e4m3fn)
        and head_dim in kernel.HEAD_DIMS
        and capacity % kernel.SMALLEST == 0
        and heads % kv_heads == 0
        and heads <= kernel.QUERIES * kv_heads
    )


# A jit of its own, so that the layers of a model trace and lower the kernel once.
@functools.partial(jax.jit, static_argnames="backend")
def decode_attention(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    backend: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotate each row's new token, write it to its position p of the cache, attend to 0..p.

    Args:
        qkv: bfloat16 or float16 `[B, (N + 2K) * H]`: heads of queries, keys and values, none of
            them rotated.
        cos, sin: float32 `[B, H / 2]`.
        positions: int32 `[B]`. A row at S or beyond writes nothing and gets zeros.
        keys, values: `[B, K, S, H]`, in the dtype of `qkv` or float8_e4m3fn. Donated, or carried by
            a loop, they are updated in place.
        k_scale, v_scale: float32, of one element or K, divide before the cast to a float8 cache;
            None: 1.
        backend: "interpret", or one for which `has_decode_attention` was True.

    Returns:
        `[B, N, H]` in the dtype of `qkv`, and the cache, written.
    """
    rope = jnp.stack(
        [jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)], axis=1
    )
    one = jnp.asarray(np.ones(1, np.float32))  # a constant in the program: no kernel makes it
    scales = [one if scale is None else scale.reshape(-1) for scale in (k_scale, v_scale)]
    config = kernel.AttentionConfig()
    out, stats, keys, values = kernel.decode_attention(
        qkv,
        rope,
        positions,
        keys,
        values,
        *scales,
        config=config,
        interpret=backend == "interpret",
    )
    whole = out[0] if config.splits(keys.shape[2]) == 1 else _merged(out, stats).astype(qkv.dtype)
    return whole, keys, values


def _merged(out: jax.Array, stats: jax.Array) -> jax.Array:
    """float32 `[B, N, H]`: what the splits of a row found, weighed; zeros where that is nothing.

    `out` and `stats` as the kernel returns them.
    """
    splits, batch, heads, _ = out.shape
    group = heads // stats.shape[2]
    largest, sums = (stats[:, :, :, i, :group].reshape(splits, batch, heads, 1) for i in range(2))
    used = sums > 0  # else `out` holds anything
    weights = jnp.where(used, jnp.exp(largest - jnp.max(largest, axis=0)), 0.0)
    total = jnp.sum(weights * sums, axis=0)
    merged = jnp.sum(jnp.where(used, weights * out, 0.0), axis=0)
    return merged / jnp.where(total == 0, 1.0, total)
