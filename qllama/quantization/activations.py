"""Quantizing the input of a Linear, in float32 whatever the compute dtype.

Two semantics. "vllm" is what production kernels do and the default. "compressed-tensors"
reproduces that library's fake quantization, for comparison with transformers. They differ in the
int8 scale (absmax/127 or /127.5), in `x * (1/s)` or `x / s`, and in what a zero row gets.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from qllama.quantization.scheme import ActivationScheme

Semantics = Literal["vllm", "compressed-tensors"]

FP8_MAX = 448.0
# vLLM's smallest dynamic fp8 scale: keeps 1/s finite for rows that are (nearly) zero.
FP8_MIN_SCALE = 1.0 / (FP8_MAX * 512.0)


class QuantizedInput(NamedTuple):
    """Activations as codes: `x ≈ (codes - zero) * scale`."""

    codes: jax.Array  # [..., K], int8 or float8_e4m3fn
    scale: jax.Array  # float32: [] per tensor, [..., 1] per token, [..., K/g] per group
    zero: jax.Array | None  # int32, like scale


def quantize_activations(
    x: jax.Array,
    scheme: ActivationScheme,
    *,
    input_scale: jax.Array | None = None,
    input_zero: jax.Array | None = None,
    semantics: Semantics = "vllm",
    axis_name: str | None = None,
) -> QuantizedInput:
    """Quantize `x [..., K]` as `scheme` says.

    Args:
        x: any float dtype. NaN stays NaN in fp8 and poisons only its own row in int8.
        scheme: dtype, granularity, static or dynamic.
        input_scale: float32 scalar, the calibrated scale of a static scheme.
        input_zero: int8 scalar, the calibrated zero point of an asymmetric static scheme.
        semantics: see the module.
        axis_name: of the mesh, where K is spread over devices and a token's range is to be that of
            its whole row; None: that of `x`.

    Source: vLLM `int8_quant_kernels.cu` and `input_quant_fp8.py`.
    """
    eps = float(jnp.finfo(x.dtype).eps)
    x = x.astype(jnp.float32)
    exact = semantics == "compressed-tensors"
    if scheme.dtype == "int8":
        return _to_int8(x, scheme, input_scale, input_zero, eps if exact else None, axis_name)
    if scheme.dynamic:
        groups = x
        if scheme.group_size is not None:
            groups = x.reshape(*x.shape[:-1], -1, scheme.group_size)
        absmax = _largest(jnp.abs(groups), None if scheme.group_size is not None else axis_name)
        if scheme.upper_bound is not None:
            absmax = jnp.minimum(absmax, scheme.upper_bound)
        if exact:
            scale = divide(absmax, FP8_MAX)
            scale = jnp.where(scale == 0, eps, scale)
        else:
            scale = jnp.maximum(absmax / FP8_MAX, FP8_MIN_SCALE)
        exact |= scheme.strategy == "group"
        scaled = divide(groups, scale) if exact else groups * (1.0 / scale)
        scale = scale[..., 0] if scheme.group_size is not None else scale
        scaled = scaled.reshape(x.shape)
    else:
        assert input_scale is not None
        scale = input_scale.astype(jnp.float32)
        scaled = divide(x, scale) if exact else x * (1.0 / scale)
    return QuantizedInput(to_float8(scaled), scale, None)


def to_float8(x: jax.Array) -> jax.Array:
    """Cast to float8_e4m3fn, saturating at ±448: JAX's own cast overflows to NaN."""
    return jnp.clip(x, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)


def _to_int8(
    x: jax.Array,
    scheme: ActivationScheme,
    input_scale: jax.Array | None,
    input_zero: jax.Array | None,
    eps: float | None,
    axis_name: str | None,
) -> QuantizedInput:
    """`eps` is the scale of an all-zero row under compressed-tensors' semantics, else None."""
    zero = None
    if not scheme.dynamic:
        assert input_scale is not None
        scale = input_scale.astype(jnp.float32)
        zero = None if input_zero is None else input_zero.astype(jnp.int32)
        codes = jnp.round(divide(x, scale))
    elif scheme.symmetric:
        absmax = _largest(jnp.abs(x), axis_name)
        if eps is None:
            scale = absmax / 127.0
            codes = jnp.round(x * jnp.where(absmax > 0, 127.0 / absmax, 0.0))
        else:
            scale = divide(absmax, 127.5)
            scale = jnp.where(scale == 0, eps, scale)
            codes = jnp.round(jnp.clip(divide(x, scale), -128.0, 127.0))
    else:
        low = jnp.minimum(-_largest(-x, axis_name), 0.0)
        high = jnp.maximum(_largest(x, axis_name), 0.0)
        scale = divide(high - low, 255.0)
        scale = jnp.where(scale == 0, 1.0 if eps is None else eps, scale)
        zero = jnp.clip(jnp.round(-128.0 - divide(low, scale)), -128, 127).astype(jnp.int32)
        codes = jnp.round(divide(x, scale))
    if zero is not None:
        codes = codes + zero.astype(jnp.float32)
    return QuantizedInput(jnp.clip(codes, -128, 127).astype(jnp.int8), scale, zero)


def _largest(x: jax.Array, axis_name: str | None) -> jax.Array:
    """The largest of each row, `[..., 1]`; of its parts on all devices of a mesh axis."""
    largest = jnp.max(x, axis=-1, keepdims=True)
    return largest if axis_name is None else jax.lax.pmax(largest, axis_name)


def divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """The quotient, correctly rounded.

    XLA multiplies by the reciprocal where it sees that `y` is broadcast, which is off by a bit for
    most numbers; a row's largest element lies at a rounding tie under absmax/127.5, so it shows.
    """
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(jnp.float32(y), x.shape))
