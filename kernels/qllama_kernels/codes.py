"""Activations as 8-bit codes: the arithmetic, in float32. XLA and the kernels run these same lines.

Scales are products with a reciprocal, which XLA makes of a quotient by a constant anyway.

Source: vLLM `int8_quant_kernels.cu` and `input_quant_fp8.py`.
"""

import jax
import jax.numpy as jnp
from jax import lax

FP8_MAX = 448.0
# vLLM's smallest dynamic fp8 scale: keeps 1/s finite for rows that are (nearly) zero.
FP8_MIN_SCALE = 1.0 / (FP8_MAX * 512.0)


def int8_scale(absmax: jax.Array) -> jax.Array:
    """The scale that takes ±`absmax` to ±127."""
    return absmax * (1.0 / 127.0)


def to_int8(x: jax.Array, absmax: jax.Array) -> jax.Array:
    """Codes of `x` by the scale of `absmax`; zeros where that is zero or NaN."""
    codes = jnp.round(x * jnp.where(absmax > 0, 127.0 / absmax, 0.0))
    return jnp.clip(codes, -128, 127).astype(jnp.int8)


def float8_scale(absmax: jax.Array) -> jax.Array:
    """The scale that takes ±`absmax` to ±448."""
    return jnp.maximum(absmax * (1.0 / FP8_MAX), FP8_MIN_SCALE)


def to_float8(x: jax.Array) -> jax.Array:
    """Cast to float8_e4m3fn, saturating at ±448: JAX's own cast overflows to NaN."""
    return jnp.clip(x, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)


def rounded(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32, but only numbers that `dtype` has. In XLA; in a kernel a cast does it.

    Where bfloat16 is cast to and back, XLA may leave both out; then neither sums nor codes are
    those of the kernels, nor of transformers. (`reduce_precision` has no subnormal numbers: of
    bfloat16 they are float32's, which are flushed anyway, but of float16 they are not.)
    """
    values = values.astype(jnp.float32)
    if dtype != jnp.bfloat16:
        return values.astype(dtype).astype(jnp.float32)
    return lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
