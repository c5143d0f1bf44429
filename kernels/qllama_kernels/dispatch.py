"""The one entry to quantized products: checks the arguments, then picks an implementation."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from qllama_kernels import reference, xla
from qllama_kernels.reference import GroupSize

Backend = Literal["auto", "pallas", "xla", "reference", "interpret"]
BACKENDS: tuple[str, ...] = get_args(Backend)

_STORED_AS = {
    "int4": jnp.uint8,
    "float4_e2m1fn": jnp.uint8,
    "int8": jnp.int8,
    "float8_e4m3fn": jnp.float8_e4m3fn,
}


def check_backend(backend: str) -> None:
    """Raise `ValueError` for a name that is no backend, `NotImplementedError` for one not built."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend in ("pallas", "interpret"):
        raise NotImplementedError(f"backend={backend!r} has no kernels yet; use 'auto' or 'xla'")


def quantized_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    weight_dtype: str,
    group_size: GroupSize = None,
    g_idx: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    input_zero: jax.Array | None = None,
    bias: jax.Array | None = None,
    out_dtype: jnp.dtype | type | None = None,
    backend: str = "auto",
) -> jax.Array:
    """`x · dequantize(codes)ᵀ + bias`.

    Args:
        x: `[..., K]`. Float for weight-only schemes. int8 or float8_e4m3fn codes where the
            activations are quantized too; then `input_scale` is required.
        codes: int8 or float8_e4m3fn `[N, K]`; 4-bit codes as uint8 `[N, ceil(K/2)]`, see `packing`.
        scales: `[A, B]`, any float: one per tensor `[1, 1]`, row `[N, 1]`, group `[N, ceil(K/g)]`
            or block `[ceil(N/r), ceil(K/c)]`.
        zeros: int16 like `scales`, in the units of the signed codes; None: all zero.
        weight_dtype: "int4", "int8", "float8_e4m3fn" or "float4_e2m1fn".
        group_size: columns per scale, or `(rows, columns)`; None: one scale along K.
        g_idx: int32 `[K]`, the group of each column where groups are not consecutive.
        input_scale: float32, `[]` per tensor, `[..., 1]` per token, `[..., K/g]` per token group.
        input_zero: zero point of int8 activations, shaped like `input_scale`; None: zero.
        bias: `[N]`, added in float32.
        out_dtype: of the result; None: `x.dtype`, or float32 where `x` holds codes.
        backend: "reference" (the oracle), "xla", or "auto": the fastest that runs here.

    Returns:
        `[..., N]`. Sums, scales and bias are float32 (int32 for int8 x int8); rounded once.

    Raises:
        ValueError: arguments that do not fit together.
        NotImplementedError: a named backend that cannot run this.
    """
    check_backend(backend)
    k = x.shape[-1]
    if weight_dtype not in _STORED_AS:
        raise ValueError(f"weight_dtype={weight_dtype!r}; use one of {', '.join(_STORED_AS)}")
    columns = -(-k // 2) if weight_dtype in ("int4", "float4_e2m1fn") else k
    if codes.dtype != _STORED_AS[weight_dtype] or codes.ndim != 2 or codes.shape[1] != columns:
        raise ValueError(
            f"{weight_dtype} codes for K={k} must be {jnp.dtype(_STORED_AS[weight_dtype])} "
            f"[N, {columns}], got {codes.dtype} {list(codes.shape)}"
        )
    if (x.dtype in (jnp.int8, jnp.float8_e4m3fn)) != (input_scale is not None):
        raise ValueError(
            f"x is {x.dtype} and input_scale is {'missing' if input_scale is None else 'given'}: "
            "codes need their scale, floats have none"
        )
    implementation = reference if backend == "reference" else xla
    out = implementation.quantized_matmul(
        x,
        codes,
        scales,
        zeros,
        weight_dtype=weight_dtype,
        group_size=group_size,
        g_idx=g_idx,
        input_scale=input_scale,
        input_zero=input_zero,
    )
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    if out_dtype is None:
        out_dtype = jnp.float32 if input_scale is not None else x.dtype
    return out.astype(out_dtype)
