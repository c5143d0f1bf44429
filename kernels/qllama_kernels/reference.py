"""The oracle: dequantize in float32, multiply in float32 (or exactly, in int32), round once.

Every other implementation is tested against this one. Clear before fast.

Legend: `x` is `[..., K]`, the weight `[N, K]` (out, in), K contiguous, the result `[..., N]`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qllama_kernels.packing import unpack_float4, unpack_int4

GroupSize = int | tuple[int, int] | None


def expand(grid: jax.Array, shape: tuple[int, int], group_size: GroupSize) -> jax.Array:
    """Repeat one value per block `[A, B]` to one value per weight, broadcastable to `[N, K]`.

    Args:
        grid: scales or zeros. A is 1, N, or the number of row blocks; B likewise for columns.
        shape: `(N, K)`.
        group_size: columns per block, or `(rows, columns)`; None: one block along K.
    """
    rows, columns = group_size if isinstance(group_size, tuple) else (1, group_size or shape[1])
    if grid.shape[0] not in (1, shape[0]):
        grid = jnp.repeat(grid, rows, axis=0)[: shape[0]]
    if grid.shape[1] not in (1, shape[1]):
        grid = jnp.repeat(grid, columns, axis=1)[:, : shape[1]]
    return grid


def code_values(codes: jax.Array, k: int, weight_dtype: str) -> jax.Array:
    """The numbers that stored codes stand for, before scaling: `[N, K]`, int8 or float32."""
    match weight_dtype:
        case "int4":
            return unpack_int4(codes, k)
        case "float4_e2m1fn":
            return unpack_float4(codes, k)
        case "int8":
            return codes
        case "float8_e4m3fn":
            return codes.astype(jnp.float32)
        case _:
            raise ValueError(f"weight_dtype={weight_dtype!r} is not a dtype of quantized weights")


def dequantize(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    k: int,
    weight_dtype: str,
    group_size: GroupSize = None,
    g_idx: jax.Array | None = None,
) -> jax.Array:
    """`(code - zero) * scale` in float32, `[N, K]`.

    Args:
        codes: int8 or float8_e4m3fn `[N, K]`, or 4-bit codes packed as uint8 `[N, ceil(K/2)]`.
        scales: any float, one per block; see `expand`.
        zeros: int16 like `scales`, in the units of the (signed) codes.
        k: K, which packed codes alone do not tell.
        weight_dtype: "int4", "int8", "float8_e4m3fn" or "float4_e2m1fn".
        group_size: see `expand`.
        g_idx: int32 `[K]`, the group of each column where groups are not consecutive
            (GPTQ's activation order); None: column k belongs to group `k // group_size`.
    """
    values = code_values(codes, k, weight_dtype).astype(jnp.float32)

    def per_weight(grid: jax.Array) -> jax.Array:
        grid = grid.astype(jnp.float32)
        return grid[:, g_idx] if g_idx is not None else expand(grid, (len(codes), k), group_size)

    if zeros is not None:
        values = values - per_weight(zeros)
    return values * per_weight(scales)


def dot(x: jax.Array, weight: jax.Array, accumulate: jnp.dtype | type) -> jax.Array:
    """`x [..., K] · weight [N, K]ᵀ`, summed in `accumulate`."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(
        x, weight, contract, precision=lax.Precision.HIGHEST, preferred_element_type=accumulate
    )


def dequantize_input(
    x: jax.Array, input_scale: jax.Array, input_zero: jax.Array | None = None
) -> jax.Array:
    """Quantized activations `[..., K]` back to float32. See `quantized_matmul` for the shapes."""
    values = x.astype(jnp.float32)
    if input_zero is not None:
        values = values - input_zero.astype(jnp.float32)
    if input_scale.ndim and input_scale.shape[-1] > 1:
        input_scale = jnp.repeat(input_scale, x.shape[-1] // input_scale.shape[-1], axis=-1)
    return values * input_scale.astype(jnp.float32)


def scales_follow_rows(scales: jax.Array, n: int) -> bool:
    """Whether one scale covers a whole row (or the whole weight) and can wait for the sum."""
    return scales.shape[1] == 1 and scales.shape[0] in (1, n)


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
) -> jax.Array:
    """float32 `[..., N]`; arguments as `qllama_kernels.dispatch.quantized_matmul`."""
    k = x.shape[-1]
    integers = x.dtype == jnp.int8 and weight_dtype in ("int4", "int8")
    if integers and zeros is None and scales_follow_rows(scales, codes.shape[0]):
        assert input_scale is not None
        values = code_values(codes, k, weight_dtype)
        total = dot(x, values, jnp.int32)
        if input_zero is not None:
            columns = jnp.sum(values, axis=1, dtype=jnp.int32)
            total = total - input_zero.astype(jnp.int32) * columns
        scaled = total.astype(jnp.float32) * input_scale.astype(jnp.float32)
        return scaled * scales[:, 0].astype(jnp.float32)
    weight = dequantize(
        codes, scales, zeros, k=k, weight_dtype=weight_dtype, group_size=group_size, g_idx=g_idx
    )
    if input_scale is not None:
        x = dequantize_input(x, input_scale, input_zero)
    return dot(x.astype(jnp.float32), weight, jnp.float32)
