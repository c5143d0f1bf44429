"""The one entry to what lies between the products: norms, SwiGLU, and quantized rows.

Each takes the sums of the product before as that leaves them, and hands the product after what it
reads: floats, or their codes. In plain XLA these are several kernels, on Hopper one: there is less
to launch for the few rows of a decode step, and less to read and write for thousands.

Legend: S partial sums, M rows (any leading dimensions), D columns.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qllama_kernels import row_kernels
from qllama_kernels.codes import float8_scale, int8_scale, rounded, to_float8, to_int8
from qllama_kernels.dispatch import check_backend, kernels_run_here
from qllama_kernels.xla import add_up

_MAX_NUMBERS = 2**30  # in a result; gates and ups are twice as many, and offsets have 32 bits


class QuantizedInput(NamedTuple):
    """Activations as codes: `x ≈ (codes - zero) * scale`."""

    codes: jax.Array  # [..., K], int8 or float8_e4m3fn
    scale: jax.Array  # float32: [] per tensor, [..., 1] per token, [..., K/g] per group
    zero: jax.Array | None = None  # int32, like scale


class Codes(NamedTuple):
    """How rows are to be quantized: a scale each, or `scale` for all."""

    dtype: str  # "int8" or "float8_e4m3fn"
    scale: jax.Array | None = None  # float32 [], for float8 only


def residual_norm(
    x: jax.Array,
    addends: jax.Array | None,
    weight: jax.Array,
    *,
    eps: float,
    codes: Codes | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array | QuantizedInput]:
    """Add to the residual stream, then norm it by its root mean square.

    Args:
        x: `[M, D]`, the residual stream in the compute dtype.
        addends: `[S, M, D]`, in the compute dtype, or float32 if they are yet to be rounded to
            it, or None.
        weight: `[D]` in the compute dtype.
        eps: added to the mean square.
        codes: what to make of the normed rows; None: leave them in the compute dtype.
        backend: as `dispatch.quantized_matmul`.

    Returns:
        `x` with the sum of the addends, and its norm times the weight.

    Raises:
        NotImplementedError: a named backend that cannot run this.
    """
    if not _kernel_runs(backend, x.shape, x.dtype):
        return _residual_norm(x, addends, weight, eps, codes)
    rows = None if addends is None else addends.reshape(addends.shape[0], -1, x.shape[-1])
    arrays = x.reshape(-1, x.shape[-1]), rows, weight
    outputs = _run(row_kernels.residual_norm, arrays, codes, x.dtype, backend, eps=eps)
    if addends is not None:
        x, outputs = outputs[0].reshape(x.shape), outputs[1:]
    return x, _shaped(outputs, x.shape, codes)


def swiglu(
    gate_up: jax.Array,
    *,
    dtype: jnp.dtype | type,
    codes: Codes | None = None,
    backend: str = "auto",
) -> jax.Array | QuantizedInput:
    """`silu(gate) * up`, `[M, D]`, each of the two rounded once, as transformers and vLLM do.

    Args:
        gate_up: `[S, M, 2D]`, gates first, like the addends of `residual_norm`.
        dtype: the compute dtype.
        codes, backend: as for `residual_norm`, and so are the errors.
    """
    dtype = jnp.dtype(dtype)
    shape = (*gate_up.shape[1:-1], gate_up.shape[-1] // 2)
    if not _kernel_runs(backend, shape, dtype):
        return _coded(_swiglu(gate_up, dtype), codes)
    arrays = (gate_up.reshape(gate_up.shape[0], -1, gate_up.shape[-1]),)
    outputs = _run(row_kernels.swiglu, arrays, codes, dtype, backend, dtype=dtype)
    return _shaped(outputs, shape, codes)


def quantize(x: jax.Array, codes: Codes, *, backend: str = "auto") -> QuantizedInput:
    """Codes of `x [M, D]`; arguments and errors as for `residual_norm`."""
    if not _kernel_runs(backend, x.shape, x.dtype):
        return _quantized(x, codes)
    arrays = (x.reshape(-1, x.shape[-1]),)
    outputs = _run(row_kernels.quantize, arrays, codes, x.dtype, backend)
    quantized = _shaped(outputs, x.shape, codes)
    assert isinstance(quantized, QuantizedInput)
    return quantized


# -- plain XLA, and the reference ------------------------------------------------------------------


def _residual_norm(
    x: jax.Array, addends: jax.Array | None, weight: jax.Array, eps: float, codes: Codes | None
) -> tuple[jax.Array, jax.Array | QuantizedInput]:
    dtype, wide = x.dtype, x.astype(jnp.float32)
    if addends is not None:
        wide = rounded(wide + rounded(add_up(addends), dtype), dtype)
    variance = jnp.mean(wide * wide, axis=-1, keepdims=True) + eps
    if dtype == jnp.float32:
        # XLA's rsqrt is off by a bit, which moves whole rows across the rounding ties that
        # quantized activations have. The barrier keeps XLA from making one of these two.
        inverse = 1.0 / lax.optimization_barrier(jnp.sqrt(variance))
    else:
        inverse = lax.rsqrt(variance)
    normed = rounded(weight.astype(jnp.float32) * rounded(wide * inverse, dtype), dtype)
    return wide.astype(dtype), _coded(normed.astype(dtype), codes)


def _swiglu(gate_up: jax.Array, dtype: jnp.dtype) -> jax.Array:
    gate, up = jnp.split(rounded(add_up(gate_up), dtype), 2, axis=-1)
    return (rounded(jax.nn.silu(gate), dtype) * up).astype(dtype)


def _coded(x: jax.Array, codes: Codes | None) -> jax.Array | QuantizedInput:
    return x if codes is None else _quantized(x, codes)


def _quantized(x: jax.Array, codes: Codes) -> QuantizedInput:
    x = rounded(x, x.dtype)
    if codes.scale is not None:
        return QuantizedInput(to_float8(x * (1.0 / codes.scale)), codes.scale)
    absmax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    if codes.dtype == "int8":
        return QuantizedInput(to_int8(x, absmax), int8_scale(absmax))
    scale = float8_scale(absmax)
    return QuantizedInput(to_float8(x * (1.0 / scale)), scale)


# -- kernels ---------------------------------------------------------------------------------------


def _kernel_runs(backend: str, shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whether a kernel is to make rows of `shape`.

    Raises:
        NotImplementedError: `backend` names the kernels, and they cannot.
    """
    check_backend(backend)
    *lead, columns = shape
    m = math.prod(lead)
    if backend in ("xla", "reference") or m == 0:
        return False
    if backend == "auto" and not kernels_run_here():
        return False
    try:
        if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            raise NotImplementedError(f"rows of {dtype}")
        if m * columns > _MAX_NUMBERS:
            raise NotImplementedError(f"{m} rows of {columns} columns, more than {_MAX_NUMBERS}")
        row_kernels.cut_row(columns)
    except NotImplementedError:
        if backend != "auto":
            raise
        return False
    return True


def _run(
    kernel: Any,
    arrays: tuple[jax.Array | None, ...],
    codes: Codes | None,
    uncoded: jnp.dtype,
    backend: str,
    **static: Any,
) -> list[jax.Array]:
    scale = None if codes is None or codes.scale is None else codes.scale.reshape(1)
    static["out_dtype"] = uncoded if codes is None else jnp.dtype(codes.dtype)
    static["interpret"] = backend == "interpret"
    return _traced_once(kernel, tuple(static.items()), *arrays, scale)


# A jit of its own, so that the layers of a model that share a kernel trace and lower it once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _traced_once(
    kernel: Any, static: tuple[tuple[str, Any], ...], *arrays: jax.Array | None
) -> list[jax.Array]:
    outputs: list[jax.Array] = kernel(*arrays, **dict(static))
    return outputs


def _shaped(
    outputs: list[jax.Array], shape: tuple[int, ...], codes: Codes | None
) -> jax.Array | QuantizedInput:
    out = outputs[0].reshape(shape)
    if codes is None:
        return out
    scale = outputs[1].reshape(*shape[:-1], 1) if codes.scale is None else codes.scale
    return QuantizedInput(out, scale)
