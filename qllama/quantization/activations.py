"""Quantizing the input of a Linear, in float32 whatever the compute dtype.

Two semantics. "vllm" is what production kernels do and the default. "compressed-tensors"
reproduces that library's fake quantization, for comparison with transformers. They differ in the
int8 scale (absmax/127 or /127.5), in `x * (1/s)` or `x / s`, and in what a zero row gets.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from qllama_kernels.codes import FP8_MAX, float8_scale, int8_scale, rounded, to_float8, to_int8
from qllama_kernels.rows import Codes, QuantizedInput

from qllama.quantization.scheme import ActivationScheme

Semantics = Literal["vllm", "compressed-tensors"]


def row_codes(
    scheme: ActivationScheme | None,
    *,
    input_scale: jax.Array | None,
    semantics: Semantics,
    axis_name: str | None,
) -> Codes | None:
    """What `quantize_activations` does, where that is a row operation that others can take over.

    Arguments as there. None: there is nothing to quantize, or it takes more than that.
    """
    if scheme is None or semantics != "vllm" or axis_name is not None:
        return None
    if scheme.group_size or not scheme.symmetric or scheme.upper_bound is not None:
        return None
    if scheme.dynamic:
        return Codes(scheme.dtype)
    return None if scheme.dtype == "int8" else Codes(scheme.dtype, input_scale)


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
    """
    eps = float(jnp.finfo(x.dtype).eps)
    x = rounded(x, x.dtype)
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
            scale = float8_scale(absmax)
        exact |= scheme.strategy == "group"
        scaled = divide(groups, scale) if exact else groups * (1.0 / scale)
        scale = scale[..., 0] if scheme.group_size is not None else scale
        scaled = scaled.reshape(x.shape)
    else:
        assert input_scale is not None
        scale = input_scale.astype(jnp.float32)
        scaled = divide(x, scale) if exact else x * (1.0 / scale)
    return QuantizedInput(to_float8(scaled), scale, None)


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
            return QuantizedInput(to_int8(x, absmax), int8_scale(absmax), None)
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
    most numbers; a row's largest element lies at a rounding tie under absmax/127.5, so it shows. It
    does not see through a choice; through a barrier neither, but that is an array in memory.
    """
    return x / jnp.where(jnp.isnan(x), 1.0, jnp.broadcast_to(jnp.float32(y), x.shape))
