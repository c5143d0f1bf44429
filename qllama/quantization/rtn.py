"""Rounding to nearest: the codes and scales of a float weight, without any calibration.

Rules and arithmetic are those of compressed-tensors: the smallest scale that reaches the largest
weight of its block, every intermediate result rounded to the weight's dtype. Both matter for the
bits: with bfloat16 weights one code in a few hundred depends on the rounding of the quotient. Only
scales that would be subnormal numbers are made larger.

Source: compressed-tensors `calculate_qparams`, `_quantize`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from qllama_kernels.codes import FP8_MAX, to_float8
from qllama_kernels.packing import pack_int4

from qllama.quantization.activations import divide
from qllama.quantization.qtensor import Array, QTensor
from qllama.quantization.scheme import QuantScheme

_BITS = {"bfloat16": (8, 7), "float16": (5, 10), "float32": (8, 23)}  # of exponent, of mantissa


def quantize_rtn(
    weight: Array,
    scheme: QuantScheme,
    *,
    input_scale: Array | float | None = None,
    input_zero: Array | int | None = None,
) -> QTensor:
    """`weight [N, K]` with every element rounded to the nearest code of its block.

    Can be traced, also inside a gradient. NaN and infinite weights give NaN or infinite scales,
    which `QTensor.validate` refuses.

    Args:
        weight: bfloat16, float16 or float32; the scales get its dtype. A numpy array gives a
            QTensor of numpy arrays.
        scheme: any with integer or float8 weights. The last rows of a block may be missing (FP8
            blocks), its last columns may not.
        input_scale: float32 scalar, the calibrated scale of static activations; else None.
        input_zero: int8 scalar, where static activations are asymmetric; else None.

    Raises:
        ValueError: a scheme or dtype that is not rounded this way, or K that the scheme's columns
            do not divide.
    """
    n, k = weight.shape
    rows, columns = scheme.scale_block((n, k))
    if scheme.weight_dtype not in ("int4", "int8", "float8_e4m3fn"):
        raise ValueError(f"{scheme.weight_dtype} weights are read, not made; use int4, int8 or fp8")
    if weight.dtype.name not in _BITS:
        raise ValueError(f"the weight is {weight.dtype}; it must be one of {', '.join(_BITS)}")
    if k % columns:
        sizes = [size for size in (256, 128, 64, 32, 16) if k % size == 0]
        raise ValueError(
            f"K={k} is not a multiple of the scheme's {columns} columns a scale; "
            f"sizes that divide it: {', '.join(map(str, sizes)) or 'none of the usual'}"
        )
    rounded = partial(round_to, weight.dtype.name)
    blocks = jnp.pad(jnp.asarray(weight), [(0, -n % rows), (0, 0)]).astype(jnp.float32)
    blocks = blocks.reshape(-1, rows, k // columns, columns)  # [N/r, r, K/c, c]

    low = jnp.minimum(jnp.min(blocks, axis=(1, 3), keepdims=True), 0.0)
    high = jnp.maximum(jnp.max(blocks, axis=(1, 3), keepdims=True), 0.0)
    smallest, largest = code_range(scheme)
    if scheme.symmetric:
        scale = rounded(divide(jnp.maximum(-low, high), (largest - smallest) / 2))
    else:
        scale = rounded(divide(rounded(high - low), largest - smallest))
    kind = jnp.finfo(weight.dtype)
    # A subnormal scale has lost bits, and is zero on many devices.
    usable = jnp.maximum(scale, float(kind.smallest_normal))
    scale = jnp.where(low == high, float(kind.eps), usable)  # then both are zero

    codes = rounded(divide(blocks, scale))
    zero = None
    if not scheme.symmetric:
        zero = rounded(smallest - rounded(divide(low, scale)))
        zero = jnp.round(jnp.clip(zero, smallest, largest))
        codes = rounded(codes + zero)
    codes = jnp.clip(codes, smallest, largest).reshape(-1, k)[:n]

    grid = scheme.scale_shape((n, k))
    quantized = QTensor(
        codes=_store(codes, scheme),
        scales=scale.reshape(grid).astype(weight.dtype),
        zeros=None if zero is None else zero.reshape(grid).astype(jnp.int16),
        input_scale=None if input_scale is None else jnp.asarray(input_scale, jnp.float32),
        input_zero=None if input_zero is None else jnp.asarray(input_zero, jnp.int8),
        scheme=scheme,
        shape=(n, k),
    )
    return jax.device_get(quantized) if isinstance(weight, np.ndarray) else quantized


def round_to(dtype: str, x: jax.Array) -> jax.Array:
    """float32 `x` as a float type of that name would hold it, still float32."""
    # Unlike a cast there and back, XLA may not optimise this away.
    exponent_bits, mantissa_bits = _BITS[dtype]
    return lax.reduce_precision(x, exponent_bits, mantissa_bits)


def code_range(scheme: QuantScheme) -> tuple[float, float]:
    """The smallest and the largest code of a scheme with integer or float8 weights."""
    if scheme.weight_dtype == "float8_e4m3fn":
        return -FP8_MAX, FP8_MAX
    return -(2.0 ** (scheme.bits - 1)), 2.0 ** (scheme.bits - 1) - 1


def _store(codes: jax.Array, scheme: QuantScheme) -> jax.Array:
    """float32 `[N, K]` within the range of codes to what a QTensor keeps."""
    if scheme.weight_dtype == "float8_e4m3fn":
        return to_float8(codes)
    integers = jnp.round(codes).astype(jnp.int8)
    return pack_int4(integers) if scheme.bits == 4 else integers
